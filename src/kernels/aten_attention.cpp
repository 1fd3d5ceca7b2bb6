#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "aten_attention.hpp"
#include "aten_engine.hpp"
#include "aten_view.hpp"
#include "selm/base/error.hpp"

// n query rows, m key rows, G = NH/NK query heads per key/value head. Every product is of fresh contiguous matrices
// whose shape depends on the row's own sequence only, so its bits do not depend on what else is in the call.
namespace selm {

using aten::heads_first;
using aten::Inputs;
using aten::split;
using aten::view;
using aten::view_heads;

namespace {

/// Query rows per score matrix, at multiples of the segment's own position.
constexpr std::int64_t query_tile = 256;

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

} // namespace

aten::Inputs aten::split(const Tensor& qkv, const AttentionShape& shape)
{
    SELM_EXPECT(shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0);
    SELM_EXPECT(qkv.columns == (shape.heads + 2 * shape.kv_heads) * shape.head_dim);
    const std::int64_t q_width = shape.heads * shape.head_dim;
    const std::int64_t k_width = shape.kv_heads * shape.head_dim;
    return {view_heads(qkv, 0, shape.heads, shape.head_dim), view_heads(qkv, q_width, shape.kv_heads, shape.head_dim),
            view_heads(qkv, q_width + k_width, shape.kv_heads, shape.head_dim)};
}

void aten::copy_prefix(const AtenKvCache& cache, std::int64_t layer, const CachedSpan& span)
{
    if (span.prefix_slot < 0)
        return;
    const std::int64_t count = span.position_begin;
    cache.keys(layer, span.slot).narrow(0, 0, count).copy_(cache.keys(layer, span.prefix_slot).narrow(0, 0, count));
    cache.values(layer, span.slot).narrow(0, 0, count).copy_(cache.values(layer, span.prefix_slot).narrow(0, 0, count));
}

void aten::attend_span(const at::Tensor& q, const AttentionShape& shape, const AtenKvCache& cache, std::int64_t layer,
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
        aten::check_head_dim(shape);
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
        aten::copy_prefix(store, layer, span);
        store.keys(layer, span.slot).narrow(0, span.position_begin, span.count).copy_(in.k.narrow(0, span.row_begin, span.count));
        store.values(layer, span.slot).narrow(0, span.position_begin, span.count).copy_(in.v.narrow(0, span.row_begin, span.count));
        aten::attend_span(in.q, shape, store, layer, span, out_heads);
    }
}

} // namespace selm
