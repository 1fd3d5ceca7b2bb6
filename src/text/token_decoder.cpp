#include "token_decoder.hpp"

#include <charconv>
#include <optional>

#include "byte_alphabet.hpp"
#include "selm/text/utf8.hpp"

namespace selm::text {
namespace {

/// The byte that a token "<0xE4>" stands for.
std::optional<char> byte_of(std::string_view token)
{
    if (token.size() != 6 || !token.starts_with("<0x") || token.back() != '>')
        return std::nullopt;
    unsigned value = 0;
    const char* end = token.data() + 5;
    const auto [stop, error] = std::from_chars(token.data() + 3, end, value, 16);
    return error == std::errc() && stop == end ? std::optional(static_cast<char>(value)) : std::nullopt;
}

std::string concatenate(const std::vector<std::string>& tokens)
{
    std::string text;
    for (const std::string& token : tokens)
        text += token;
    return text;
}

} // namespace

std::string TokenDecoder::decode(std::vector<std::string> tokens) const
{
    apply(tokens);
    return concatenate(tokens);
}

void ByteLevelDecoder::apply(std::vector<std::string>& tokens) const
{
    const ByteAlphabet& alphabet = ByteAlphabet::instance();
    std::string bytes;
    for (const std::string& token : tokens) {
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
    tokens.assign(1, replace_invalid_utf8(bytes));
}

void SpaceJoinDecoder::apply(std::vector<std::string>& tokens) const
{
    for (std::size_t i = 1; i < tokens.size(); ++i)
        tokens[i].insert(0, 1, ' ');
}

void ByteFallbackDecoder::apply(std::vector<std::string>& tokens) const
{
    std::vector<std::string> out;
    std::string bytes;
    const auto end_run = [&] {
        if (!bytes.empty() && find_invalid_utf8(bytes))
            out.insert(out.end(), bytes.size(), "\xEF\xBF\xBD");
        else if (!bytes.empty())
            out.push_back(bytes);
        bytes.clear();
    };
    for (std::string& token : tokens) {
        if (const std::optional<char> byte = byte_of(token)) {
            bytes.push_back(*byte);
            continue;
        }
        end_run();
        out.push_back(std::move(token));
    }
    end_run();
    tokens.swap(out);
}

void FuseDecoder::apply(std::vector<std::string>& tokens) const
{
    tokens.assign(1, concatenate(tokens));
}

void ReplaceDecoder::apply(std::vector<std::string>& tokens) const
{
    MatchScratch scratch;
    for (std::string& token : tokens)
        replacer_.apply(token, scratch);
}

void StripDecoder::apply(std::vector<std::string>& tokens) const
{
    for (std::string& token : tokens) {
        std::string_view rest = token;
        for (std::size_t i = 0; i < left_ && rest.starts_with(character_); ++i)
            rest.remove_prefix(character_.size());
        for (std::size_t i = 0; i < right_ && rest.ends_with(character_); ++i)
            rest.remove_suffix(character_.size());
        token = std::string(rest);
    }
}

void MetaspaceDecoder::apply(std::vector<std::string>& tokens) const
{
    const Replacer space(replacement_, " ");
    const Replacer nothing(replacement_, "");
    MatchScratch scratch;
    for (std::size_t i = 0; i < tokens.size(); ++i)
        (i == 0 && has_prefix_ ? nothing : space).apply(tokens[i], scratch);
}

void SequenceDecoder::apply(std::vector<std::string>& tokens) const
{
    for (const auto& step : steps_)
        step->apply(tokens);
}

} // namespace selm::text
