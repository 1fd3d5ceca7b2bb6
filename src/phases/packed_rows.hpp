#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "selm/base/options.hpp"
#include "selm/data/iteration.hpp"
#include "selm/data/preferences.hpp"
#include "selm/model/decoder_config.hpp"
#include "selm/model/packed.hpp"
#include "selm/text/encoding.hpp"

namespace selm {

/// A row as one packed pass computes it: the prompt once, each distinct answer once.
struct PackedRow {
    std::int64_t position = 0; ///< index in the file it came from
    std::vector<std::int32_t> trunk;
    std::vector<Branch> branches;
    std::array<std::int32_t, candidates_per_row> branch_of{-1, -1, -1}; ///< by Candidate; -1: not computed

    std::int64_t tokens() const; ///< cost of the row
};

/// Which answers of a row are computed, by Candidate.
using WantedCandidates = std::array<bool, candidates_per_row>;
WantedCandidates wanted_candidates(std::int32_t best, std::int32_t worst, bool generated);

/// Joins candidates with equal tokens into one branch.
PackedRow pack_row(std::int64_t position, EncodedRow encoded, const WantedCandidates& wanted);

/// Cuts [0, costs.size()) into consecutive groups of at most `budget` cost; an item above the budget is alone.
/// @return ends of the groups, ascending; the last is costs.size() (none when there are no items).
std::vector<std::size_t> microbatch_ends(std::span<const std::int64_t> costs, std::int64_t budget);

/**
 * @brief Deals the rows of one global batch to ranks by their cost: largest first to the least loaded rank (ties: lower
 * row index, lower rank). A function of the costs and the number of ranks alone.
 * @return rows of each rank, ascending.
 */
std::vector<std::vector<std::size_t>> balance_rows(std::span<const std::int64_t> costs, int ranks);

/// Tokenizer, chat format and limits of a model directory: turns rows of the data files into packed rows.
class RowEncoder {
  public:
    /// @throws Error configuration: no tokenizer, an unknown format, vocabulary or lengths that the model cannot hold,
    /// an encoding that is not built.
    RowEncoder(const std::string& directory, const EncodingOptions& options, const DecoderConfig& config);
    const std::string& format_name() const { return format_name_; }
    PackedRow encode(const IterationReader& reader, std::int64_t position, const WantedCandidates& wanted) const;
    PackedRow encode(const PreferenceRow& row) const; ///< chosen and rejected
    /// Estimate without reading text, for hand-out.
    static std::int64_t bytes(const IterationReader& reader, std::int64_t position, const WantedCandidates& wanted);

  private:
    EncodedRow encode_texts(std::span<const Message> messages,
                            const std::array<std::optional<std::string_view>, candidates_per_row>& answers) const;
    Tokenizer tokenizer_;
    ChatFormat format_;
    EncodingLimits limits_;
    std::string format_name_;
};

} // namespace selm
