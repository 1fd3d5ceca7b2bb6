#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include <nlohmann/json.hpp>

#include "selm/comm/communicator.hpp"
#include "selm/phases/train.hpp"
#include "selm/shard/checkpoint.hpp"
#include "selm/shard/optimizer.hpp"
#include "training_objective.hpp"
#include "training_output.hpp"

namespace selm {

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
    void check_finite(const Step& step, const std::vector<std::int64_t>& bad_rows);
    void record(const Step& step, double seconds, double comm_seconds);
    void show_progress(const nlohmann::ordered_json& line);
    void save_checkpoint();
    TrainReport report(Outcome outcome) const;
    void timed(const std::function<void()>& collective);

    const TrainOptions& options_;
    std::int64_t iteration_;
    double peak_rate_;
    TrainingObjective& objective_;
    TrainingOutput& output_;
    CheckpointBinding binding_;
    Communicator& comm_;

    FlatBuffers flat_;
    ShardedAdamW optimizer_;
    CheckpointStore checkpoints_;
    CheckpointState state_;
    std::int64_t steps_per_epoch_ = 0, total_steps_ = 0, resumed_from_ = 0;
    std::int64_t order_epoch_ = -1;
    std::vector<std::int64_t> order_;
    std::vector<nlohmann::ordered_json> lines_; ///< metrics of all steps, the same on every rank
    double reduce_seconds_ = 0;                 ///< in this object's own collectives
    Clock::time_point start_ = Clock::now();
    Clock::time_point shown_{};
};

} // namespace selm
