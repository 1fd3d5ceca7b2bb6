#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "selm/comm/communicator.hpp"
#include "selm/shard/flat_layout.hpp"
#include "selm/shard/shared_weights.hpp"

namespace selm {

/**
 * @brief AdamW (Loshchilov & Hutter 2019) with its state cut over the ranks (ZeRO, Rajbhandari et al. 2020).
 *
 * Stage 1: fp32 master weights and both moments of this rank's shard of the flat space; stage 0: of the whole space on
 * every rank. Both reduce gradients over the same shards in the same order, so they give the same bits. The state is
 * only addressed through `state_shard()`: stage 2 adds shards of the gradient to it (its buffer is already one), stage
 * 3 those of the compute weights.
 *
 * With SharedWeights as the compute weights, a node's ranks write their shards into one copy of them; at stage 1 in fp32
 * that copy is the master weights as well.
 *
 * A step is reduce() (the caller looks at the norm and may refuse the step), then apply().
 */
class ShardedAdamW {
  public:
    struct Options {
        int stage = 1; ///< 0 | 1
        double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8, weight_decay = 0;
        double max_grad_norm = 0; ///< 0: no clipping; otherwise torch's coefficient min(1, max / (norm + 1e-6))
        bool round_bf16 = false;  ///< compute weights are the master weights rounded to bf16
    };

    /// Not collective. Master weights and moments start at zero: fill master() before the first publish().
    /// @param shared compute weights that are one copy per node, borrowed; null: compute weights are every rank's own.
    ShardedAdamW(const FlatLayout& layout, Communicator& comm, const Options& options, SharedWeights* shared = nullptr);

    /// The elements that this rank's master(), exp_avg() and exp_avg_sq() hold.
    ShardInfo state_shard() const { return state_; }
    std::span<float> master() { return master_; }
    std::span<float> exp_avg() { return exp_avg_; }
    std::span<float> exp_avg_sq() { return exp_avg_sq_; }
    std::span<const float> master() const { return master_; }
    std::span<const float> exp_avg() const { return exp_avg_; }
    std::span<const float> exp_avg_sq() const { return exp_avg_sq_; }

    void reset(); ///< master weights, moments and step count to zero
    std::int64_t steps_done() const { return steps_done_; }
    void set_steps_done(std::int64_t steps) { steps_done_ = steps; }

    /// Sums the ranks' flat gradients [total] (in rank order: deterministic) and keeps this rank's part.
    /// @return the exact global L2 norm before clipping; not finite when any gradient is not. Collective.
    double reduce(std::span<const float> gradient);
    /// AdamW with the gradients of the last reduce(), then publish(). Collective.
    void apply(double learning_rate, std::span<float> compute);
    /// compute [total] = master weights of all ranks (rounded when round_bf16). Collective.
    void publish(std::span<float> compute);

    /// full [total] = master weights of all ranks, not rounded. Collective.
    void gather_master(std::span<float> full);

    double comm_seconds() const { return comm_seconds_; } ///< spent in collectives so far
    std::int64_t bytes() const;                           ///< of this rank's buffers

  private:
    void gather(std::span<float> compute);

    const FlatLayout& layout_;
    Communicator& comm_;
    Options options_;
    ShardInfo reduced_; ///< what reduce_scatter gives this rank
    ShardInfo state_;
    SharedWeights* shared_;
    std::vector<float> own_master_; ///< empty where master weights are the shared ones
    std::span<float> master_;
    std::vector<float> exp_avg_, exp_avg_sq_, gradient_;
    double norm_ = 0;
    std::int64_t steps_done_ = 0;
    double comm_seconds_ = 0;
};

} // namespace selm
