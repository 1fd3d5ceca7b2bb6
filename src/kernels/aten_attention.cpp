#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "aten_engine.hpp"
#include "aten_kv_cache.hpp"
#include "aten_view.hpp"
#include "selm/base/error.hpp"

// n query rows, m key rows, G = NH/NK query heads per key/value head. Every product is of fresh contiguous matrices
// whose shape depends on the row's own sequence only, so its bits do not depend on what else is in the call.
namespace selm {

using aten::as_f32;
using aten::heads_first;
using aten::view;
using aten::view_heads;

namespace {

/// Query rows per score matrix, at multiples of the segment's own position.
constexpr std::int64_t query_tile = 256;

struct Inputs {
    at::Tensor q; ///< [T, NH, D]
    at::Tensor k; ///< [T, NK, D]
    at::Tensor v; ///< [T, NK, D]
};

Inputs split(const Tensor& qkv, const AttentionShape& shape)
{
    SELM_EXPECT(shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0);
    SELM_EXPECT(qkv.columns == (shape.heads + 2 * shape.kv_heads) * shape.head_dim);
    const std::int64_t q_width = shape.heads * shape.head_dim;
    const std::int64_t k_width = shape.kv_heads * shape.head_dim;
    return {view_heads(qkv, 0, shape.heads, shape.head_dim), view_heads(qkv, q_width, shape.kv_heads, shape.head_dim),
            view_heads(qkv, q_width + k_width, shape.kv_heads, shape.head_dim)};
}

void expect_segments(std::span<const Segment> segments, std::int64_t tokens)
{
    std::int64_t next = 0;
    for (std::size_t i = 0; i < segments.size(); ++i) {
        const Segment& s = segments[i];
        SELM_EXPECT(s.begin == next && s.length >= 1 && s.trunk < static_cast<std::int64_t>(i));
        SELM_EXPECT(s.trunk < 0 || segments[static_cast<std::size_t>(s.trunk)].trunk < 0);
        next += s.length;
    }
    SELM_EXPECT(next == tokens);
}

/// [NH, n, D] grouped by key/value head: [NK, G*n, D].
at::Tensor grouped(const at::Tensor& x, std::int64_t kv_heads) { return x.reshape({kv_heads, -1, x.size(2)}); }

/// Scaled scores [NH, n, m]; the last n keys are the queries' own tokens (causal), all others are visible.
at::Tensor masked_scores(const at::Tensor& q, const at::Tensor& k, const AttentionShape& shape)
{
    const std::int64_t n = q.size(1);
    const std::int64_t m = k.size(1);
    at::Tensor scores = at::bmm(grouped(q, shape.kv_heads), k.transpose(1, 2)).view({shape.heads, n, m});
    scores.mul_(static_cast<double>(shape.scale));
    if (n > 1) {
        const at::Tensor later = at::ones({n, n}, scores.options().dtype(at::kBool)).triu_(1);
        scores.narrow(2, m - n, n).masked_fill_(later, -std::numeric_limits<double>::infinity());
    }
    return scores;
}

struct Attended {
    at::Tensor out; ///< [NH, n, D]
    at::Tensor lse; ///< [NH, n]
};

Attended attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionShape& shape)
{
    at::Tensor scores = masked_scores(q, k, shape);
    const at::Tensor largest = scores.amax({2}, true);
    scores.sub_(largest).exp_();
    const at::Tensor sum = scores.sum({2}, true);
    at::Tensor out = at::bmm(grouped(scores, shape.kv_heads), v).view({shape.heads, q.size(1), shape.head_dim});
    return {out.div_(sum), sum.log().add_(largest).squeeze(2)};
}

/// Keys (or values) that rows [0, end) of a segment see: the trunk's, then the segment's own. f32 [NK, m, D].
at::Tensor visible(const at::Tensor& x, std::span<const Segment> segments, const Segment& segment, std::int64_t end)
{
    const at::Tensor own = x.narrow(0, segment.begin, end);
    if (segment.trunk < 0)
        return heads_first(own);
    const Segment& trunk = segments[static_cast<std::size_t>(segment.trunk)];
    return heads_first(at::cat({x.narrow(0, trunk.begin, trunk.length), own}, 0));
}

/// Adds d [NK, m, D] of the keys that visible() collected to acc [T, NK, D].
void add_visible(at::Tensor acc, std::span<const Segment> segments, const Segment& segment, std::int64_t end,
                 const at::Tensor& d)
{
    const at::Tensor rows = d.permute({1, 0, 2});
    const std::int64_t trunk_length = rows.size(0) - end;
    if (segment.trunk >= 0)
        acc.narrow(0, segments[static_cast<std::size_t>(segment.trunk)].begin, trunk_length)
            .add_(rows.narrow(0, 0, trunk_length));
    acc.narrow(0, segment.begin, end).add_(rows.narrow(0, trunk_length, end));
}

struct KeyValueGradients {
    at::Tensor k; ///< f32 [T, NK, D]
    at::Tensor v; ///< f32 [T, NK, D]
};

/// A tile of query rows, its results and their gradient: f32 [NH, n, D], lse [NH, n, 1].
struct QueryTile {
    at::Tensor q;
    at::Tensor out;
    at::Tensor d_out;
    at::Tensor lse;
};

/// Returns dq [NH, n, D] of the tile that ends at row `end` of its segment; adds to sums what its keys and values get.
at::Tensor attend_backward(const QueryTile& tile, const Inputs& in, std::span<const Segment> segments,
                           const Segment& segment, std::int64_t end, const AttentionShape& shape,
                           const KeyValueGradients& sums)
{
    const at::Tensor k = visible(in.k, segments, segment, end);
    const at::Tensor v = visible(in.v, segments, segment, end);
    const at::Tensor q = grouped(tile.q, shape.kv_heads);
    const at::Tensor d_out = grouped(tile.d_out, shape.kv_heads);
    const at::Tensor delta = tile.d_out.mul(tile.out).sum({2}, true);
    const at::Tensor p_heads = masked_scores(tile.q, k, shape).sub_(tile.lse).exp_();
    const at::Tensor ds_heads = at::bmm(d_out, v.transpose(1, 2)).view_as(p_heads);
    ds_heads.sub_(delta).mul_(p_heads).mul_(static_cast<double>(shape.scale));
    const at::Tensor p = grouped(p_heads, shape.kv_heads);
    const at::Tensor ds = grouped(ds_heads, shape.kv_heads);
    add_visible(sums.k, segments, segment, end, at::bmm(ds.transpose(1, 2), q));
    add_visible(sums.v, segments, segment, end, at::bmm(p.transpose(1, 2), d_out));
    return at::bmm(ds, k).view_as(tile.q);
}

void expect_span(const CachedSpan& span, const AtenKvCache& cache, std::int64_t rows, bool may_be_of_no_sequence)
{
    SELM_EXPECT(span.slot >= (may_be_of_no_sequence ? -1 : 0) && span.slot < cache.slots() && span.count >= 1);
    SELM_EXPECT(span.row_begin >= 0 && span.row_begin + span.count <= rows);
    SELM_EXPECT(span.position_begin >= 0 && span.position_begin + span.count <= cache.capacity());
    SELM_EXPECT(span.prefill ? span.position_begin % prefill_tile == 0 : span.count == 1);
    SELM_EXPECT(span.prefix_slot < 0 || (span.prefill && span.position_begin > 0 && span.prefix_slot < cache.slots() &&
                                         span.prefix_slot != span.slot));
}

void expect_head_dim_of_parts(const AttentionShape& shape)
{
    SELM_VALIDATE(shape.head_dim % 8 == 0 && shape.head_dim <= 256, ExitCode::configuration,
                  "the model's attention heads have " << shape.head_dim << " dimensions; attention on CUDA devices takes multiples "
                  "of 8 up to 256. Pass --device cpu");
}

void copy_prefix(const AtenKvCache& cache, std::int64_t layer, const CachedSpan& span)
{
    if (span.prefix_slot < 0)
        return;
    const std::int64_t count = span.position_begin;
    cache.keys(layer, span.slot).narrow(0, 0, count).copy_(cache.keys(layer, span.prefix_slot).narrow(0, 0, count));
    cache.values(layer, span.slot).narrow(0, 0, count).copy_(cache.values(layer, span.prefix_slot).narrow(0, 0, count));
}

/// A span's tokens, whose keys and values are in the cache, to their sequence up to themselves. q, out [T, NH, D].
void attend_span(const at::Tensor& q, const AttentionShape& shape, const AtenKvCache& cache, std::int64_t layer,
                 const CachedSpan& span, const at::Tensor& out)
{
    const at::Tensor keys = cache.keys(layer, span.slot), values = cache.values(layer, span.slot);
    for (std::int64_t begin = 0; begin < span.count; begin += prefill_tile) {
        const std::int64_t n = std::min(prefill_tile, span.count - begin);
        const std::int64_t end = span.position_begin + begin + n;
        const Attended result = attend(heads_first(q.narrow(0, span.row_begin + begin, n)), heads_first(keys.narrow(0, 0, end)),
                                       heads_first(values.narrow(0, 0, end)), shape);
        out.narrow(0, span.row_begin + begin, n).copy_(result.out.permute({1, 0, 2}));
    }
}

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
    expect_head_dim_of_parts(shape);
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
        aten::add_rows(sum, plan.key_rows, as_f32(of_keys));
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
                attend_span(q, shape, cache, layer, span, out);
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
        copy_prefix(cache, layer, span);
    if (plan.longest_single > 0)
        attention.attend(view(qkv), shape, stored, plan.single, plan.longest_single, view(out));
    prefill_attention(split(qkv, shape).q, shape, cache, layer, plan, view_heads(out, 0, shape.heads, shape.head_dim));
}

void AtenEngine::attention(const Tensor& qkv, const AttentionShape& shape, std::span<const Segment> segments,
                           const Tensor& out, const Tensor& lse)
{
    SELM_EXPECT(out.rows == qkv.rows && out.columns == shape.heads * shape.head_dim);
    SELM_EXPECT(lse.empty() || (lse.rows == shape.heads && lse.columns == qkv.rows));
    expect_segments(segments, qkv.rows);
    const c10::InferenceMode no_autograd;
    if (qkv.rows == 0)
        return;
    if (parts_.packed_attention) {
        packed_attention(qkv, shape, segments, out, lse);
        return;
    }
    const Inputs in = split(qkv, shape);
    const at::Tensor out_heads = view_heads(out, 0, shape.heads, shape.head_dim);
    for (const Segment& segment : segments) {
        for (std::int64_t begin = 0; begin < segment.length; begin += query_tile) {
            const std::int64_t end = std::min(begin + query_tile, segment.length);
            const at::Tensor q = heads_first(in.q.narrow(0, segment.begin + begin, end - begin));
            const Attended result =
                attend(q, visible(in.k, segments, segment, end), visible(in.v, segments, segment, end), shape);
            out_heads.narrow(0, segment.begin + begin, end - begin).copy_(result.out.permute({1, 0, 2}));
            if (!lse.empty())
                view(lse.slice_columns(segment.begin + begin, end - begin)).copy_(result.lse);
        }
    }
}

void AtenEngine::attention_backward(const Tensor& qkv, const AttentionShape& shape, std::span<const Segment> segments,
                                    const Tensor& out, const Tensor& lse, const Tensor& dout, const Tensor& dqkv)
{
    SELM_EXPECT(dqkv.rows == qkv.rows && dqkv.columns == qkv.columns && lse.rows == shape.heads &&
                lse.columns == qkv.rows);
    SELM_EXPECT(out.rows == qkv.rows && dout.rows == qkv.rows);
    expect_segments(segments, qkv.rows);
    const c10::InferenceMode no_autograd;
    if (qkv.rows == 0)
        return;
    if (parts_.packed_attention) {
        packed_attention_backward(qkv, shape, segments, out, lse, dout, dqkv);
        return;
    }
    const Inputs in = split(qkv, shape);
    const Inputs d_in = split(dqkv, shape);
    const at::Tensor out_heads = view_heads(out, 0, shape.heads, shape.head_dim);
    const at::Tensor dout_heads = view_heads(dout, 0, shape.heads, shape.head_dim);
    const KeyValueGradients sums{at::zeros(in.k.sizes(), in.k.options().dtype(at::kFloat)),
                                 at::zeros(in.v.sizes(), in.v.options().dtype(at::kFloat))};
    for (const Segment& segment : segments) {
        for (std::int64_t begin = 0; begin < segment.length; begin += query_tile) {
            const std::int64_t end = std::min(begin + query_tile, segment.length);
            const std::int64_t n = end - begin;
            const std::int64_t row = segment.begin + begin;
            const at::Tensor dq = attend_backward(
                {heads_first(in.q.narrow(0, row, n)), heads_first(out_heads.narrow(0, row, n)),
                 heads_first(dout_heads.narrow(0, row, n)), view(lse.slice_columns(row, n)).unsqueeze(2)},
                in, segments, segment, end, shape, sums);
            d_in.q.narrow(0, row, n).copy_(dq.permute({1, 0, 2}));
        }
    }
    d_in.k.copy_(sums.k);
    d_in.v.copy_(sums.v);
}

std::unique_ptr<KvCache> AtenEngine::make_cache(std::int64_t layers, std::int64_t slots, std::int64_t capacity,
                                                const AttentionShape& shape)
{
    if (parts_.cached_attention)
        expect_head_dim_of_parts(shape);
    const c10::InferenceMode no_autograd;
    const auto options = at::TensorOptions(aten::scalar_type(activation_)).device(aten::at_device(device_));
    const auto sizes = {layers, slots, capacity, shape.kv_heads, shape.head_dim};
    return std::make_unique<AtenKvCache>(at::empty(sizes, options), at::empty(sizes, options));
}

void AtenEngine::attention_cached(const Tensor& qkv, const AttentionShape& shape, KvCache& cache, std::int64_t layer,
                                  std::span<const CachedSpan> spans, const Tensor& out)
{
    auto& store = dynamic_cast<AtenKvCache&>(cache);
    SELM_EXPECT(layer >= 0 && layer < store.layers());
    SELM_EXPECT(out.rows == qkv.rows && out.columns == shape.heads * shape.head_dim);
    for (const CachedSpan& span : spans)
        expect_span(span, store, qkv.rows, step_ != nullptr);
    const c10::InferenceMode no_autograd;
    if (spans.empty())
        return;
    if (parts_.cached_attention) {
        cached_attention_by_parts(qkv, shape, store, layer, spans, out);
        return;
    }
    const Inputs in = split(qkv, shape);
    const at::Tensor out_heads = view_heads(out, 0, shape.heads, shape.head_dim);
    for (const CachedSpan& span : spans) {
        if (span.slot < 0)
            continue;
        copy_prefix(store, layer, span);
        store.keys(layer, span.slot).narrow(0, span.position_begin, span.count).copy_(in.k.narrow(0, span.row_begin, span.count));
        store.values(layer, span.slot).narrow(0, span.position_begin, span.count).copy_(in.v.narrow(0, span.row_begin, span.count));
        attend_span(in.q, shape, store, layer, span, out_heads);
    }
}

} // namespace selm
