#include "selm/algo/selection.hpp"

#include <cmath>

#include "selm/base/error.hpp"

namespace selm {

namespace {

constexpr auto generated = static_cast<std::int32_t>(Candidate::generated);
constexpr auto chosen = static_cast<std::int32_t>(Candidate::chosen);
constexpr auto rejected = static_cast<std::int32_t>(Candidate::rejected);

PairChoice best_and_worst(const std::array<double, 3>& scores)
{
    std::int32_t best = -1;
    std::int32_t worst = -1;
    for (std::int32_t i = 0; i < candidates_per_row; ++i) {
        const double score = scores[static_cast<std::size_t>(i)];
        if (std::isnan(score))
            continue;
        if (best < 0 || score > scores[static_cast<std::size_t>(best)])
            best = i;
        if (worst < 0 || score < scores[static_cast<std::size_t>(worst)])
            worst = i;
    }
    SELM_VALIDATE(best >= 0, ExitCode::bad_data,
                  "all three scores of a row are NaN (no answer can be the best one). Check the ranker's scores");
    return {best, worst};
}

PairChoice replace_pair(const std::array<double, 3>& scores)
{
    const double score_generated = scores[0];
    const double score_chosen = scores[1];
    if (std::isnan(score_generated))
        return {chosen, rejected}; // nothing was generated: the row keeps its own pair
    SELM_VALIDATE(
        !std::isnan(score_chosen), ExitCode::bad_data,
        "the chosen answer of a row has no score (the update rule 'replace' compares it with the generated one). "
        "Check the ranker's scores");
    return score_generated > score_chosen ? PairChoice{generated, rejected} : PairChoice{chosen, generated};
}

} // namespace

UpdateRule parse_update_rule(const std::string& word)
{
    if (word == "best-worst")
        return UpdateRule::best_worst;
    if (word == "replace")
        return UpdateRule::replace;
    if (word == "offline")
        return UpdateRule::offline;
    throw usage_error(cat("--update-rule ", word, " is not known. Use one of best-worst|replace|offline"));
}

PairChoice choose_pair(const std::array<double, 3>& scores, UpdateRule rule)
{
    switch (rule) {
    case UpdateRule::best_worst:
        return best_and_worst(scores);
    case UpdateRule::replace:
        return replace_pair(scores);
    case UpdateRule::offline:
        break;
    }
    return {chosen, rejected};
}

std::array<std::int32_t, 3> ranks_of(const std::array<double, 3>& scores)
{
    std::array<std::int32_t, 3> ranks{};
    for (std::size_t i = 0; i < scores.size(); ++i) {
        if (std::isnan(scores[i]))
            continue;
        ranks[i] = 1;
        for (const double other : scores)
            if (other > scores[i])
                ++ranks[i];
    }
    return ranks;
}

} // namespace selm
