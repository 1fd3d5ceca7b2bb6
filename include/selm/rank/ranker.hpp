#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "selm/base/conversation.hpp"

namespace selm {

/// What a ranker sees of a row. A candidate that does not exist (no generated answer) is nullopt; an empty text is data.
struct RankRow {
    std::int64_t row = 0;
    std::string id;
    std::string prompt;                ///< the raw prompt string
    std::vector<Message> messages;     ///< the conversation before the answer
    std::array<std::optional<std::string>, candidates_per_row> answers; ///< generated, chosen, rejected
};

/// Higher is better; NaN exactly for candidates that do not exist.
struct RowScores {
    std::array<double, candidates_per_row> scores{};
    /// Pairwise rankers only: logits[3 * i + j] > 0 means i is better than j; diagonal 0; NaN where either does not exist.
    std::optional<std::array<float, candidates_per_row * candidates_per_row>> logits;
};

/**
 * @brief Orders the answers of a row. Pointwise (reward models) and pairwise (PairRM) rankers fit it: a pairwise one fills
 * logits and derives its scores. Does not communicate; rows are independent of each other unless batch_rows() says that
 * truncation depends on blocks of rows in file order.
 */
class Ranker {
  public:
    virtual ~Ranker() = default;
    virtual std::string kind() const = 0;        ///< file | reward | pairrm
    virtual std::string description() const = 0; ///< for provenance
    /// Identity of what was used (weights and their encoding): equal digests give equal scores.
    virtual std::string digest() const = 0;
    /// Rows must be scored in blocks of this many, in file order (1: any order, any grouping).
    virtual std::int64_t batch_rows() const { return 1; }
    /// Estimated cost of a row, for hand-out (longest first).
    virtual double cost(const RankRow& row) const = 0;
    /// @throws Error bad_data naming the row: no score to be had, or a non-finite one.
    virtual std::vector<RowScores> score(std::span<const RankRow> rows) = 0;
    /// Tokens that score() has computed so far on this rank; 0 for rankers without a model.
    virtual std::int64_t computed_tokens() const { return 0; }
};

/// Mean over rankers of each ranker's standardised scores (mean 0, deviation 1 over all existing candidates of all rows);
/// with one ranker its raw scores. rows[ranker][row]. A ranker whose scores are all equal contributes 0.
std::vector<std::array<double, candidates_per_row>>
aggregate_scores(const std::vector<std::vector<std::array<double, candidates_per_row>>>& scores);

/// "KIND:PATH" -> parts. @throws Error usage on another form or an unknown kind.
struct RankerSpec {
    std::string kind, path;
    static RankerSpec parse(const std::string& word);
};

/// Names of the groups under /ranking/rankers: KIND, a second one of a kind KIND_2.
std::vector<std::string> ranker_names(std::span<const RankerSpec> specs);

} // namespace selm
