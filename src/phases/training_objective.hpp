#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "selm/comm/communicator.hpp"
#include "selm/model/decoder_config.hpp"
#include "selm/model/safetensors_writer.hpp"
#include "selm/shard/checkpoint.hpp"
#include "selm/model/decoder.hpp"
#include "training_weights.hpp"

namespace selm {

/// Sums over rows of one optimizer step; added over ranks, then divided by the counts. Doubles only, so that one
/// reduction carries all.
struct StepSums {
    enum Sum : std::size_t {
        loss,
        dpo,
        optimism,
        reward_best,
        reward_worst,
        accuracy,
        margin,
        logp_best,
        logp_worst,
        logp_generated,
        rows,
        generated_rows,
        tokens,
        count
    };
    std::array<double, count> values{};
    double& operator[](Sum sum) { return values[sum]; }
    double operator[](Sum sum) const { return values[sum]; }
    double mean(Sum sum) const { return values[sum] / values[rows]; }
};

struct RowCost {
    std::int64_t tokens = 0;
    std::int64_t work = 0; ///< what the row's pass takes, in units of the objective
};

/**
 * @brief What is trained: rows, a loss of a row and its gradient. The loop around it (batches, optimizer, checkpoints,
 * metrics) is the same for all.
 *
 * Making one is collective; the members are not (unless said).
 */
class TrainingObjective {
  public:
    virtual ~TrainingObjective() = default;

    virtual std::int64_t rows() const = 0;
    virtual std::int64_t
    cost(std::int64_t row) const = 0; ///< tokens that the row is computed with; the same on every rank
    /// What the row's pass takes, in units of its own: by this a batch is dealt to the ranks. The same on every rank.
    virtual std::int64_t work(std::int64_t row) const { return cost(row); }
    virtual std::string row_name(std::int64_t row) const = 0; ///< for messages
    virtual std::vector<ParameterSpec> parameters() const = 0;
    /// Ends of groups of parameters that are used together; empty: one group. See FlatLayoutOptions::group_ends.
    virtual std::vector<std::int64_t> parameter_groups() const { return {}; }
    /// What a checkpoint is bound to besides the options.
    virtual CheckpointBinding binding() const = 0;

    /// Do all rows fit? @throws Error configuration naming one that does not.
    virtual void check_memory() const {}
    /// Long work before the first step. Collective. false: a stop was requested; what is done is saved.
    virtual bool prepare(Communicator&) { return true; }
    /// Tidies up once the model is published. Collective.
    virtual void finish(Communicator&) {}

    /// Fills this rank's pieces of the master weights with the start weights.
    virtual void initialise(TrainingWeights& weights) const = 0;
    /// The weights have new values; the first call comes before any accumulate(). Ranks of a node may fill memory that
    /// they share: the caller calls weights.fence() when all have returned. Collective.
    virtual void refresh(TrainingWeights& weights) = 0;
    /// The rows of accumulate() belong to this epoch (from 0) from now on.
    virtual void start_epoch(std::int64_t) {}
    /// One forward and backward pass: adds scale * d(sum of the rows' losses) to the gradient, and the rows' figures to
    /// `sums`; rows whose loss is not finite go to `bad_rows`. No rows: a pass that adds nothing, but makes the calls of
    /// weights and gradient that one with rows makes. Collective where weights or gradient are (stages 2 and 3).
    virtual void accumulate(std::span<const std::int64_t> rows, double scale, GradientSink& gradient, StepSums& sums,
                            std::vector<std::int64_t>& bad_rows) = 0;
    virtual std::int64_t engine_bytes() const = 0; ///< peak of the engine's tensors
    /// What a rank allocates in all by the formula of a dry run, with the activations of the passes so far; 0: none is known.
    virtual std::int64_t planned_bytes(const FlatLayout&, int /*ranks_on_node*/) const { return 0; }
    /// Of weights beside those of TrainingWeights (of memory that ranks share, this rank's part), and what moving them took.
    virtual std::int64_t weight_bytes() const { return 0; }
    virtual CommTimes comm_times() const { return {}; }
    virtual std::string engine_description() const = 0;
    virtual std::string numerics() const { return {}; } ///< Engine::numerics() of the passes; empty: plain loops

    /// The line of metrics.jsonl of a step, without what the loop adds; `sums` are global.
    virtual nlohmann::ordered_json metrics(const StepSums& sums) const = 0;

    /// The tensors of the trained model's weight files, in order, and the type they are written in.
    virtual std::vector<SafetensorSpec> tensors() const = 0;
    virtual DType saved_dtype() const = 0;
    /// Writes what belongs to a model directory besides the weights. Called on rank 0 alone.
    virtual void write_files(const std::string& directory) const = 0;
    /// Writes the elements of tensors() that fall to this rank. May not communicate.
    virtual void write_weights(SafetensorsWriter& writer, const TrainingWeights& weights) const
    {
        weights.visit_own_master([&](const PartSlice& slice, std::span<const float> values) {
            writer.write(slice.part->name, static_cast<std::int64_t>(slice.part_begin), values);
        });
    }
};

} // namespace selm
