#include "selm/shard/optimizer.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "selm/kernels/engine.hpp"

namespace selm {

namespace {

/// Adds the life time of the object to a counter.
class Stopwatch {
  public:
    explicit Stopwatch(double& seconds) : seconds_(seconds) {}
    ~Stopwatch() { seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }
    Stopwatch(const Stopwatch&) = delete;
    Stopwatch& operator=(const Stopwatch&) = delete;

  private:
    double& seconds_;
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

} // namespace

ShardedAdamW::ShardedAdamW(const FlatLayout& layout, Communicator& comm, const Options& options, SharedWeights* shared)
    : layout_(layout), comm_(comm), options_(options), reduced_(layout.shard(comm.rank())), shared_(shared)
{
    SELM_EXPECT(options.stage == 0 || options.stage == 1);
    SELM_EXPECT(layout.ranks() == comm.size());
    state_ = options.stage == 0 ? ShardInfo{0, layout.total()} : reduced_;
    for (std::vector<float>* buffer : {&exp_avg_, &exp_avg_sq_, &gradient_})
        buffer->assign(state_.size, 0.0F);
    if (shared != nullptr && options.stage == 1 && !options.round_bf16) {
        master_ = shared->values().subspan(state_.offset, state_.size);
    } else {
        own_master_.assign(state_.size, 0.0F);
        master_ = own_master_;
    }
}

void ShardedAdamW::reset()
{
    for (const std::span<float> buffer : {master_, std::span(exp_avg_), std::span(exp_avg_sq_)})
        std::fill(buffer.begin(), buffer.end(), 0.0F);
    steps_done_ = 0;
}

double ShardedAdamW::reduce(std::span<const float> gradient)
{
    SELM_EXPECT(gradient.size() == layout_.total());
    const auto own = std::span<float>(gradient_).subspan(reduced_.offset - state_.offset, reduced_.size);
    {
        const Stopwatch time(comm_seconds_);
        comm_.reduce_scatter_sum(gradient, layout_.shard_offsets(), own, "gradients");
    }
    double squares = sum_of_squares(own);
    {
        const Stopwatch time(comm_seconds_);
        squares = all_reduce_value(comm_, squares, ReduceOp::sum, "gradient norm");
        if (options_.stage == 0)
            comm_.all_gather_shards(own, layout_.shard_offsets(), gradient_, "gradients of all shards");
    }
    norm_ = std::sqrt(squares);
    return norm_;
}

void ShardedAdamW::apply(double learning_rate, std::span<float> compute)
{
    SELM_EXPECT(compute.size() == layout_.total());
    ++steps_done_;
    AdamWOptions adamw;
    adamw.learning_rate = learning_rate;
    adamw.beta1 = options_.beta1;
    adamw.beta2 = options_.beta2;
    adamw.epsilon = options_.epsilon;
    adamw.weight_decay = options_.weight_decay;
    adamw.step_count = steps_done_;
    adamw.gradient_scale = options_.max_grad_norm > 0 ? std::min(1.0, options_.max_grad_norm / (norm_ + 1e-6)) : 1.0;
    adamw.round_bf16 = options_.round_bf16;
    adamw_step(adamw, gradient_, master_, exp_avg_, exp_avg_sq_, compute.subspan(state_.offset, state_.size));
    gather(compute);
}

void ShardedAdamW::publish(std::span<float> compute)
{
    SELM_EXPECT(compute.size() == layout_.total());
    const auto own = compute.subspan(state_.offset, state_.size);
    if (own.data() != master_.data())
        std::copy(master_.begin(), master_.end(), own.begin());
    if (options_.round_bf16)
        round_to_bf16(own);
    gather(compute);
}

void ShardedAdamW::gather_master(std::span<float> full)
{
    SELM_EXPECT(full.size() == layout_.total());
    std::copy(master_.begin(), master_.end(), full.begin() + static_cast<std::ptrdiff_t>(state_.offset));
    gather(full);
}

void ShardedAdamW::gather(std::span<float> compute)
{
    if (options_.stage == 0)
        return;
    const Stopwatch time(comm_seconds_);
    if (shared_ != nullptr && compute.data() == shared_->values().data())
        shared_->spread();
    else
        comm_.all_gather_shards(compute.subspan(reduced_.offset, reduced_.size), layout_.shard_offsets(), compute,
                                "updated weights");
}

std::int64_t ShardedAdamW::bytes() const
{
    return static_cast<std::int64_t>((own_master_.size() + exp_avg_.size() + exp_avg_sq_.size() + gradient_.size()) *
                                     sizeof(float));
}

} // namespace selm
