#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "selm/comm/communicator.hpp"
#include "selm/shard/comm_times.hpp"
#include "selm/shard/flat_layout.hpp"
#include "selm/shard/gradient.hpp"
#include "selm/shard/shared_weights.hpp"

namespace selm {

/**
 * @brief AdamW (Loshchilov & Hutter 2019) with its state cut over the ranks (ZeRO, Rajbhandari et al. 2020).
 *
 * Stage 0: fp32 master weights and both moments of the whole space on every rank; stages 1 to 3: of this rank's piece of
 * every unit. State is addressed by unit: master(u) are the weights of pieces()[u], and so on.
 *
 * The weights that passes read ("compute weights") are a SharedWeights, one copy per node, or none: then (stage 3)
 * whoever needs them gathers the master weights unit by unit. Where the compute weights are not rounded, they are the
 * master weights.
 */
class ShardedAdamW {
  public:
    struct Options {
        int stage = 1;
        double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8, weight_decay = 0;
        double max_grad_norm = 0; ///< 0: no clipping; otherwise torch's coefficient min(1, max / (norm + 1e-6))
        bool round_bf16 = false;  ///< compute weights are the master weights rounded to bf16
    };

    /// Not collective. Master weights and moments start at zero: fill master() before the first publish().
    /// @param compute borrowed; null: there are none (stage 3).
    ShardedAdamW(const FlatLayout& layout, Communicator& comm, const Options& options, SharedWeights* compute);

    const FlatLayout& layout() const { return layout_; }
    const Options& options() const { return options_; }
    std::span<const ShardInfo> pieces() const { return pieces_; }
    std::span<float> master(std::size_t unit) { return at(master_, unit); }
    std::span<float> exp_avg(std::size_t unit) { return at(exp_avg_, unit); } ///< empty for a frozen unit
    std::span<float> exp_avg_sq(std::size_t unit) { return at(exp_avg_sq_, unit); }
    std::span<const float> master(std::size_t unit) const { return at(master_, unit); }
    std::span<const float> exp_avg(std::size_t unit) const { return at(exp_avg_, unit); }
    std::span<const float> exp_avg_sq(std::size_t unit) const { return at(exp_avg_sq_, unit); }

    void reset(); ///< master weights, moments and step count to zero
    std::int64_t steps_done() const { return steps_done_; }
    void set_steps_done(std::int64_t steps) { steps_done_ = steps; }

    /// AdamW with a finished gradient whose global norm is `norm`, then the compute weights of all ranks are up to date.
    /// Collective where there are compute weights.
    void apply(double learning_rate, const ShardedGradient& gradient, double norm);
    /// Compute weights = master weights of all ranks (rounded when round_bf16). Collective where there are compute weights.
    void publish();

    CommTimes times() const { return times_; }
    std::int64_t bytes() const; ///< of this rank's own buffers

  private:
    static std::span<float> at(const std::vector<std::span<float>>& by_unit, std::size_t unit) { return by_unit[unit]; }
    std::span<float> compute(std::size_t unit);
    void spread();

    const FlatLayout& layout_;
    Options options_;
    std::vector<ShardInfo> pieces_;
    SharedWeights* compute_;
    std::vector<float> own_master_; ///< empty where master weights are the compute weights
    std::vector<float> own_moments_;
    std::vector<std::span<float>> master_, exp_avg_, exp_avg_sq_;
    std::int64_t steps_done_ = 0;
    CommTimes times_;
};

} // namespace selm
