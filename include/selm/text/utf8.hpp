#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace selm {

/// Offset in bytes of the first byte that does not belong to a well-formed UTF-8 sequence (overlong forms, surrogates
/// and values above U+10FFFF are not well-formed); nothing when the whole text is well-formed. NUL is well-formed.
std::optional<std::size_t> find_invalid_utf8(std::string_view text);

/// The text with every maximal ill-formed subsequence replaced by U+FFFD, as Unicode recommends and as Rust and Python
/// do.
std::string replace_invalid_utf8(std::string_view text);

/// Without leading and trailing Unicode whitespace: the characters that Python's str.strip() removes. The result points
/// into @p text; bytes that are not UTF-8 are no whitespace.
std::string_view strip_whitespace(std::string_view text);

/// Appends the UTF-8 form of @p code_point (a Unicode scalar value).
void append_utf8(std::string& out, char32_t code_point);

/// Reads the character at @p position of well-formed UTF-8 and moves @p position behind it.
char32_t next_code_point(std::string_view text, std::size_t& position);

} // namespace selm
