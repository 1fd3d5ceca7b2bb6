#include "selm/text/utf8.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace selm {
namespace {

struct Sequence {
    std::size_t bytes; ///< length of the well-formed sequence, or of the maximal ill-formed subsequence (>= 1)
    bool well_formed;
};

std::uint8_t byte_at(std::string_view text, std::size_t position)
{
    return static_cast<std::uint8_t>(text[position]);
}

/// Unicode, table 3-7: the range of the second byte depends on the first; all further ones are 80..BF.
Sequence read_sequence(std::string_view text, std::size_t position)
{
    const std::uint8_t first = byte_at(text, position);
    if (first < 0x80)
        return {1, true};
    std::size_t length = 0;
    std::uint8_t low = 0x80;
    std::uint8_t high = 0xBF;
    if (first >= 0xC2 && first <= 0xDF) {
        length = 2;
    } else if (first >= 0xE0 && first <= 0xEF) {
        length = 3;
        if (first == 0xE0)
            low = 0xA0; // overlong below
        if (first == 0xED)
            high = 0x9F; // surrogates above
    } else if (first >= 0xF0 && first <= 0xF4) {
        length = 4;
        if (first == 0xF0)
            low = 0x90; // overlong below
        if (first == 0xF4)
            high = 0x8F; // beyond U+10FFFF above
    } else {
        return {1, false};
    }
    for (std::size_t i = 1; i < length; ++i) {
        if (position + i >= text.size() || byte_at(text, position + i) < low || byte_at(text, position + i) > high)
            return {i, false};
        low = 0x80;
        high = 0xBF;
    }
    return {length, true};
}

/// The first byte at or after @p position that may not be ASCII: most text is, and eight bytes are looked at together.
std::size_t skip_ascii(std::string_view text, std::size_t position)
{
    while (position + sizeof(std::uint64_t) <= text.size()) {
        std::uint64_t bytes = 0;
        std::memcpy(&bytes, text.data() + position, sizeof bytes);
        if ((bytes & 0x8080808080808080u) != 0)
            break;
        position += sizeof bytes;
    }
    while (position < text.size() && byte_at(text, position) < 0x80)
        ++position;
    return position;
}

/// str.isspace() of Python: bidirectional type WS, B or S, or category Zs.
bool is_python_space(char32_t c)
{
    return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool is_continuation(std::uint8_t byte)
{
    return (byte & 0xC0) == 0x80;
}

} // namespace

std::optional<std::size_t> find_invalid_utf8(std::string_view text)
{
    for (std::size_t position = 0; position < text.size();) {
        position = skip_ascii(text, position);
        if (position == text.size())
            break;
        const Sequence sequence = read_sequence(text, position);
        if (!sequence.well_formed)
            return position;
        position += sequence.bytes;
    }
    return std::nullopt;
}

std::string replace_invalid_utf8(std::string_view text)
{
    std::string out;
    out.reserve(text.size());
    for (std::size_t position = 0; position < text.size();) {
        const Sequence sequence = read_sequence(text, position);
        if (sequence.well_formed)
            out.append(text.substr(position, sequence.bytes));
        else
            out.append("\xEF\xBF\xBD");
        position += sequence.bytes;
    }
    return out;
}

std::string_view strip_whitespace(std::string_view text)
{
    std::size_t begin = 0;
    while (begin < text.size()) {
        const Sequence sequence = read_sequence(text, begin);
        std::size_t next = begin;
        if (!sequence.well_formed || !is_python_space(next_code_point(text, next)))
            break;
        begin = next;
    }
    std::size_t end = text.size();
    while (end > begin) {
        std::size_t start = end - 1;
        while (start > begin && end - start < 4 && is_continuation(byte_at(text, start)))
            --start;
        const Sequence sequence = read_sequence(text, start);
        std::size_t next = start;
        if (!sequence.well_formed || start + sequence.bytes != end || !is_python_space(next_code_point(text, next)))
            break;
        end = start;
    }
    return text.substr(begin, end - begin);
}

void append_utf8(std::string& out, char32_t code_point)
{
    const auto c = static_cast<std::uint32_t>(code_point);
    const auto tail = [&](int shift) { out.push_back(static_cast<char>(0x80 | ((c >> shift) & 0x3F))); };
    if (c < 0x80) {
        out.push_back(static_cast<char>(c));
    } else if (c < 0x800) {
        out.push_back(static_cast<char>(0xC0 | (c >> 6)));
        tail(0);
    } else if (c < 0x10000) {
        out.push_back(static_cast<char>(0xE0 | (c >> 12)));
        tail(6);
        tail(0);
    } else {
        out.push_back(static_cast<char>(0xF0 | (c >> 18)));
        tail(12);
        tail(6);
        tail(0);
    }
}

char32_t next_code_point(std::string_view text, std::size_t& position)
{
    const std::uint8_t first = byte_at(text, position++);
    if (first < 0x80)
        return first;
    const int extra = first < 0xE0 ? 1 : first < 0xF0 ? 2 : 3;
    std::uint32_t c = first & (0x3Fu >> extra);
    for (int i = 0; i < extra && position < text.size(); ++i)
        c = (c << 6) | (byte_at(text, position++) & 0x3Fu);
    return static_cast<char32_t>(c);
}

} // namespace selm
