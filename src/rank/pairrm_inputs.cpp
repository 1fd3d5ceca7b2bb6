#include "selm/rank/pairrm_inputs.hpp"

#include <algorithm>
#include <limits>

#include <nlohmann/json.hpp>

#include "selm/base/error.hpp"
#include "selm/base/files.hpp"

namespace selm {
namespace {

constexpr std::string_view source_text = "<|source|>", candidate1_text = "<|candidate1|>",
                           candidate2_text = "<|candidate2|>", candidate_text = "<|candidate|>",
                           separator_text = "[SEP]";
constexpr std::int64_t shortest = 4; ///< [CLS], prefix, one token, [SEP]

std::string without_separators(std::string_view text)
{
    std::string out;
    std::size_t done = 0;
    for (std::size_t found; (found = text.find(separator_text, done)) != std::string_view::npos;
         done = found + separator_text.size())
        out.append(text.substr(done, found - done)) += ' ';
    return out.append(text.substr(done));
}

} // namespace

const std::vector<std::string> pair_prefix_tokens = {std::string(source_text), std::string(candidate1_text),
                                                     std::string(candidate2_text), std::string(candidate_text)};

PairRankMode parse_pair_rank_mode(const std::string& word)
{
    if (word == "per-row")
        return PairRankMode::per_row;
    if (word == "blender")
        return PairRankMode::blender;
    throw usage_error(cat("--rank-mode is '", word, "'. Use per-row or blender"));
}

PairLimits PairLimits::from_directory(const std::string& directory)
{
    const std::string path = directory + "/config.json";
    const auto json = nlohmann::json::parse(read_file(path), nullptr, false);
    SELM_VALIDATE(json.is_object(), ExitCode::configuration,
                  path << " is not a JSON object (the model cannot be read). Use the original file");
    PairLimits limits;
    const auto read = [&](const char* key, std::int64_t& value) {
        const auto found = json.find(key);
        if (found == json.end() || found->is_null())
            return;
        SELM_VALIDATE(found->is_number_integer(), ExitCode::configuration,
                      path << ": " << key << " is not a whole number");
        value = found->get<std::int64_t>();
    };
    read("source_maxlength", limits.source);
    read("candidate_maxlength", limits.candidate);
    limits.validate(path);
    return limits;
}

void PairLimits::validate(const std::string& where) const
{
    constexpr std::int64_t longest = 1 << 20;
    SELM_VALIDATE(source >= shortest && candidate >= shortest && source <= longest && candidate <= longest,
                  ExitCode::configuration,
                  where << ": lengths of " << source << " and " << candidate
                        << " tokens for source and candidates are out of range (" << shortest << " to " << longest
                        << ")");
}

PairTokens PairTokens::of(const UnigramTokenizer& tokenizer, const DebertaConfig& config, const std::string& directory)
{
    const auto id = [&](std::string_view token, std::int64_t configured) {
        const auto found = tokenizer.token_id(token);
        SELM_VALIDATE(found, ExitCode::configuration,
                      directory << " is no PairRM: its tokenizer has no token \"" << token
                                << "\" (inputs cannot be built). Use the tokenizer files "
                                   "that came with the ranker, added_tokens.json included");
        SELM_VALIDATE(configured < 0 || configured == *found, ExitCode::configuration,
                      directory << ": the tokenizer's id of \"" << token << "\" is " << *found << ", config.json says "
                                << configured
                                << " (they do not belong together). Use the files that came with the ranker");
        SELM_VALIDATE(*found < config.vocabulary, ExitCode::configuration,
                      directory << ": the token \"" << token << "\" has the id " << *found
                                << " but the model's vocabulary is " << config.vocabulary
                                << " (they do not belong together). Use the files that came with the ranker");
        return *found;
    };
    return {.cls = id("[CLS]", -1),
            .sep = id(separator_text, -1),
            .source = id(source_text, config.source_prefix_id),
            .candidate1 = id(candidate1_text, config.candidate1_prefix_id),
            .candidate2 = id(candidate2_text, config.candidate2_prefix_id),
            .candidate = id(candidate_text, config.candidate_prefix_id)};
}

PairEncoder::PairEncoder(const UnigramTokenizer& tokenizer, PairTokens tokens, PairLimits limits, PairRankMode mode)
    : tokenizer_(tokenizer), tokens_(tokens), limits_(limits), mode_(mode)
{
    limits_.validate("PairEncoder");
}

std::vector<std::int32_t> PairEncoder::part(std::string_view prefix_text, std::int32_t prefix, std::string_view text,
                                            std::int64_t length) const
{
    // Prefix and text are one string, as the originals' are. A combining mark at the begin of the text may join the
    // prefix's last character and hide it from the tokenizer: then the text is encoded apart.
    std::vector<std::int32_t> content = tokenizer_.encode(cat(prefix_text, text));
    if (content.empty() || content.front() != prefix) {
        content = tokenizer_.encode(text);
        content.insert(content.begin(), prefix);
    }
    const auto kept = std::min<std::int64_t>(static_cast<std::int64_t>(content.size()), length - 2);
    std::vector<std::int32_t> ids{tokens_.cls};
    ids.insert(ids.end(), content.begin(), content.begin() + kept);
    ids.push_back(tokens_.sep);
    return ids;
}

std::vector<PairEncoder::Row> PairEncoder::encode(std::span<const Texts> rows) const
{
    const bool blender = mode_ == PairRankMode::blender;
    const auto text_of = [&](std::string_view text) { return blender ? without_separators(text) : std::string(text); };
    std::vector<Row> out(rows.size());
    std::int64_t longest = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) {
        out[i].source = part(source_text, tokens_.source, text_of(rows[i].prompt), limits_.source);
        longest = std::max(longest, static_cast<std::int64_t>(out[i].source.size()));
    }
    for (std::size_t i = 0; i < rows.size(); ++i) {
        const auto source = static_cast<std::int64_t>(out[i].source.size());
        const std::int64_t length =
            blender ? limits_.candidate + (limits_.source - longest) / 2 : (limits_.total() - source) / 2;
        for (std::size_t c = 0; c < candidates_per_row; ++c) {
            if (!rows[i].candidates[c])
                continue;
            const std::string text = text_of(*rows[i].candidates[c]);
            auto& ids = out[i].candidates[c];
            ids = blender ? part(candidate_text, tokens_.candidate, text, length)
                          : part(candidate1_text, tokens_.candidate1, text, length);
            (*ids)[1] = tokens_.candidate1; // behind [CLS]
        }
    }
    return out;
}

PairInput PairEncoder::pair(const std::vector<std::int32_t>& source, const std::vector<std::int32_t>& left,
                            const std::vector<std::int32_t>& right) const
{
    PairInput input{.ids = source};
    input.source = 1; // behind [CLS]
    input.left = static_cast<std::int64_t>(source.size()) + 1;
    input.right = input.left + static_cast<std::int64_t>(left.size());
    input.ids.insert(input.ids.end(), left.begin(), left.end());
    input.ids.insert(input.ids.end(), right.begin(), right.end());
    input.ids[static_cast<std::size_t>(input.right)] = tokens_.candidate2;
    return input;
}

std::array<double, candidates_per_row> pair_scores(const PairLogits& logits,
                                                   const std::array<bool, candidates_per_row>& exists)
{
    std::array<double, candidates_per_row> scores;
    scores.fill(std::numeric_limits<double>::quiet_NaN());
    const auto count = static_cast<float>(std::count(exists.begin(), exists.end(), true));
    for (std::size_t i = 0; i < candidates_per_row; ++i) {
        if (!exists[i])
            continue;
        float sum = 0;
        for (std::size_t j = 0; j < candidates_per_row; ++j)
            if (exists[j] && j != i)
                sum += logits[candidates_per_row * i + j] - logits[candidates_per_row * j + i];
        scores[i] = static_cast<double>(sum / count);
    }
    return scores;
}

} // namespace selm
