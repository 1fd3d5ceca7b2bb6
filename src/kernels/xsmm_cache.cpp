#include <algorithm>
#include <limits>

#include "selm/base/error.hpp"
#include "simd.hpp"
#include "xsmm_attention.hpp"
#include "xsmm_blocks.hpp"
#include "xsmm_cache.hpp"
#include "xsmm_engine.hpp"

namespace selm::xsmm {
namespace {

/// Stores keys and values of the span's tokens.
void write_span(const Tensor& qkv, const AttentionShape& shape, const XsmmKvCache& cache, std::int64_t layer,
                const CachedSpan& span)
{
    const std::int64_t dim = shape.head_dim;
    for (std::int64_t kv = 0; kv < shape.kv_heads; ++kv) {
        float* const keys = cache.keys(layer, span.slot, kv);
        float* const values = cache.values(layer, span.slot, kv);
        for (std::int64_t i = 0; i < span.count; ++i) {
            const std::int64_t position = span.position_begin + i;
            const float* const key = qkv.row_f32(span.row_begin + i) + (shape.heads + kv) * dim;
            const float* const value = key + shape.kv_heads * dim;
            float* const to = keys + position / tile * tile * dim + position % tile;
            for (std::int64_t d = 0; d < dim; ++d)
                to[d * tile] = key[d];
            std::copy(value, value + dim, values + position * dim);
        }
    }
}

/// Softmax of one row of scaled scores, in place, without the division. @return the sum of the exponentials.
float soften_decode_row(float* scores, std::int64_t keys, float scale)
{
    const std::int64_t padded = (keys + 7) / 8 * 8;
    for (std::int64_t i = keys; i < padded; ++i)
        scores[i] = -std::numeric_limits<float>::infinity();
    simd::Float8 largest = simd::broadcast(-std::numeric_limits<float>::infinity());
    for (std::int64_t i = 0; i < padded; i += 8)
        largest = simd::max(largest, simd::load(scores + i) * scale);
    const float max = simd::max_lanes(largest);
    simd::Float8 sum = simd::broadcast(0.0f);
    for (std::int64_t i = 0; i < padded; i += 8) {
        const simd::Float8 p = simd::exp_nonpositive(simd::load(scores + i) * scale - max);
        simd::store(scores + i, p);
        sum += p;
    }
    return simd::sum_lanes(sum);
}

} // namespace

std::unique_ptr<KvCache> XsmmEngine::make_cache(std::int64_t layers, std::int64_t slots, std::int64_t capacity,
                                                const AttentionShape& shape)
{
    return std::make_unique<XsmmKvCache>(layers, slots, capacity, shape, uses_bf16_);
}

void XsmmEngine::decode_row(const float* qkv_row, const AttentionShape& shape, const KvCache& any_cache,
                            std::int64_t layer, std::int64_t slot, std::int64_t position, float* out_row)
{
    const auto& cache = static_cast<const XsmmKvCache&>(any_cache);
    const std::int64_t dim = shape.head_dim, group = shape.heads / shape.kv_heads, keys = position + 1;
    const std::int64_t stride = blocks_of(cache.capacity()) * tile;
    float* const scores = decode_scores_.get(group * stride);
    const GemmKernel score_kernel = kernels_.find(decode_score_shape(group, dim, stride, false));
    const auto value_kernel = [&](std::int64_t begin) {
        return kernels_.find({.m = narrow(dim),
                              .n = narrow(group),
                              .k = narrow(std::min<std::int64_t>(tile, keys - begin)),
                              .lda = narrow(dim),
                              .ldb = narrow(stride),
                              .ldc = narrow(dim),
                              .accumulate = begin > 0});
    };
    const std::int64_t last = (keys - 1) / tile * tile;
    const GemmKernel first_kernel = value_kernel(0), last_kernel = value_kernel(last),
                     middle_kernel = last > tile ? value_kernel(tile) : last_kernel;
    for (std::int64_t kv = 0; kv < shape.kv_heads; ++kv) {
        const float* const key_blocks = cache.keys(layer, slot, kv);
        const float* const values = cache.values(layer, slot, kv);
        const float* const queries = qkv_row + kv * group * dim;
        float* const out = out_row + kv * group * dim;
        for (std::int64_t begin = 0; begin < keys; begin += tile)
            score_kernel(key_blocks + begin * dim, queries, scores + begin);
        float sums[max_group];
        for (std::int64_t head = 0; head < group; ++head)
            sums[head] = soften_decode_row(scores + head * stride, keys, shape.scale);
        first_kernel(values, scores, out);
        for (std::int64_t begin = tile; begin < last; begin += tile)
            middle_kernel(values + begin * dim, scores + begin, out);
        if (last > 0)
            last_kernel(values + last * dim, scores + last, out);
        for (std::int64_t head = 0; head < group; ++head)
            for (std::int64_t d = 0; d < dim; ++d)
                out[head * dim + d] /= sums[head];
    }
}

void XsmmEngine::prefill_span(const Tensor& qkv, const AttentionShape& shape, const KvCache& any_cache,
                              std::int64_t layer, const CachedSpan& span, const Tensor& out)
{
    const auto& cache = static_cast<const XsmmKvCache&>(any_cache);
    const std::int64_t dim = shape.head_dim, group = shape.heads / shape.kv_heads;
    const std::int64_t positions = span.position_begin + span.count;
    for (std::int64_t kv = 0; kv < shape.kv_heads; ++kv) {
        const float* const key_blocks = cache.keys(layer, span.slot, kv);
        const float* const values = cache.values(layer, span.slot, kv);
        key_tiles_.clear();
        for (std::int64_t begin = 0; begin < positions; begin += tile) {
            key_tiles_.push_back({.keys_transposed = key_blocks + begin * dim,
                                  .values = values + begin * dim,
                                  .keys = narrow(std::min<std::int64_t>(tile, positions - begin)),
                                  .is_diagonal = begin + tile > span.position_begin});
            if (begin + tile <= span.position_begin)
                continue;
            const std::int64_t first = std::max(begin, span.position_begin);
            const std::int64_t row = span.row_begin + first - span.position_begin;
            for (std::int64_t head = kv * group; head < (kv + 1) * group; ++head)
                attend({.queries = qkv.row_f32(row) + head * dim,
                        .out = out.row_f32(row) + head * dim,
                        .lse = nullptr,
                        .rows = narrow(begin + key_tiles_.back().keys - first),
                        .head_dim = narrow(dim),
                        .query_stride = narrow(qkv.stride),
                        .value_stride = narrow(dim),
                        .out_stride = narrow(out.stride),
                        .before = narrow(first - begin),
                        .scale = shape.scale},
                       key_tiles_);
            key_tiles_.back().is_diagonal = false;
        }
    }
}

void XsmmEngine::attention_cached(const Tensor& qkv, const AttentionShape& shape, KvCache& cache, std::int64_t layer,
                                  std::span<const CachedSpan> spans, const Tensor& out)
{
    const auto* own_cache = dynamic_cast<const XsmmKvCache*>(&cache);
    SELM_EXPECT(own_cache != nullptr && own_cache->fits(shape, layer));
    SELM_EXPECT(shape.heads % shape.kv_heads == 0 && shape.heads / shape.kv_heads <= max_group);
    SELM_EXPECT(qkv.columns == (shape.heads + 2 * shape.kv_heads) * shape.head_dim);
    SELM_EXPECT(out.rows == qkv.rows && out.columns == shape.heads * shape.head_dim);
    for (const CachedSpan& span : spans) {
        SELM_EXPECT(span.slot >= 0 && span.slot < cache.slots() && span.count >= 1 && span.position_begin >= 0);
        SELM_EXPECT(span.position_begin + span.count <= cache.capacity());
        SELM_EXPECT(span.row_begin >= 0 && span.row_begin + span.count <= qkv.rows);
        SELM_EXPECT(!span.prefill || span.prefix_slot >= 0 || span.position_begin % prefill_tile == 0);
        if (span.prefix_slot >= 0) {
            SELM_EXPECT(span.prefill && span.prefix_slot < cache.slots() && span.prefix_slot != span.slot);
            SELM_EXPECT(span.position_begin > 0 && span.position_begin % prefix_granularity() == 0);
            own_cache->copy_prefix(layer, span.prefix_slot, span.slot, span.position_begin);
        }
        if (uses_bf16_) {
            attend_span_bf16(qkv, shape, cache, layer, span, out);
            continue;
        }
        write_span(qkv, shape, *own_cache, layer, span);
        if (span.prefill) {
            prefill_span(qkv, shape, cache, layer, span, out);
            continue;
        }
        for (std::int64_t i = 0; i < span.count; ++i)
            decode_row(qkv.row_f32(span.row_begin + i), shape, cache, layer, span.slot, span.position_begin + i,
                       out.row_f32(span.row_begin + i));
    }
}

} // namespace selm::xsmm
