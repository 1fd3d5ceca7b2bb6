#include <algorithm>
#include <cstring>

#include "bf16_rows.hpp"
#include "bf16_softmax.hpp"
#include "selm/base/error.hpp"
#include "xsmm_attention.hpp"
#include "xsmm_blocks.hpp"
#include "xsmm_cache.hpp"
#include "xsmm_engine.hpp"

// Cached attention on keys and values rounded to bf16. Keys lie in pairs of neighbouring elements, 64 keys side by side, and
// values in pairs of neighbouring keys, as the products of decoding and of prefill take them.
namespace selm::xsmm {
namespace {

/// Stores the key and the value of one position; a value that opens a pair is paired with zeros.
void write_position(const float* key, const float* value, std::int64_t position, std::int64_t dim, float* keys,
                    float* values, float* scratch)
{
    pair_columns(key, dim, 1, dim, scratch, dim / 2);
    float* const block = keys + position / tile * tile * dim / 2 + position % tile;
    for (std::int64_t d = 0; d < dim / 2; ++d)
        block[d * tile] = scratch[d];
    float* const to = values + position / 2 * dim;
    if (position % 2 == 0) {
        pair_rows(value, dim, 1, dim, to, dim);
        return;
    }
    pair_columns(value, dim, 1, dim, scratch, dim / 2);
    for (std::int64_t d = 0; d < dim; ++d)
        std::memcpy(reinterpret_cast<char*>(to + d) + 2, reinterpret_cast<const char*>(scratch) + 2 * d, 2);
}

} // namespace

void XsmmEngine::attend_span_bf16(const Tensor& qkv, const AttentionShape& shape, const KvCache& any_cache,
                                  std::int64_t layer, const CachedSpan& span, const Tensor& out)
{
    const auto& cache = static_cast<const XsmmKvCache&>(any_cache);
    const std::int64_t dim = shape.head_dim, group = shape.heads / shape.kv_heads, block_pairs = tile * dim / 2;
    SELM_EXPECT(dim % 2 == 0 && shape.scale > 0);
    float* const scratch = keys_transposed_.get(block_pairs);
    for (std::int64_t kv = 0; kv < shape.kv_heads; ++kv) {
        float* const keys = cache.keys(layer, span.slot, kv);
        float* const values = cache.values(layer, span.slot, kv);
        const std::int64_t key_column = (shape.heads + kv) * dim, value_column = key_column + shape.kv_heads * dim;
        for (std::int64_t i = 0; !span.prefill && i < span.count; ++i) {
            const float* const row = qkv.row_f32(span.row_begin + i);
            write_position(row + key_column, row + value_column, span.position_begin + i, dim, keys, values, scratch);
        }
        for (std::int64_t begin = 0, count = 0; span.prefill && begin < span.count; begin += count) {
            const std::int64_t block = (span.position_begin + begin) / tile;
            const std::int64_t before = (span.position_begin + begin) % tile; // a copied prefix
            count = std::min<std::int64_t>(tile - before, span.count - begin);
            const Tensor rows = qkv.slice_rows(span.row_begin + begin, count);
            float* const block_keys = keys + block * block_pairs;
            float* const block_values = values + block * block_pairs;
            pack_key_block(rows.f32() + key_column, qkv.stride, count, dim, scratch, block_keys, before);
            pack_value_block(rows.f32() + value_column, qkv.stride, count, dim, block_values, before);
            bf16_key_tiles_.clear();
            append_bf16_tiles(keys, values, block, block * tile, dim);
            append_bf16_diagonal(block_keys, block_values, before + count, dim, before);
            attend_bf16({.from = rows.f32() + kv * group * dim,
                         .out = out.row_f32(span.row_begin + begin) + kv * group * dim,
                         .queries = count,
                         .group = group,
                         .head_dim = dim,
                         .stride = qkv.stride,
                         .out_stride = out.stride,
                         .scale = shape.scale},
                        bf16_key_tiles_);
        }
    }
    for (std::int64_t i = 0; !span.prefill && i < span.count; ++i)
        decode_row_bf16(qkv.row_f32(span.row_begin + i), shape, cache, layer, span.slot, span.position_begin + i,
                        out.row_f32(span.row_begin + i));
}

void XsmmEngine::decode_row_bf16(const float* qkv_row, const AttentionShape& shape, const KvCache& any_cache,
                                 std::int64_t layer, std::int64_t slot, std::int64_t position, float* out_row)
{
    const auto& cache = static_cast<const XsmmKvCache&>(any_cache);
    const std::int64_t dim = shape.head_dim, group = shape.heads / shape.kv_heads, keys = position + 1;
    const std::int64_t stride = blocks_of(cache.capacity()) * tile;
    float* const scores = decode_scores_.get(group * stride);
    float* const weights = weight_tile_.get(group * stride / 2);
    float* const queries = query_pairs_.get(shape.heads * dim / 2);
    pair_columns(qkv_row, shape.heads * dim, 1, shape.heads * dim, queries, shape.heads * dim / 2);
    const GemmKernel score_kernel = kernels_.find(decode_score_shape(group, dim, stride, true));
    const auto value_kernel = [&](std::int64_t begin) {
        return kernels_.find({.m = narrow(dim),
                              .n = narrow(group),
                              .k = narrow(std::min<std::int64_t>(tile, (keys - begin + 1) / 2 * 2)),
                              .lda = narrow(dim),
                              .ldb = narrow(stride),
                              .ldc = narrow(dim),
                              .accumulate = begin > 0,
                              .bf16 = true});
    };
    const std::int64_t last = (keys - 1) / tile * tile;
    const GemmKernel first_kernel = value_kernel(0), last_kernel = value_kernel(last),
                     middle_kernel = last > tile ? value_kernel(tile) : last_kernel;
    for (std::int64_t kv = 0; kv < shape.kv_heads; ++kv) {
        const float* const key_blocks = cache.keys(layer, slot, kv);
        const float* const values = cache.values(layer, slot, kv);
        float* const out = out_row + kv * group * dim;
        for (std::int64_t begin = 0; begin < keys; begin += tile)
            score_kernel(key_blocks + begin * dim / 2, queries + kv * group * dim / 2, scores + begin);
        float sums[max_group];
        for (std::int64_t head = 0; head < group; ++head)
            sums[head] = soften_whole_row(scores + head * stride, keys, shape.scale * log2_e, weights + head * stride / 2);
        first_kernel(values, weights, out);
        for (std::int64_t begin = tile; begin < last; begin += tile)
            middle_kernel(values + begin * dim / 2, weights + begin / 2, out);
        if (last > 0)
            last_kernel(values + last * dim / 2, weights + last / 2, out);
        for (std::int64_t head = 0; head < group; ++head)
            scale_into(out + head * dim, dim, 1.0f / sums[head], out + head * dim);
    }
}

} // namespace selm::xsmm
