#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "selm/comm/communicator.hpp"
#include "selm/phases/train.hpp"
#include "training_objective.hpp"

namespace selm {

/// The SELM loss (Eq. 4.2; alpha 0: DPO) over the rows of an iteration file, with stored reference log-probs.
struct SelmObjectiveParts {
    std::unique_ptr<TrainingObjective> objective;
    std::int64_t iteration = 1;
    double alpha = 0, beta = 0, learning_rate = 0; ///< of this iteration
};

/// Opens everything and checks that the log-probs were made with this model, these pairs and this encoding. Collective.
/// @throws Error bad_data saying which attribute differs; as the readers otherwise.
SelmObjectiveParts make_selm_objective(const TrainOptions& options, Communicator& comm);

/// Value of a list by iteration (1-based): the last value repeats.
double by_iteration(const std::vector<double>& values, std::int64_t iteration);

/// cost(row) of all rows [0, rows), the same on every rank: rank r evaluates rows r, r + np, ... Collective.
std::vector<RowCost> gather_costs(std::int64_t rows, Communicator& comm, const std::function<RowCost(std::int64_t)>& cost);

} // namespace selm
