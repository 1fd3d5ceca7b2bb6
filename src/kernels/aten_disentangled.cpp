#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <vector>

#include "aten_engine.hpp"
#include "aten_view.hpp"

// Disentangled attention, head by head in batches; n query rows of a tile, L tokens of the segment, S relative
// positions. Shapes depend on the segment alone, and so do the bits.
namespace selm {

using aten::heads_first;
using aten::view;
using aten::view_heads;

namespace {

/// Query rows per score matrix, at multiples of the segment's own position: no [L, L] matrix exists.
constexpr std::int64_t query_tile = 256;

/// One segment: f32 [NH, L, D], relative rows [NH, S, D].
struct Inputs {
    at::Tensor q, k, v, relative_q, relative_k;
    at::Tensor position_to_content; ///< [NH, S, L] = RQ K^T
};

void expect_arguments(const Tensor& qkv, const Tensor& relative, const DisentangledShape& shape,
                      std::span<const Segment> segments)
{
    SELM_EXPECT(qkv.columns == 3 * shape.heads * shape.head_dim);
    SELM_EXPECT(relative.columns == 2 * shape.heads * shape.head_dim && shape.relative_index.size() % 2 == 1);
    std::int64_t next = 0;
    for (const Segment& segment : segments) {
        SELM_EXPECT(segment.begin == next && segment.length >= 1 && segment.trunk < 0);
        SELM_EXPECT(2 * segment.length - 1 <= static_cast<std::int64_t>(shape.relative_index.size()));
        next += segment.length;
    }
    SELM_EXPECT(next == qkv.rows);
    for (const std::int32_t index : shape.relative_index)
        SELM_EXPECT(index >= 0 && index < relative.rows);
}

Inputs inputs_of(const Tensor& qkv, const Tensor& relative, const DisentangledShape& shape, const Segment& segment)
{
    const std::int64_t width = shape.heads * shape.head_dim;
    const auto rows = [&](const Tensor& x, std::int64_t column) {
        return heads_first(view_heads(x, column, shape.heads, shape.head_dim));
    };
    const Tensor own = qkv.slice_rows(segment.begin, segment.length);
    Inputs in{rows(own, 0), rows(own, width), rows(own, 2 * width), rows(relative, 0), rows(relative, width), {}};
    in.position_to_content = at::bmm(in.relative_q, in.k.transpose(1, 2));
    return in;
}

/// Rows of the relative projections, [NH, n, L] (expanded), for queries [begin, begin + n).
at::Tensor relative_rows(const DisentangledShape& shape, std::int64_t begin, std::int64_t n, std::int64_t length,
                         Device device)
{
    const auto middle = static_cast<std::int64_t>(shape.relative_index.size() / 2);
    std::vector<std::int64_t> host;
    host.reserve(static_cast<std::size_t>(n * length));
    for (std::int64_t query = begin; query < begin + n; ++query)
        for (std::int64_t key = 0; key < length; ++key)
            host.push_back(shape.relative_index[static_cast<std::size_t>(middle + query - key)]);
    const at::Tensor index = aten::index_tensor(std::span<const std::int64_t>(host), device).clone();
    return index.view({1, n, length}).expand({shape.heads, n, length});
}

at::Tensor scaled_scores(const Inputs& in, const DisentangledShape& shape, const at::Tensor& q, const at::Tensor& index)
{
    at::Tensor scores = at::bmm(q, in.k.transpose(1, 2));
    scores.add_(at::bmm(q, in.relative_k.transpose(1, 2)).gather(2, index));
    scores.add_(in.position_to_content.gather(1, index));
    return scores.mul_(static_cast<double>(shape.scale));
}

} // namespace

void AtenEngine::disentangled_attention(const Tensor& qkv, const Tensor& relative, const DisentangledShape& shape,
                                        std::span<const Segment> segments, const Tensor& out, const Tensor& lse)
{
    expect_arguments(qkv, relative, shape, segments);
    SELM_EXPECT(out.rows == qkv.rows && out.columns == shape.heads * shape.head_dim);
    SELM_EXPECT(lse.empty() || (lse.rows == shape.heads && lse.columns == qkv.rows));
    const c10::InferenceMode no_autograd;
    for (const Segment& segment : segments) {
        const Inputs in = inputs_of(qkv, relative, shape, segment);
        for (std::int64_t begin = 0; begin < segment.length; begin += query_tile) {
            const std::int64_t n = std::min(query_tile, segment.length - begin), row = segment.begin + begin;
            const at::Tensor index = relative_rows(shape, begin, n, segment.length, device_);
            at::Tensor scores = scaled_scores(in, shape, in.q.narrow(1, begin, n), index);
            const at::Tensor largest = scores.amax({2}, true);
            scores.sub_(largest).exp_();
            const at::Tensor sum = scores.sum({2}, true);
            const at::Tensor result = at::bmm(scores, in.v).div_(sum);
            view_heads(out.slice_rows(row, n), 0, shape.heads, shape.head_dim).copy_(result.permute({1, 0, 2}));
            if (!lse.empty())
                view(lse.slice_columns(row, n)).copy_(sum.log().add_(largest).squeeze(2));
        }
    }
}

void AtenEngine::disentangled_attention_backward(const Tensor& qkv, const Tensor& relative,
                                                 const DisentangledShape& shape, std::span<const Segment> segments,
                                                 const Tensor& out, const Tensor& lse, const Tensor& dout,
                                                 const Tensor& dqkv, const Tensor& drelative)
{
    expect_arguments(qkv, relative, shape, segments);
    const std::int64_t heads = shape.heads, dim = shape.head_dim, width = heads * dim;
    SELM_EXPECT(out.rows == qkv.rows && out.columns == width && dout.rows == qkv.rows && dout.columns == width);
    SELM_EXPECT(dqkv.rows == qkv.rows && dqkv.columns == qkv.columns && lse.rows == heads && lse.columns == qkv.rows);
    SELM_EXPECT(drelative.rows == relative.rows && drelative.columns == relative.columns);
    const c10::InferenceMode no_autograd;
    fill_zero(drelative);
    const auto rows = [&](const Tensor& x, std::int64_t row, std::int64_t n) {
        return heads_first(view_heads(x.slice_rows(row, n), 0, heads, dim));
    };
    for (const Segment& segment : segments) {
        const std::int64_t length = segment.length;
        const Inputs in = inputs_of(qkv, relative, shape, segment);
        const at::Tensor dk = at::zeros_like(in.k), dv = at::zeros_like(in.v),
                         d_relative_k = at::zeros_like(in.relative_k),
                         d_position_to_content = at::zeros_like(in.position_to_content);
        const Tensor d_own = dqkv.slice_rows(segment.begin, length);
        for (std::int64_t begin = 0; begin < length; begin += query_tile) {
            const std::int64_t n = std::min(query_tile, length - begin), row = segment.begin + begin;
            const at::Tensor index = relative_rows(shape, begin, n, length, device_);
            const at::Tensor q = in.q.narrow(1, begin, n), d_out = rows(dout, row, n);
            const at::Tensor delta = d_out.mul(rows(out, row, n)).sum({2}, true);
            const at::Tensor p =
                scaled_scores(in, shape, q, index).sub_(view(lse.slice_columns(row, n)).unsqueeze(2)).exp_();
            const at::Tensor ds = at::bmm(d_out, in.v.transpose(1, 2))
                                      .sub_(delta)
                                      .mul_(p)
                                      .mul_(static_cast<double>(shape.scale));
            at::Tensor d_content_to_position = at::zeros({heads, n, relative.rows}, ds.options());
            d_content_to_position.scatter_add_(2, index, ds);
            d_position_to_content.scatter_add_(1, index, ds);
            const at::Tensor dq = at::bmm(ds, in.k).add_(at::bmm(d_content_to_position, in.relative_k));
            view_heads(d_own.slice_rows(begin, n), 0, heads, dim).copy_(dq.permute({1, 0, 2}));
            dk.add_(at::bmm(ds.transpose(1, 2), q));
            dv.add_(at::bmm(p.transpose(1, 2), d_out));
            d_relative_k.add_(at::bmm(d_content_to_position.transpose(1, 2), q));
        }
        dk.add_(at::bmm(d_position_to_content.transpose(1, 2), in.relative_q));
        view_heads(d_own, width, heads, dim).copy_(dk.permute({1, 0, 2}));
        view_heads(d_own, 2 * width, heads, dim).copy_(dv.permute({1, 0, 2}));
        view_heads(drelative, 0, heads, dim).add_(at::bmm(d_position_to_content, in.k).permute({1, 0, 2}));
        view_heads(drelative, width, heads, dim).add_(d_relative_k.permute({1, 0, 2}));
    }
}

} // namespace selm
