#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>

#include "selm/base/conversation.hpp"

namespace selm {

enum class UpdateRule { best_worst, replace, offline };
UpdateRule parse_update_rule(const std::string& word); ///< best-worst | replace | offline; @throws Error usage

struct PairChoice {
    std::int32_t best = 0, worst = 0; ///< candidate index (generated 0, chosen 1, rejected 2)
};

/// best = argmax, worst = argmin of the scores, first index on ties; a candidate that does not exist has score NaN and
/// is never picked. replace: (generated, rejected) if generated beats chosen, else (chosen, generated). offline:
/// (chosen, rejected).
PairChoice choose_pair(const std::array<double, 3>& scores, UpdateRule rule);

/// rank_i = 1 + number of strictly better scores; ties share the better rank; NaN (no such candidate) ranks 0.
std::array<std::int32_t, 3> ranks_of(const std::array<double, 3>& scores);

} // namespace selm
