#include "selm/text/unigram_tokenizer.hpp"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/text/utf8.hpp"
#include "unigram_reader.hpp"

namespace selm {
namespace {

constexpr std::string_view space_mark = "\u2581";

struct Scratch {
    text::MatchScratch match;
    text::UnigramModel::Scratch model;
};

std::vector<text::AddedToken> tokens_where(const std::vector<text::AddedToken>& tokens, bool normalized)
{
    std::vector<text::AddedToken> chosen;
    std::copy_if(tokens.begin(), tokens.end(), std::back_inserter(chosen),
                 [&](const text::AddedToken& token) { return token.normalized == normalized; });
    return chosen;
}

std::optional<std::int32_t> id_in(const text::UnigramParts& parts, std::string_view token)
{
    for (const text::AddedToken& added : parts.added_tokens)
        if (added.content == token)
            return added.id;
    return parts.model->find(token);
}

std::int64_t size_of(const text::UnigramParts& parts)
{
    std::int64_t size = parts.model->size();
    for (const text::AddedToken& added : parts.added_tokens)
        size = std::max<std::int64_t>(size, added.id + 1);
    return size;
}

/// Do the ids of added_tokens.json fit those of tokenizer.json? Two files of one model that disagree would be read
/// differently by different programs.
void check_added_tokens(const text::UnigramParts& parts, const std::string& path)
{
    for (const text::AddedToken& token : text::read_added_tokens_json(read_file(path))) {
        const auto same = [&](const text::AddedToken& other) {
            return other.content == token.content && other.id == token.id;
        };
        SELM_VALIDATE(std::any_of(parts.added_tokens.begin(), parts.added_tokens.end(), same), ExitCode::configuration,
                      path << " has the token \"" << token.content << "\" with id " << token.id
                           << ", tokenizer.json beside it does not (they do not belong together). Use the files that "
                              "came with the weights");
    }
}

} // namespace

struct UnigramTokenizer::Data {
    explicit Data(text::UnigramParts given)
        : parts(std::move(given)), plain_finder(tokens_where(parts.added_tokens, false)),
          normalized_finder(normalized_tokens())
    {
    }

    /// Tokens that are looked for in normalised text are normalised themselves.
    std::vector<text::AddedToken> normalized_tokens() const
    {
        std::vector<text::AddedToken> tokens = tokens_where(parts.added_tokens, true);
        Scratch scratch;
        for (text::AddedToken& token : tokens)
            token.content = normalize(token.content, scratch);
        std::erase_if(tokens, [](const text::AddedToken& token) { return token.content.empty(); });
        return tokens;
    }

    std::string normalize(std::string_view text, Scratch& scratch) const
    {
        std::string out(text);
        for (const auto& step : parts.normalizers)
            step->apply(out, scratch.match);
        return out;
    }

    /// A stretch of normalised text without added tokens.
    void encode_stretch(std::string_view text, Scratch& scratch, std::vector<std::int32_t>& out) const
    {
        std::string marked;
        if (parts.prefix_space && !text.empty() && text.front() != ' ' && !text.starts_with(space_mark))
            marked = space_mark;
        for (const char c : text)
            c == ' ' ? marked += space_mark : marked += c;
        for (std::size_t begin = 0; begin < marked.size();) {
            std::size_t end = parts.split_at_spaces ? marked.find(space_mark, begin + 1) : marked.size();
            end = std::min(end, marked.size());
            parts.model->encode(std::string_view(marked).substr(begin, end - begin), scratch.model, out);
            begin = end;
        }
    }

    text::UnigramParts parts;
    text::AddedTokenFinder plain_finder, normalized_finder;
};

UnigramTokenizer::UnigramTokenizer(std::unique_ptr<const Data> data) : data_(std::move(data)) {}
UnigramTokenizer::~UnigramTokenizer() = default;
UnigramTokenizer::UnigramTokenizer(UnigramTokenizer&&) noexcept = default;
UnigramTokenizer& UnigramTokenizer::operator=(UnigramTokenizer&&) noexcept = default;

UnigramTokenizer UnigramTokenizer::from_directory(const std::string& directory, std::span<const std::string> more)
{
    const std::string json = directory + "/tokenizer.json", model = directory + "/spm.model",
                      added = directory + "/added_tokens.json";
    const bool has_added = std::filesystem::exists(added);
    text::UnigramParts parts;
    if (std::filesystem::exists(json)) {
        parts = with_context(json, [&] { return text::read_unigram_json(read_file(json)); });
        if (has_added)
            with_context(directory, [&] { check_added_tokens(parts, added); });
    } else {
        SELM_VALIDATE(std::filesystem::exists(model), ExitCode::configuration,
                      directory << " has neither tokenizer.json nor spm.model (its texts cannot be tokenised). Use a "
                                   "complete model directory");
        const std::string tokens = has_added ? read_file(added) : std::string();
        parts = with_context(model, [&] { return text::read_sentencepiece_model(read_file(model), tokens); });
    }
    for (const std::string& token : more)
        if (!id_in(parts, token))
            parts.added_tokens.push_back({.id = static_cast<std::int32_t>(size_of(parts)), .content = token});
    return UnigramTokenizer(std::make_unique<const Data>(std::move(parts)));
}

std::vector<std::int32_t> UnigramTokenizer::encode(std::string_view text) const
{
    const std::string well_formed = replace_invalid_utf8(text);
    std::vector<std::int32_t> ids;
    std::vector<text::Stretch> stretches, inner;
    Scratch scratch;
    data_->plain_finder.split(well_formed, false, stretches, scratch.match);
    for (const text::Stretch& stretch : stretches) {
        if (stretch.id >= 0) {
            ids.push_back(stretch.id);
            continue;
        }
        const std::string normal =
            data_->normalize(std::string_view(well_formed).substr(stretch.begin, stretch.end - stretch.begin), scratch);
        inner.clear();
        data_->normalized_finder.split(normal, false, inner, scratch.match);
        for (const text::Stretch& part : inner)
            if (part.id >= 0)
                ids.push_back(part.id);
            else
                data_->encode_stretch(std::string_view(normal).substr(part.begin, part.end - part.begin), scratch, ids);
    }
    return ids;
}

std::optional<std::int32_t> UnigramTokenizer::token_id(std::string_view token) const
{
    return id_in(data_->parts, token);
}

std::int64_t UnigramTokenizer::vocabulary_size() const
{
    return size_of(data_->parts);
}

} // namespace selm
