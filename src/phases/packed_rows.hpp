#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "selm/base/error.hpp"
#include "selm/base/options.hpp"
#include "selm/data/iteration.hpp"
#include "selm/data/preferences.hpp"
#include "selm/model/decoder_config.hpp"
#include "selm/model/packed.hpp"
#include "selm/text/encoding.hpp"
#include "selm/text/recipe_encoding.hpp"

namespace selm {

/// A row as one packed pass computes it: what the prompts have in common once (the trunk), each distinct answer once,
/// with what only its own prompt has before it as unscored tokens.
struct PackedRow {
    std::int64_t position = 0; ///< index in the file it came from
    std::vector<std::int32_t> trunk;
    std::vector<Branch> branches;
    std::array<std::int32_t, candidates_per_row> branch_of{-1, -1, -1}; ///< by Candidate; -1: not computed

    std::int64_t tokens() const;
    std::int64_t scored_tokens() const;
    /// Pairs of a query and a key that it sees, in all segments.
    std::int64_t attention_pairs() const;
    std::int64_t scored_tokens(std::size_t branch) const
    {
        return static_cast<std::int64_t>(branches[branch].tokens.size()) - branches[branch].unscored;
    }
};

/// What computing the row costs, in thousands of multiply-adds: with backward the forward pass, the gradients of inputs and
/// weights, and the head's logits once more.
std::int64_t work_of(const PackedRow& row, const DecoderConfig& config, bool with_backward);

/// Which answers of a row are computed, by Candidate.
using WantedCandidates = std::array<bool, candidates_per_row>;

/// The pair of a row, and whether its generated answer is computed too.
struct RowPair {
    std::int32_t best = 1, worst = 2;
    bool generated = false;

    WantedCandidates wanted() const;
};

/// Joins candidates with equal tokens into one branch. The trunk is what the prompts of all sequences, wanted or not,
/// have in common, so that it is the same whichever of them are computed.
PackedRow pack_row(std::int64_t position, const SequenceRow& sequences, const WantedCandidates& wanted);

/**
 * @brief Groups of items of at most `budget` cost; an item above the budget is alone. As few groups as first-fit decreasing
 * finds, of costs as even as longest-first makes them: ranks with as much work then begin their last passes, behind which
 * gradients are reduced, at about the same time. A function of the costs and the budget alone.
 * @return indices of each group, ascending; groups of the largest cost first (none when there are no items).
 */
std::vector<std::vector<std::size_t>> microbatches(std::span<const std::int64_t> costs, std::int64_t budget);

/**
 * @brief Deals the rows of one global batch to ranks by their cost: largest first to the least loaded rank (ties: lower
 * row index, lower rank); then rows leave the most loaded rank, or change places with smaller ones, as long as that
 * lowers the larger of two loads. A function of the costs and the number of ranks alone.
 * @return rows of each rank, ascending.
 */
std::vector<std::vector<std::size_t>> balance_rows(std::span<const std::int64_t> costs, int ranks);

/// Tokenizer, chat format, encoding and limits of a model directory: turns rows of the data files into packed rows.
class RowEncoder {
  public:
    /// @throws Error configuration: no tokenizer, an unknown format, BOS or EOS, vocabulary or lengths that the model
    /// cannot hold.
    RowEncoder(const std::string& directory, const EncodingOptions& options, const DecoderConfig& config);
    /// From tokenizer files alone: sequences may be of any length.
    RowEncoder(const std::string& directory, const EncodingOptions& options);

    const std::string& format_name() const { return format_name_; }
    const Tokenizer& tokenizer() const { return tokenizer_; }
    /// What the encoding depends on besides its name, the format and the limits: with recipe bos_id (-1: none), eos_id
    /// and on_long_row.
    h5::Attributes attributes() const;

    /// The pair's answers; with recipe also a generated answer that is not wanted.
    SequenceRow sequences(const IterationReader& reader, std::int64_t position, const RowPair& pair) const;
    SequenceRow sequences(const PreferenceRow& row) const; ///< chosen and rejected, as best and worst

    /// The sequences of the pair's answers, packed. @throws Error bad_data naming the row: one of them is longer than
    /// the model's context (recipe; with on-long-row = cap it is cut instead), or the recipe's rules do not hold.
    PackedRow encode(const IterationReader& reader, std::int64_t position, const RowPair& pair) const;
    PackedRow encode(const PreferenceRow& row) const;

    /// Looks for rows that are too long, before work is done: with on-long-row = stop an error that counts them and
    /// names the first, with cap a warning. Collective.
    void check_lengths(const IterationReader& reader, const std::function<RowPair(std::int64_t)>& pair_of,
                       Communicator& comm) const;

    /// Estimate without reading text, for hand-out.
    static std::int64_t bytes(const IterationReader& reader, std::int64_t position, const RowPair& pair);

  private:
    using Texts = std::array<std::optional<std::string_view>, candidates_per_row>;
    SequenceRow encode_texts(std::span<const Message> messages, const Texts& answers, const RowPair& pair) const;
    bool too_long(const SequenceRow& sequences, const WantedCandidates& wanted) const;
    Error long_row(const IterationReader& reader, std::int64_t position, std::int64_t rows) const;

    Tokenizer tokenizer_;
    ChatFormat format_;
    EncodingLimits limits_;
    std::string format_name_;
    std::optional<RecipeIds> recipe_; ///< nothing: chat
    bool cap_ = false;
    std::int64_t context_;
    std::string context_text_;
};

} // namespace selm
