#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace selm::text {

/// GPT-2's printable stand-ins for the 256 bytes (bytes_to_unicode): printable Latin-1 characters stand for themselves,
/// the others for U+0100 and up in order of the bytes.
class ByteAlphabet {
  public:
    static const ByteAlphabet& instance();

    /// UTF-8 of the stand-in (one or two bytes).
    std::string_view symbol(std::uint8_t byte) const { return {symbols_[byte].data(), lengths_[byte]}; }
    void append(std::string& out, std::string_view bytes) const;

    /// The byte that @p code_point stands for; -1 when it stands for none.
    int byte_of(char32_t code_point) const { return code_point < bytes_.size() ? bytes_[code_point] : -1; }

  private:
    ByteAlphabet();
    std::array<std::array<char, 2>, 256> symbols_{};
    std::array<std::uint8_t, 256> lengths_{};
    std::array<std::int16_t, 324> bytes_{}; ///< 256 + 68 characters
};

} // namespace selm::text
