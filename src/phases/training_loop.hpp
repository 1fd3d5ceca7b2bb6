#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "selm/comm/communicator.hpp"
#include "selm/comm/stop_condition.hpp"
#include "selm/phases/train.hpp"
#include "selm/shard/checkpoint.hpp"
#include "selm/shard/comm_times.hpp"
#include "selm/shard/gradient.hpp"
#include "training_objective.hpp"
#include "training_output.hpp"
#include "training_weights.hpp"

namespace selm {

/// Which parameters do the patterns of --freeze name? A fused parameter is frozen as a whole. Not collective.
/// @throws Error usage naming the pattern that fits nothing, or the tensors that must go together.
std::vector<bool> frozen_parameters(const std::vector<std::string>& patterns, std::span<const ParameterSpec> parameters);

/**
 * @brief The loop around an objective: epochs, global batches dealt to ranks by cost, optimizer steps, metrics,
 * checkpoints and requests to stop. Collective.
 */
class TrainingLoop {
  public:
    /// @param learning_rate peak of this iteration; `iteration` seeds the order of rows.
    TrainingLoop(const TrainOptions& options, std::int64_t iteration, double learning_rate,
                 TrainingObjective& objective, TrainingOutput& output, CheckpointBinding binding, Communicator& comm);

    /// Trains from the newest checkpoint, or from the start, until all steps are done or a stop is requested.
    TrainReport run();
    /// Writes the model. After run() returned Outcome::done.
    void publish(const TrainReport& report);

  private:
    using Clock = std::chrono::steady_clock;
    struct Step {
        std::vector<std::int64_t> rows; ///< of the global batch
        StepSums sums;                  ///< global
        double gradient_norm = 0;
        double learning_rate = 0;
    };

    void start();
    std::vector<std::int64_t> batch_rows(std::int64_t epoch, std::int64_t epoch_step);
    Step step();
    void accumulate(Step& step, std::vector<std::int64_t>& bad_rows);
    CommTimes comm_times() const;
    void check_finite(const Step& step, const std::vector<std::int64_t>& bad_rows);
    void record(const Step& step, double seconds, const CommTimes& comm);
    void show_progress(const nlohmann::ordered_json& line);
    void save_checkpoint();
    TrainReport report(Outcome outcome) const;

    const TrainOptions& options_;
    std::int64_t iteration_;
    double peak_rate_;
    TrainingObjective& objective_;
    TrainingOutput& output_;
    CheckpointBinding binding_;
    Communicator& comm_;

    TrainingWeights weights_;
    ShardedGradient gradient_;
    CheckpointStore checkpoints_;
    CheckpointState state_;
    StopCondition stop_;
    double longest_step_s_ = 0, checkpoint_s_ = 0; ///< what must fit before the end of the job
    std::int64_t steps_per_epoch_ = 0, total_steps_ = 0, resumed_from_ = 0;
    std::int64_t order_epoch_ = -1;
    std::vector<std::int64_t> order_;
    std::vector<nlohmann::ordered_json> lines_; ///< metrics of all steps, the same on every rank
    CommTimes own_times_;                       ///< of this object's own collectives
    Clock::time_point start_ = Clock::now();
    Clock::time_point shown_{};
};

} // namespace selm
