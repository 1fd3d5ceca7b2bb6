#include <ATen/core/Tensor.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "aten_attention.hpp"
#include "aten_engine.hpp"
#include "aten_view.hpp"
#include "selm/base/error.hpp"

// Attention by aten::Parts: which rows each of them computes, and with which keys.
namespace selm {

using aten::Inputs;
using aten::split;
using aten::view;
using aten::view_heads;

namespace {

/// i32 [n] on the device.
at::Tensor uploaded(const std::vector<std::int32_t>& values, Device device)
{
    return aten::index_tensor(values, device).clone(); // also on the CPU, where it would be a view of the vector
}

aten::PackedSequences sequences_of(const std::vector<std::int32_t>& query_begin, const std::vector<std::int32_t>& key_begin,
                                   Device device)
{
    aten::PackedSequences out;
    for (std::size_t i = 0; i + 1 < query_begin.size(); ++i) {
        out.longest_query = std::max<std::int64_t>(out.longest_query, query_begin[i + 1] - query_begin[i]);
        out.longest_key = std::max<std::int64_t>(out.longest_key, key_begin[i + 1] - key_begin[i]);
    }
    out.query_begin = uploaded(query_begin, device);
    out.key_begin = uploaded(key_begin, device);
    return out;
}

std::int32_t as_i32(std::int64_t value)
{
    SELM_EXPECT(value >= 0 && value <= std::numeric_limits<std::int32_t>::max());
    return static_cast<std::int32_t>(value);
}

void append_range(std::vector<std::int32_t>& to, std::int64_t begin, std::int64_t count)
{
    for (std::int64_t i = 0; i < count; ++i)
        to.push_back(as_i32(begin + i));
}

bool are_equal(const CachedSpan& a, const CachedSpan& b)
{
    return a.slot == b.slot && a.row_begin == b.row_begin && a.count == b.count && a.position_begin == b.position_begin &&
           a.prefill == b.prefill && a.prefix_slot == b.prefix_slot;
}

bool are_equal(const Segment& a, const Segment& b)
{
    return a.begin == b.begin && a.length == b.length && a.trunk == b.trunk;
}

/// Lists of rows that become one CachedRows.
struct RowLists {
    std::vector<std::int32_t> row, slot, position;

    void add(const CachedSpan& span)
    {
        append_range(row, span.row_begin, span.count);
        append_range(position, span.position_begin, span.count);
        slot.insert(slot.end(), static_cast<std::size_t>(span.count), static_cast<std::int32_t>(span.slot));
    }
    aten::CachedRows upload(Device device) const { return {uploaded(row, device), uploaded(slot, device), uploaded(position, device)}; }
};

} // namespace

void aten::check_head_dim(const AttentionShape& shape)
{
    SELM_VALIDATE(shape.head_dim % 8 == 0 && shape.head_dim <= 256, ExitCode::configuration,
                  "the model's attention heads have " << shape.head_dim << " dimensions; attention on CUDA devices takes multiples "
                  "of 8 up to 256. Pass --device cpu");
}

struct AtenEngine::SegmentPlan {
    std::vector<Segment> segments;
    aten::PackedSequences sequences;
    at::Tensor key_rows; ///< i32 [Tk]; undefined: the rows as they lie
};

struct AtenEngine::CachedPlan {
    std::vector<CachedSpan> spans;
    std::int64_t capacity = 0;
    aten::CachedRows all, single; ///< of all spans; of those of one token
    std::int64_t longest_single = 0;
    /// Of prefill spans: their rows in the step, i64 [Tq], and their keys' in the layer, i32 [Tk] of slot * capacity + position.
    at::Tensor query_rows, key_rows;
    aten::PackedSequences sequences;
};

const AtenEngine::SegmentPlan& AtenEngine::segment_plan(std::span<const Segment> segments)
{
    if (segment_plan_ && std::ranges::equal(segment_plan_->segments, segments, [](auto& a, auto& b) { return are_equal(a, b); }))
        return *segment_plan_;
    auto plan = std::make_shared<SegmentPlan>();
    plan->segments.assign(segments.begin(), segments.end());
    std::vector<std::int32_t> query_begin{0}, key_begin{0}, key_rows;
    bool has_trunks = false;
    for (const Segment& segment : segments) {
        if (segment.trunk >= 0) {
            const Segment& trunk = segments[static_cast<std::size_t>(segment.trunk)];
            append_range(key_rows, trunk.begin, trunk.length);
            has_trunks = true;
        }
        append_range(key_rows, segment.begin, segment.length);
        query_begin.push_back(as_i32(segment.begin + segment.length));
        key_begin.push_back(as_i32(static_cast<std::int64_t>(key_rows.size())));
    }
    plan->sequences = sequences_of(query_begin, key_begin, device_);
    if (has_trunks)
        plan->key_rows = uploaded(key_rows, device_);
    segment_plan_ = std::move(plan);
    return *segment_plan_;
}

const AtenEngine::CachedPlan& AtenEngine::cached_plan(std::span<const CachedSpan> spans, std::int64_t capacity)
{
    if (cached_plan_ && cached_plan_->capacity == capacity &&
        std::ranges::equal(cached_plan_->spans, spans, [](auto& a, auto& b) { return are_equal(a, b); }))
        return *cached_plan_;
    auto plan = std::make_shared<CachedPlan>();
    plan->spans.assign(spans.begin(), spans.end());
    plan->capacity = capacity;
    RowLists all, single;
    std::vector<std::int32_t> query_rows, query_begin{0}, key_rows, key_begin{0};
    for (const CachedSpan& span : spans) {
        all.add(span);
        const std::int64_t end = span.position_begin + span.count;
        if (!span.prefill) {
            single.add(span);
            plan->longest_single = std::max(plan->longest_single, end);
            continue;
        }
        append_range(query_rows, span.row_begin, span.count);
        append_range(key_rows, span.slot * capacity, end);
        query_begin.push_back(as_i32(static_cast<std::int64_t>(query_rows.size())));
        key_begin.push_back(as_i32(static_cast<std::int64_t>(key_rows.size())));
    }
    plan->all = all.upload(device_);
    plan->single = single.upload(device_);
    plan->query_rows = uploaded(query_rows, device_).to(at::kLong);
    plan->key_rows = uploaded(key_rows, device_);
    plan->sequences = sequences_of(query_begin, key_begin, device_);
    cached_plan_ = std::move(plan);
    return *cached_plan_;
}

void AtenEngine::packed_attention(const Tensor& qkv, const AttentionShape& shape, std::span<const Segment> segments,
                                  const Tensor& out, const Tensor& lse)
{
    aten::check_head_dim(shape);
    const Inputs in = split(qkv, shape);
    const SegmentPlan& plan = segment_plan(segments);
    const auto keys = [&](const at::Tensor& x) { return plan.key_rows.defined() ? at::index_select(x, 0, plan.key_rows) : x; };
    const auto result = parts_.packed_attention->forward(in.q, keys(in.k), keys(in.v), plan.sequences, shape.scale);
    view_heads(out, 0, shape.heads, shape.head_dim).copy_(result.out);
    if (!lse.empty())
        view(lse).copy_(result.lse);
}

void AtenEngine::packed_attention_backward(const Tensor& qkv, const AttentionShape& shape, std::span<const Segment> segments,
                                           const Tensor& out, const Tensor& lse, const Tensor& dout, const Tensor& dqkv)
{
    const Inputs in = split(qkv, shape), d_in = split(dqkv, shape);
    const SegmentPlan& plan = segment_plan(segments);
    const auto keys = [&](const at::Tensor& x) { return plan.key_rows.defined() ? at::index_select(x, 0, plan.key_rows) : x; };
    const auto gradients = parts_.packed_attention->backward(
        view_heads(dout, 0, shape.heads, shape.head_dim), in.q, keys(in.k), keys(in.v),
        view_heads(out, 0, shape.heads, shape.head_dim), view(lse), plan.sequences, shape.scale);
    // A trunk's keys get a part from each of its branches.
    const auto add_up = [&](const at::Tensor& of_keys, at::Tensor to) {
        if (!plan.key_rows.defined()) {
            to.copy_(of_keys);
            return;
        }
        at::Tensor sum = at::zeros(to.sizes(), to.options().dtype(at::kFloat));
        aten::add_rows(sum, plan.key_rows, aten::as_f32(of_keys));
        to.copy_(sum);
    };
    at::Tensor dq = d_in.q;
    dq.copy_(gradients.q);
    add_up(gradients.k, d_in.k);
    add_up(gradients.v, d_in.v);
}

void AtenEngine::prefill_attention(const at::Tensor& q, const AttentionShape& shape, AtenKvCache& cache, std::int64_t layer,
                                   const CachedPlan& plan, at::Tensor out)
{
    if (plan.query_rows.size(0) == 0)
        return;
    if (!parts_.packed_attention) {
        for (const CachedSpan& span : plan.spans)
            if (span.prefill)
                aten::attend_span(q, shape, cache, layer, span, out);
        return;
    }
    const auto cached = [&](const at::Tensor& x) { return at::index_select(x.flatten(0, 1), 0, plan.key_rows); };
    const aten::CacheLayer stored = cache.layer(layer);
    const auto result = parts_.packed_attention->forward(at::index_select(q, 0, plan.query_rows), cached(stored.keys),
                                                         cached(stored.values), plan.sequences, shape.scale);
    out.index_copy_(0, plan.query_rows, result.out.to(out.scalar_type()));
}

void AtenEngine::cached_attention_by_parts(const Tensor& qkv, const AttentionShape& shape, AtenKvCache& cache, std::int64_t layer,
                                           std::span<const CachedSpan> spans, const Tensor& out)
{
    aten::CachedAttention& attention = *parts_.cached_attention;
    const aten::CacheLayer stored = cache.layer(layer);
    if (step_ != nullptr && step_->spans.data() == spans.data()) {
        const aten::CachedRows rows{step_inputs_.select(0, 3), step_inputs_.select(0, 2), step_inputs_.select(0, 1)};
        attention.append(view(qkv), shape, stored, rows);
        attention.attend(view(qkv), shape, stored, rows, cache.capacity(), view(out));
        return;
    }
    const CachedPlan& plan = cached_plan(spans, cache.capacity());
    attention.append(view(qkv), shape, stored, plan.all);
    for (const CachedSpan& span : spans) // a prefix may be that of an earlier span, whose own rows are there by now
        aten::copy_prefix(cache, layer, span);
    if (plan.longest_single > 0)
        attention.attend(view(qkv), shape, stored, plan.single, plan.longest_single, view(out));
    prefill_attention(split(qkv, shape).q, shape, cache, layer, plan, view_heads(out, 0, shape.heads, shape.head_dim));
}

} // namespace selm
