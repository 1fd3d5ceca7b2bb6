#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "selm/model/pair_model.hpp"
#include "selm/rank/ranker.hpp"
#include "selm/text/unigram_tokenizer.hpp"

// What PairRM reads (Jiang, Ren & Lin, "LLM-Blender", ACL 2023; LLM-Blender's collator and PairRM-hf's tokenize_pair)
// and what its logits mean.
namespace selm {

/// How long texts are cut.
enum class PairRankMode {
    per_row, ///< as PairRM-hf: by the row alone
    blender  ///< as Blender.rank: by the longest source of the eight rows of the batch
};
PairRankMode parse_pair_rank_mode(const std::string& word); ///< per-row | blender; @throws Error usage

/// Rows of a batch in blender mode, in file order.
inline constexpr std::int64_t blender_batch_rows = 8;

/// Lengths in tokens, [CLS], [SEP] and prefix token included.
struct PairLimits {
    std::int64_t source = 1224;
    std::int64_t candidate = 412;
    std::int64_t total() const { return source + 2 * candidate; }
    /// RankerConfig's source_maxlength and candidate_maxlength where config.json has them. @throws Error configuration.
    static PairLimits from_directory(const std::string& directory);
    void validate(const std::string& where) const; ///< @throws Error configuration
};

/// PairRM's own tokens, in the order in which a tokenizer gets them.
extern const std::vector<std::string> pair_prefix_tokens;

/// Ids of the tokens that inputs are built with.
struct PairTokens {
    std::int32_t cls = 0, sep = 0, source = 0, candidate1 = 0, candidate2 = 0, candidate = 0;
    /// @throws Error configuration naming the token that the tokenizer lacks, or whose id is not the one of
    /// config.json.
    static PairTokens of(const UnigramTokenizer& tokenizer, const DebertaConfig& config, const std::string& directory);
};

/**
 * @brief Turns texts into the sequences that PairModel reads: "[CLS] <|source|> x [SEP] [CLS] <|candidate1|> a [SEP]
 * [CLS]
 * <|candidate2|> b [SEP]". Texts that are too long lose their end; [SEP] stays.
 *
 * per_row: source at most limits.source; each candidate at most (limits.total() - source) / 2, by the row's own source.
 * blender: each candidate at most limits.candidate + (limits.source - longest source of the batch) / 2; a literal
 * "[SEP]" in a text becomes a space. Pooled are the prefix tokens that are put there, not ones that a text holds
 * literally.
 */
class PairEncoder {
  public:
    /// @param tokenizer borrowed
    PairEncoder(const UnigramTokenizer& tokenizer, PairTokens tokens, PairLimits limits, PairRankMode mode);

    /// The parts of a row's inputs, [CLS] and [SEP] included; candidates begin with the left prefix.
    struct Row {
        std::vector<std::int32_t> source;
        std::array<std::optional<std::vector<std::int32_t>>, candidates_per_row> candidates;
    };
    struct Texts {
        std::string_view prompt;
        std::array<std::optional<std::string_view>, candidates_per_row> candidates;
    };

    /// @param rows in blender mode one whole batch, otherwise any rows.
    std::vector<Row> encode(std::span<const Texts> rows) const;

    /// The ordered pair (left, right) of two parts of encode().
    PairInput pair(const std::vector<std::int32_t>& source, const std::vector<std::int32_t>& left,
                   const std::vector<std::int32_t>& right) const;

  private:
    std::vector<std::int32_t> part(std::string_view prefix_text, std::int32_t prefix, std::string_view text,
                                   std::int64_t length) const;

    const UnigramTokenizer& tokenizer_;
    PairTokens tokens_;
    PairLimits limits_;
    PairRankMode mode_;
};

/// logits[3 * i + j] of (i left, j right).
using PairLogits = std::array<float, candidates_per_row * candidates_per_row>;

/**
 * @brief s_i = mean over j of (M_ij - M_ji), over the candidates that exist, i itself (which adds 0) included; in
 * float, as LLM-Blender's "max_logits". NaN for candidates that do not exist.
 */
std::array<double, candidates_per_row> pair_scores(const PairLogits& logits,
                                                   const std::array<bool, candidates_per_row>& exists);

} // namespace selm
