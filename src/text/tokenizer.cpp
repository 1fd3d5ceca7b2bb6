#include "selm/text/tokenizer.hpp"

#include <filesystem>
#include <mutex>
#include <utility>

#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/text/utf8.hpp"
#include "tokenizer_reader.hpp"
#include "tokenizer_sentencepiece.hpp"
#include "tokenizer_settings.hpp"

namespace selm {
namespace {

/// Everything that one call of encode() writes to.
struct Scratch {
    text::PreTokenizerScratch pre_tokenizer;
    text::BpeScratch model;
    text::Words words;
    std::vector<text::Stretch> stretches;
    std::vector<text::Stretch> inner_stretches;
    std::string normalized;
};

/// Lends scratch memory to calls, so that their caches live on and threads do not share one.
class ScratchPool {
  public:
    std::unique_ptr<Scratch> take()
    {
        const std::lock_guard lock(mutex_);
        if (free_.empty())
            return std::make_unique<Scratch>();
        std::unique_ptr<Scratch> scratch = std::move(free_.back());
        free_.pop_back();
        return scratch;
    }
    void give_back(std::unique_ptr<Scratch> scratch)
    {
        const std::lock_guard lock(mutex_);
        free_.push_back(std::move(scratch));
    }

  private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<Scratch>> free_;
};

/// An added token's text as `tokenizers` looks for it and decodes it: normalised where it is looked for in such a text.
std::string wanted_text(const text::TokenizerParts& parts, const text::AddedToken& token)
{
    std::string content = token.content;
    if (token.normalized && parts.normalizer) {
        text::MatchScratch scratch;
        parts.normalizer->apply(content, scratch);
    }
    return content;
}

/// The added tokens that are looked for in the text as it is, or those looked for in the normalised text.
std::vector<text::AddedToken> tokens_where(const text::TokenizerParts& parts, bool normalized)
{
    std::vector<text::AddedToken> chosen;
    for (text::AddedToken token : parts.added_tokens) {
        token.content = wanted_text(parts, token);
        if (token.normalized == normalized && !token.content.empty())
            chosen.push_back(std::move(token));
    }
    return chosen;
}

} // namespace

struct Tokenizer::Data {
    explicit Data(text::TokenizerParts given)
        : parts(std::move(given)), plain_finder(tokens_where(parts, false)),
          normalized_finder(tokens_where(parts, true))
    {
        for (const auto& [token, id] : parts.model->vocabulary())
            put(id, token);
        special.resize(texts.size(), false);
        for (const text::AddedToken& token : parts.added_tokens) {
            put(token.id, wanted_text(parts, token));
            added_ids.emplace(token.content, token.id);
            special.resize(texts.size(), false);
            special[static_cast<std::size_t>(token.id)] = token.special;
        }
    }

    std::optional<std::int32_t> find(std::string_view token) const
    {
        if (const auto added = added_ids.find(token); added != added_ids.end())
            return added->second;
        const auto& vocabulary = parts.model->vocabulary();
        const auto found = vocabulary.find(token);
        return found != vocabulary.end() ? std::optional(found->second) : std::nullopt;
    }

    /// BOS or EOS: the token that a file beside the tokenizer names, else the id that config.json has.
    std::optional<std::int32_t> find_special(const std::optional<std::string>& token, std::optional<std::int32_t> id,
                                             const char* what) const
    {
        if (!token)
            return id;
        if (const std::optional<std::int32_t> found = find(*token))
            return found;
        throw config_error(cat("the ", what, " \"", *token,
                               "\" of tokenizer_config.json or special_tokens_map.json is not in the tokenizer's "
                               "vocabulary (the model has no embedding for it)"));
    }

    void apply(const text::TokenizerSettings& settings)
    {
        bos = find_special(settings.bos_token, parts.bos ? parts.bos : settings.bos_id, "bos_token");
        eos = find_special(settings.eos_token, parts.eos ? parts.eos : settings.eos_id, "eos_token");
        if (!parts.frame_is_default)
            return;
        parts.frame = {};
        if (bos && settings.add_bos_token.value_or(true))
            parts.frame.before.push_back(*bos);
        if (eos && settings.add_eos_token.value_or(false))
            parts.frame.after.push_back(*eos);
    }

    void put(std::int32_t id, const std::string& token)
    {
        if (texts.size() <= static_cast<std::size_t>(id))
            texts.resize(static_cast<std::size_t>(id) + 1);
        texts[static_cast<std::size_t>(id)] = token;
    }

    /// @p words.text is set and not empty.
    void encode_words(text::Words& words, Scratch& scratch, std::vector<std::int32_t>& ids) const
    {
        words.ranges.assign(1, {0, words.text.size()});
        if (parts.pre_tokenizer)
            parts.pre_tokenizer->apply(words, scratch.pre_tokenizer);
        for (const text::Words::Range& range : words.ranges)
            parts.model->encode_word(words.word(range), ids, scratch.model);
    }

    void encode(std::string_view text, bool skip_special, Scratch& scratch, std::vector<std::int32_t>& ids) const
    {
        scratch.stretches.clear();
        plain_finder.split(text, skip_special, scratch.stretches, scratch.pre_tokenizer.match);
        for (const text::Stretch& outer : scratch.stretches) {
            if (outer.id >= 0) {
                ids.push_back(outer.id);
                continue;
            }
            std::string_view part = text.substr(outer.begin, outer.end - outer.begin);
            if (parts.normalizer) {
                scratch.normalized.assign(part);
                parts.normalizer->apply(scratch.normalized, scratch.pre_tokenizer.match);
                part = scratch.normalized;
            }
            scratch.inner_stretches.clear();
            normalized_finder.split(part, skip_special, scratch.inner_stretches, scratch.pre_tokenizer.match);
            for (const text::Stretch& inner : scratch.inner_stretches) {
                if (inner.id >= 0) {
                    ids.push_back(inner.id);
                    continue;
                }
                scratch.words.at_start = outer.begin == 0 && inner.begin == 0;
                scratch.words.text.assign(part.substr(inner.begin, inner.end - inner.begin));
                encode_words(scratch.words, scratch, ids);
            }
        }
    }

    text::TokenizerParts parts;
    text::AddedTokenFinder plain_finder;
    text::AddedTokenFinder normalized_finder;
    text::StringMap<std::int32_t> added_ids;
    std::vector<std::optional<std::string>> texts; ///< by id
    std::vector<bool> special;                     ///< by id
    std::optional<std::int32_t> bos;
    std::optional<std::int32_t> eos;
    mutable ScratchPool pool;
};

Tokenizer::Tokenizer(std::unique_ptr<const Data> data) : data_(std::move(data)) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

Tokenizer Tokenizer::from_directory(const std::string& directory)
{
    const std::string json = directory + "/tokenizer.json";
    const std::string model = directory + "/tokenizer.model";
    const text::TokenizerSettings settings = text::read_tokenizer_settings(directory);
    text::TokenizerParts parts;
    if (std::filesystem::exists(json))
        parts = text::read_tokenizer_json(read_file(json), json);
    else if (std::filesystem::exists(model))
        parts = text::read_sentencepiece_model_file(model, settings.legacy.value_or(true));
    else
        throw config_error(cat("neither ", json, " nor ", model,
                               " exists (texts cannot be tokenised). A model directory needs one of them"));
    return with_context(directory, [&] {
        text::add_tokens(parts, settings.added_tokens);
        auto data = std::make_unique<Data>(std::move(parts));
        data->apply(settings);
        return Tokenizer(std::move(data));
    });
}

Tokenizer Tokenizer::from_json(std::string_view json, const std::string& name)
{
    return Tokenizer(std::make_unique<const Data>(text::read_tokenizer_json(json, name)));
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, SpecialText special) const
{
    std::string repaired;
    if (find_invalid_utf8(text)) {
        repaired = replace_invalid_utf8(text);
        text = repaired;
    }
    std::vector<std::int32_t> ids;
    std::unique_ptr<Scratch> scratch = data_->pool.take(); // after an exception it is not given back: no harm
    data_->encode(text, special == SpecialText::literal, *scratch, ids);
    data_->pool.give_back(std::move(scratch));
    return ids;
}

std::vector<std::int32_t> Tokenizer::encode_with_special_tokens(std::string_view text) const
{
    std::vector<std::int32_t> ids = data_->parts.frame.before;
    const std::vector<std::int32_t> inner = encode(text);
    ids.insert(ids.end(), inner.begin(), inner.end());
    ids.insert(ids.end(), data_->parts.frame.after.begin(), data_->parts.frame.after.end());
    return ids;
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids, SpecialTokens special) const
{
    std::vector<std::string> tokens;
    tokens.reserve(ids.size());
    for (const std::int32_t id : ids) {
        const auto index = static_cast<std::size_t>(id);
        if (id >= 0 && index < data_->texts.size() && data_->texts[index] &&
            (special == SpecialTokens::keep || !data_->special[index]))
            tokens.push_back(*data_->texts[index]);
    }
    return data_->parts.decoder->decode(std::move(tokens));
}

std::optional<std::int32_t> Tokenizer::token_id(std::string_view token) const
{
    return data_->find(token);
}

std::optional<std::string> Tokenizer::token_text(std::int32_t id) const
{
    const auto index = static_cast<std::size_t>(id);
    return id >= 0 && index < data_->texts.size() ? data_->texts[index] : std::nullopt;
}

std::int64_t Tokenizer::vocabulary_size() const
{
    return static_cast<std::int64_t>(data_->texts.size());
}

bool Tokenizer::is_special(std::int32_t id) const
{
    const auto index = static_cast<std::size_t>(id);
    return id >= 0 && index < data_->special.size() && data_->special[index];
}

std::optional<std::int32_t> Tokenizer::bos_id() const
{
    return data_->bos;
}

std::optional<std::int32_t> Tokenizer::eos_id() const
{
    return data_->eos;
}

} // namespace selm
