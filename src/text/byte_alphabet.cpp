#include "byte_alphabet.hpp"

#include <algorithm>

#include "selm/text/utf8.hpp"

namespace selm::text {

const ByteAlphabet& ByteAlphabet::instance()
{
    static const ByteAlphabet alphabet;
    return alphabet;
}

ByteAlphabet::ByteAlphabet()
{
    bytes_.fill(-1);
    char32_t next_stand_in = 256;
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
        const bool printable =
            (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || (byte >= 0xAE && byte <= 0xFF);
        const char32_t code_point = printable ? byte : next_stand_in++;
        std::string symbol;
        append_utf8(symbol, code_point);
        std::copy(symbol.begin(), symbol.end(), symbols_[byte].begin());
        lengths_[byte] = static_cast<std::uint8_t>(symbol.size());
        bytes_[code_point] = static_cast<std::int16_t>(byte);
    }
}

void ByteAlphabet::append(std::string& out, std::string_view bytes) const
{
    for (const char byte : bytes)
        out.append(symbol(static_cast<std::uint8_t>(byte)));
}

} // namespace selm::text
