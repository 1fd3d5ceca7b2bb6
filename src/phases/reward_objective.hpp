#pragma once

#include <memory>

#include "selm/comm/communicator.hpp"
#include "selm/phases/train.hpp"
#include "training_objective.hpp"

namespace selm {

/// Bradley-Terry (Eq. 3.2) on the chosen and rejected answers of prefs.h5: all weights of the sequence classifier, or
/// its head alone (the decoder's output is then computed once). Collective.
std::unique_ptr<TrainingObjective> make_reward_objective(const TrainOptions& options, Communicator& comm);

/// [begin, end) of "A:B" within [0, rows); empty: all. @throws Error usage.
struct RowRange {
    std::int64_t begin = 0, end = 0;
    static RowRange parse(const std::string& text, std::int64_t rows);
};

} // namespace selm
