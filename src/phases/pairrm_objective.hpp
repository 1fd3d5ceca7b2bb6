#pragma once

#include <cstdint>
#include <memory>

#include "selm/comm/communicator.hpp"
#include "selm/phases/train.hpp"
#include "training_objective.hpp"

namespace selm {

/**
 * @brief Pair ranker on the chosen and rejected answers of prefs.h5 (Jiang, Ren & Lin 2023): -log sigmoid(logit) with
 * the chosen answer as the left candidate, -log sigmoid(-logit) with it as the right one. Texts are cut as in per-row
 * ranking; no dropout. A start directory without a head gets a random one. Collective.
 */
std::unique_ptr<TrainingObjective> make_pairrm_objective(const TrainOptions& options, Communicator& comm);

/// Is the chosen answer of this row the left candidate in this epoch? A function of its arguments alone, so that every
/// number of ranks trains on the same pairs.
bool chosen_is_left(std::uint64_t seed, std::int64_t epoch, std::int64_t row);

} // namespace selm
