#include "selm/shard/gradient.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "selm/base/error.hpp"
#include "selm/kernels/engine.hpp"

namespace selm {

namespace {

/// Beside the one that starts. More at once would only cost memory: the network is busy with one.
constexpr std::size_t most_reductions = 1;

constexpr std::int64_t float_bytes = sizeof(float);

std::int64_t bytes_of(std::size_t elements)
{
    return static_cast<std::int64_t>(elements) * float_bytes;
}

} // namespace

/// A unit's reduction under way. What it sends is held here, or borrowed from the whole gradient.
struct ShardedGradient::Reduction {
    std::size_t unit = 0;
    std::vector<float> held;
    std::vector<std::uint16_t> held_bf16;
    std::vector<float> sum; ///< of this rank's shard
    std::int64_t received = 0; ///< bytes that the communicator holds for it
    std::unique_ptr<PendingCollective> pending;
    Stopwatch::Clock::time_point start = Stopwatch::Clock::now();
    bool arrived = false; ///< seen to be complete; its time is counted
};

ShardedGradient::ShardedGradient(std::span<const ParameterSpec> parameters, const FlatLayout& layout,
                                 Communicator& comm, const Options& options)
    : parameters_(parameters), layout_(layout), comm_(comm), options_(options), unit_buffers_(layout.units()),
      missing_(layout.units(), 0)
{
    SELM_EXPECT(options.stage >= 0 && options.stage <= 3 && layout.ranks() == comm.size());
    SELM_EXPECT(options.stage > 0 || options.accumulate == DType::f32);
    std::size_t trained = 0, mine = 0;
    for (std::size_t u = 0; u < layout.units(); ++u) {
        whole_begin_.push_back(trained);
        own_begin_.push_back(mine);
        if (layout.unit(u).frozen)
            continue;
        trained += layout.unit(u).flat.size;
        mine += layout.shard(u, comm.rank()).size;
    }
    own_.assign(mine, 0.0F);
    count(bytes_of(mine));
    if (whole() && options.accumulate == DType::bf16) {
        whole_bf16_.assign(trained, 0);
        count(bytes_of(trained) / 2);
    } else if (whole()) {
        whole_.assign(trained, 0.0F);
        count(bytes_of(trained));
    }
}

ShardedGradient::~ShardedGradient() = default;

std::int64_t ShardedGradient::planned_peak_bytes(const FlatLayout& layout, int rank, const Options& options,
                                                 bool tied_embedding)
{
    const bool bf16 = options.accumulate == DType::bf16, whole = options.stage <= 1;
    const auto held = [&](std::size_t unit) { return bytes_of(layout.unit(unit).flat.size); };
    const auto moved = [&](std::size_t unit) { // buffers of a reduction beside what is held
        const std::size_t size = layout.unit(unit).flat.size;
        if (!bf16 && size > options.most_in_flight)
            return std::int64_t{0};
        return bytes_of(layout.shard(unit, rank).size) + (bf16 && whole ? held(unit) / 2 : held(unit));
    };
    std::int64_t trained = 0, extra = 0;
    std::size_t before = layout.units(); // the unit that backward finished before this one
    for (std::size_t u = layout.units(); u-- > 0;) {
        if (layout.unit(u).frozen)
            continue;
        trained += held(u);
        std::int64_t now = moved(u) + (whole && !bf16 ? 0 : held(u));
        if (before < layout.units())
            now += moved(before) + (whole ? 0 : held(before));
        if (tied_embedding && u != 0 && (!whole || bf16) && !layout.unit(0).frozen)
            now += held(0); // open from the head's backward pass to the end
        extra = std::max(extra, now);
        before = u;
    }
    return bytes_of(layout.shard_elements(rank, true)) + (whole ? (bf16 ? trained / 2 : trained) : 0) + extra;
}

void ShardedGradient::count(std::int64_t bytes)
{
    bytes_ += bytes;
    peak_bytes_ = std::max(peak_bytes_, bytes_);
}

std::span<float> ShardedGradient::own(std::size_t unit)
{
    return std::span(own_).subspan(own_begin_[unit], layout_.shard(unit, comm_.rank()).size);
}

void ShardedGradient::begin_step()
{
    SELM_EXPECT(in_flight_.empty());
    std::fill(own_.begin(), own_.end(), 0.0F);
    std::fill(whole_.begin(), whole_.end(), 0.0F);
    std::fill(whole_bf16_.begin(), whole_bf16_.end(), std::uint16_t{0});
}

void ShardedGradient::begin_pass(bool last)
{
    last_pass_ = last;
    for (std::size_t u = 0; u < layout_.units(); ++u)
        missing_[u] = layout_.unit(u).frozen ? 0 : layout_.unit(u).parameters;
}

/// Zeros. Buffers are not kept for later: a unit's are as large as the next one's only within the layers, and what is kept
/// would count in the peak.
std::vector<float> ShardedGradient::take_buffer(std::size_t elements)
{
    count(bytes_of(elements));
    return std::vector<float>(elements, 0.0F);
}

void ShardedGradient::give_back(std::vector<float> buffer)
{
    count(-bytes_of(buffer.size()));
}

Tensor ShardedGradient::gradient(std::int64_t parameter)
{
    const auto p = static_cast<std::size_t>(parameter);
    const std::size_t unit = layout_.unit_of(p);
    const ParameterSpec& spec = parameters_[p];
    if (layout_.unit(unit).frozen)
        return {};
    const std::size_t within = layout_.offset(p) - layout_.unit(unit).flat.offset;
    if (!whole_.empty())
        return borrow_f32(whole_.data() + whole_begin_[unit] + within, spec.rows, spec.columns);
    std::vector<float>& buffer = unit_buffers_[unit];
    if (buffer.empty())
        buffer = take_buffer(layout_.unit(unit).flat.size);
    return borrow_f32(buffer.data() + within, spec.rows, spec.columns);
}

void ShardedGradient::ready(std::int64_t parameter)
{
    const std::size_t unit = layout_.unit_of(static_cast<std::size_t>(parameter));
    if (layout_.unit(unit).frozen)
        return;
    SELM_EXPECT(missing_[unit] > 0);
    if (--missing_[unit] == 0)
        complete(unit);
    poll();
}

void ShardedGradient::complete(std::size_t unit)
{
    if (!whole())
        reduce_unit(unit);
    else {
        if (options_.accumulate == DType::bf16)
            add_to_kept_bf16(unit);
        if (last_pass_)
            reduce_whole(unit);
    }
}

/// kept = bf16(kept + this pass), added in f32.
void ShardedGradient::add_to_kept_bf16(std::size_t unit)
{
    std::vector<float> buffer = std::exchange(unit_buffers_[unit], {});
    if (buffer.empty())
        return; // a pass without rows
    std::uint16_t* kept = whole_bf16_.data() + whole_begin_[unit];
    for (std::size_t i = 0; i < buffer.size(); ++i)
        kept[i] = float_to_bf16(bf16_to_float(kept[i]) + buffer[i]);
    give_back(std::move(buffer));
}

void ShardedGradient::reduce_whole(std::size_t unit)
{
    const std::size_t size = layout_.unit(unit).flat.size;
    auto reduction = std::make_unique<Reduction>();
    reduction->unit = unit;
    const auto label = cat("gradient of ", parameters_[layout_.unit(unit).first].name);
    const auto offsets = layout_.shard_offsets(unit);
    if (options_.accumulate == DType::bf16) {
        reduction->sum.resize(own(unit).size());
        reduction->pending = comm_.start_reduce_scatter_sum_bf16(
            std::span(std::as_const(whole_bf16_)).subspan(whole_begin_[unit], size), offsets, reduction->sum, label);
        reduction->received = bytes_of(size) / 2;
    } else {
        const auto full = std::span(std::as_const(whole_)).subspan(whole_begin_[unit], size);
        if (size > options_.most_in_flight) {
            const Stopwatch time(times_.exposed), flight(times_.in_flight);
            comm_.reduce_scatter_sum(full, offsets, own(unit), label);
            return;
        }
        reduction->sum.resize(own(unit).size());
        reduction->pending = comm_.start_reduce_scatter_sum(full, offsets, reduction->sum, label);
        reduction->received = bytes_of(size);
    }
    start(std::move(reduction));
}

void ShardedGradient::reduce_unit(std::size_t unit)
{
    const std::size_t size = layout_.unit(unit).flat.size;
    auto reduction = std::make_unique<Reduction>();
    reduction->unit = unit;
    reduction->held = std::exchange(unit_buffers_[unit], {});
    if (reduction->held.empty())
        reduction->held = take_buffer(size); // a pass without rows adds zeros
    reduction->sum.resize(own(unit).size());
    const auto label = cat("gradient of ", parameters_[layout_.unit(unit).first].name);
    const auto offsets = layout_.shard_offsets(unit);
    if (options_.accumulate == DType::bf16) {
        reduction->held_bf16.resize(size);
        std::transform(reduction->held.begin(), reduction->held.end(), reduction->held_bf16.begin(), float_to_bf16);
        give_back(std::exchange(reduction->held, {}));
        reduction->pending =
            comm_.start_reduce_scatter_sum_bf16(reduction->held_bf16, offsets, reduction->sum, label);
        reduction->received = bytes_of(size); // half for what is sent, half for what comes
    } else if (size > options_.most_in_flight) {
        {
            const Stopwatch time(times_.exposed), flight(times_.in_flight);
            comm_.reduce_scatter_sum(reduction->held, offsets, reduction->sum, label);
        }
        const auto sum = own(unit);
        for (std::size_t i = 0; i < sum.size(); ++i)
            sum[i] += reduction->sum[i];
        give_back(std::move(reduction->held));
        return;
    } else {
        reduction->pending = comm_.start_reduce_scatter_sum(reduction->held, offsets, reduction->sum, label);
        reduction->received = bytes_of(size);
    }
    start(std::move(reduction));
}

void ShardedGradient::start(std::unique_ptr<Reduction> reduction)
{
    count(reduction->received + bytes_of(reduction->sum.size()));
    in_flight_.push_back(std::move(reduction));
    while (in_flight_.size() > most_reductions)
        finish_front();
}

void ShardedGradient::finish_front()
{
    const std::unique_ptr<Reduction> done = std::move(in_flight_.front());
    in_flight_.pop_front();
    {
        const Stopwatch time(times_.exposed);
        done->pending->wait();
    }
    if (!done->arrived)
        times_.in_flight += Stopwatch::seconds_since(done->start);
    const auto sum = own(done->unit);
    for (std::size_t i = 0; i < sum.size(); ++i)
        sum[i] += done->sum[i];
    count(-done->received - bytes_of(done->sum.size()));
    if (!done->held.empty())
        give_back(std::move(done->held));
}

/// Open MPI moves data only inside its calls.
void ShardedGradient::poll()
{
    const Stopwatch time(times_.exposed);
    for (const auto& reduction : in_flight_)
        if (!reduction->arrived && reduction->pending->test()) {
            reduction->arrived = true;
            times_.in_flight += Stopwatch::seconds_since(reduction->start);
        }
}

void ShardedGradient::end_pass()
{
    for (std::size_t u = 0; u < layout_.units(); ++u)
        SELM_EXPECT(missing_[u] == 0); // every parameter's gradient is ready
}

double ShardedGradient::finish()
{
    while (!in_flight_.empty())
        finish_front();
    double squares = 0;
    for (std::size_t u = 0; u < layout_.units(); ++u)
        if (!layout_.unit(u).frozen)
            squares += sum_of_squares(own(u));
    const Stopwatch time(times_.exposed), flight(times_.in_flight);
    squares = all_reduce_value(comm_, squares, ReduceOp::sum, "gradient norm");
    if (options_.stage == 0)
        for (std::size_t u = 0; u < layout_.units(); ++u)
            if (!layout_.unit(u).frozen)
                comm_.all_gather_shards(own(u), layout_.shard_offsets(u),
                                        std::span(whole_).subspan(whole_begin_[u], layout_.unit(u).flat.size),
                                        "gradients of all shards");
    return std::sqrt(squares);
}

std::span<const float> ShardedGradient::piece(std::size_t unit) const
{
    SELM_EXPECT(!layout_.unit(unit).frozen);
    if (options_.stage == 0)
        return std::span(whole_).subspan(whole_begin_[unit], layout_.unit(unit).flat.size);
    return std::span(own_).subspan(own_begin_[unit], layout_.shard(unit, comm_.rank()).size);
}

} // namespace selm
