#include "selm/shard/optimizer.hpp"

#include <algorithm>
#include <utility>

#include "selm/base/error.hpp"
#include "selm/kernels/engine.hpp"

namespace selm {

ShardedAdamW::ShardedAdamW(const FlatLayout& layout, Communicator& comm, const Options& options, SharedWeights* compute)
    : layout_(layout), options_(options),
      pieces_(options.stage == 0 ? whole_pieces(layout) : rank_pieces(layout, comm.rank())), compute_(compute)
{
    SELM_EXPECT(options.stage >= 0 && options.stage <= 3);
    SELM_EXPECT(compute != nullptr || options.stage == 3);
    SELM_EXPECT(layout.ranks() == comm.size());
    const bool own = compute == nullptr || options.round_bf16;
    std::size_t weights = 0, trained = 0;
    for (std::size_t u = 0; u < layout.units(); ++u) {
        weights += pieces_[u].size;
        trained += layout.unit(u).frozen ? 0 : pieces_[u].size;
    }
    own_master_.assign(own ? weights : 0, 0.0F);
    own_moments_.assign(2 * trained, 0.0F);
    std::span<float> masters(own_master_), moments(own_moments_);
    const auto take = [](std::span<float>& from, std::size_t size) {
        const auto taken = from.first(size);
        from = from.subspan(size);
        return taken;
    };
    for (std::size_t u = 0; u < layout.units(); ++u) {
        const std::size_t size = pieces_[u].size;
        master_.push_back(own ? take(masters, size) : compute->values().subspan(pieces_[u].offset, size));
        const std::size_t with_moments = layout.unit(u).frozen ? 0 : size;
        exp_avg_.push_back(take(moments, with_moments));
        exp_avg_sq_.push_back(take(moments, with_moments));
    }
}

void ShardedAdamW::reset()
{
    for (const auto& by_unit : {master_, exp_avg_, exp_avg_sq_})
        for (const std::span<float> values : by_unit)
            std::fill(values.begin(), values.end(), 0.0F);
    steps_done_ = 0;
}

std::span<float> ShardedAdamW::compute(std::size_t unit)
{
    return compute_->values().subspan(pieces_[unit].offset, pieces_[unit].size);
}

void ShardedAdamW::apply(double learning_rate, const ShardedGradient& gradient, double norm)
{
    ++steps_done_;
    AdamWOptions adamw;
    adamw.learning_rate = learning_rate;
    adamw.beta1 = options_.beta1;
    adamw.beta2 = options_.beta2;
    adamw.epsilon = options_.epsilon;
    adamw.weight_decay = options_.weight_decay;
    adamw.step_count = steps_done_;
    adamw.gradient_scale = options_.max_grad_norm > 0 ? std::min(1.0, options_.max_grad_norm / (norm + 1e-6)) : 1.0;
    adamw.round_bf16 = options_.round_bf16 && compute_ != nullptr;
    for (std::size_t u = 0; u < layout_.units(); ++u)
        if (!layout_.unit(u).frozen)
            adamw_step(adamw, gradient.piece(u), master_[u], exp_avg_[u], exp_avg_sq_[u],
                       compute_ != nullptr ? compute(u) : master_[u]);
    spread();
}

void ShardedAdamW::publish()
{
    for (std::size_t u = 0; compute_ != nullptr && u < layout_.units(); ++u) {
        const auto to = compute(u);
        if (to.data() != master_[u].data())
            std::copy(master_[u].begin(), master_[u].end(), to.begin());
        if (options_.round_bf16)
            round_to_bf16(to);
    }
    spread();
}

void ShardedAdamW::spread()
{
    if (compute_ == nullptr || options_.stage == 0) // stage 0: everyone has made all of them
        return;
    const Stopwatch time(times_.exposed), flight(times_.in_flight);
    compute_->spread(options_.round_bf16);
}

std::int64_t ShardedAdamW::bytes() const
{
    return static_cast<std::int64_t>((own_master_.size() + own_moments_.size()) * sizeof(float));
}

} // namespace selm
