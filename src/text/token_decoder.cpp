#include "token_decoder.hpp"

#include "byte_alphabet.hpp"
#include "selm/text/utf8.hpp"

namespace selm::text {

std::string ByteLevelDecoder::decode(const std::vector<std::string_view>& tokens) const
{
    const ByteAlphabet& alphabet = ByteAlphabet::instance();
    std::string bytes;
    for (const std::string_view token : tokens) {
        const std::size_t before = bytes.size();
        for (std::size_t position = 0; position < token.size();) {
            const int byte = alphabet.byte_of(next_code_point(token, position));
            if (byte < 0) {
                bytes.resize(before);
                bytes.append(token);
                break;
            }
            bytes.push_back(static_cast<char>(byte));
        }
    }
    return replace_invalid_utf8(bytes);
}

std::string SpaceJoinDecoder::decode(const std::vector<std::string_view>& tokens) const
{
    std::string text;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
        if (i > 0)
            text.push_back(' ');
        text.append(tokens[i]);
    }
    return text;
}

} // namespace selm::text
