#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "selm/comm/communicator.hpp"
#include "selm/model/decoder.hpp"
#include "selm/shard/comm_times.hpp"
#include "selm/shard/flat_layout.hpp"

namespace selm {

/**
 * @brief Gradients of a step, summed over ranks and cut over them (ZeRO, Rajbhandari et al. 2020, stages 0 to 3).
 *
 * Stages 0 and 1 add up all passes of a rank in a whole gradient [trained elements] and reduce unit by unit while the last
 * pass of the step runs backward; stages 2 and 3 hold only the units under way and reduce each in every pass. A unit's
 * reduction starts when the backward pass has finished its last parameter and goes on behind the computation of the
 * next ones. Sums over ranks are fp32, in rank order: the same bits in every run on as many ranks.
 *
 * A step is begin_step(); for each pass begin_pass(), a backward pass that uses this object as its sink, end_pass(); then
 * finish(). Every rank makes its passes' ready() calls in the same order; at stages 2 and 3 all ranks make equally many
 * passes (ranks without rows make empty ones).
 */
class ShardedGradient final : public GradientSink {
  public:
    struct Options {
        int stage = 1;
        DType accumulate = DType::f32; ///< bf16: kept (stages 0, 1) and sent in bf16; the reduced shard stays f32
        /// Elements above which a unit is reduced at once, in rounds of bounded memory, rather than behind computation.
        std::size_t most_in_flight = std::size_t{1} << 28;
    };

    /// All borrowed. Not collective.
    ShardedGradient(std::span<const ParameterSpec> parameters, const FlatLayout& layout, Communicator& comm,
                    const Options& options);
    ~ShardedGradient() override;

    void begin_step();
    /// @param last the rank's last pass of this step.
    void begin_pass(bool last);
    /// f32 [rows, columns]; empty for a frozen parameter.
    Tensor gradient(std::int64_t parameter) override;
    /// Starts the reduction of a unit that is complete; makes progress with those under way.
    void ready(std::int64_t parameter) override;
    void end_pass();

    /// Waits for all reductions. @return the exact global L2 norm; not finite when any gradient is not. Collective.
    double finish();
    /// The summed gradient of this rank's piece of a unit (stage 0: of the whole unit); after finish().
    std::span<const float> piece(std::size_t unit) const;

    /// Upper bound of peak_bytes(), close where the layout has many units.
    /// @param tied_embedding the first unit's gradient is open from the head's backward pass to the end.
    static std::int64_t planned_peak_bytes(const FlatLayout& layout, int rank, const Options& options,
                                           bool tied_embedding);

    CommTimes times() const { return times_; }
    std::int64_t bytes() const { return bytes_; }           ///< of this rank's buffers now
    std::int64_t peak_bytes() const { return peak_bytes_; } ///< largest so far, receive buffers included

  private:
    struct Reduction;
    bool whole() const { return options_.stage <= 1; }
    std::span<float> own(std::size_t unit);
    std::vector<float> take_buffer(std::size_t elements);
    void give_back(std::vector<float> buffer);
    void complete(std::size_t unit);
    void reduce_whole(std::size_t unit);
    void reduce_unit(std::size_t unit);
    void add_to_kept_bf16(std::size_t unit);
    void start(std::unique_ptr<Reduction> reduction);
    void finish_front();
    void poll();
    void count(std::int64_t bytes);

    std::span<const ParameterSpec> parameters_;
    const FlatLayout& layout_;
    Communicator& comm_;
    Options options_;

    std::vector<std::size_t> whole_begin_;       ///< by unit: where it stands among the trained units
    std::vector<std::size_t> own_begin_;         ///< by unit: where this rank's shard stands among its trained shards
    std::vector<float> whole_;                   ///< stages 0 and 1
    std::vector<std::uint16_t> whole_bf16_;      ///< instead of it
    std::vector<float> own_;                     ///< this rank's shards, summed over ranks
    std::vector<std::vector<float>> unit_buffers_; ///< by unit, while a pass adds to it
    std::vector<std::size_t> missing_; ///< by unit: parameters that are not ready in this pass
    std::deque<std::unique_ptr<Reduction>> in_flight_;
    bool last_pass_ = false;
    CommTimes times_;
    std::int64_t bytes_ = 0, peak_bytes_ = 0;
};

} // namespace selm
