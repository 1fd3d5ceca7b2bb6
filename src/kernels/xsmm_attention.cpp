#include <algorithm>
#include <cmath>
#include <limits>

#include "selm/base/error.hpp"
#include "simd.hpp"
#include "xsmm_attention.hpp"
#include "xsmm_blocks.hpp"
#include "xsmm_engine.hpp"
#include "xsmm_softmax.hpp"

// Tiled attention with an online softmax (Dao et al., FlashAttention, 2022), forward and backward. Tiles of 64
// queries by 64 keys start at multiples of 64 of a segment's own positions: a row's arithmetic knows nothing of other
// segments.
namespace selm::xsmm {
namespace {

using simd::Float8;

/**
 * One row (a key, lanes are queries) of transposed scores and of dP^T becomes P^T and dS^T:
 * p = exp(scale * s - lse), ds = scale * p * (dp - delta). Queries before `first_query` do not see the key.
 */
void differentiate_row(float* scores, float* d_probabilities, const float* lse, const float* delta, float scale,
                       std::int32_t first_query)
{
    for (std::int32_t i = 0; i < vectors_per_row; ++i) {
        Float8 p = simd::exp_nonpositive(simd::load(scores + 8 * i) * scale - simd::load(lse + 8 * i));
        if (8 * i < first_query)
            p = simd::lane_numbers() + 8 * i < first_query ? simd::broadcast(0.0f) : p;
        const Float8 dp = simd::load(d_probabilities + 8 * i);
        simd::store(scores + 8 * i, p);
        simd::store(d_probabilities + 8 * i, p * (dp - simd::load(delta + 8 * i)) * scale);
    }
}

} // namespace

void XsmmEngine::attend(const QueryTile& q, std::span<const KeyTile> tiles)
{
    float* const scores = score_tile_.get(tile * tile);
    float* const sums = output_tile_.get(tile * q.head_dim);
    const GemmKernel score_kernel = kernels_.find({.m = tile,
                                                   .n = q.rows,
                                                   .k = q.head_dim,
                                                   .lda = tile,
                                                   .ldb = q.query_stride,
                                                   .ldc = tile,
                                                   .accumulate = false});
    RowState states[tile];
    bool is_first = true;
    for (const KeyTile& keys : tiles) {
        score_kernel(keys.keys_transposed, q.queries, scores);
        for (std::int32_t row = 0; row < q.rows; ++row) {
            const std::int32_t visible = keys.is_diagonal ? std::min(q.before + row + 1, keys.keys) : keys.keys;
            const float factor = soften_row(scores + row * tile, visible, q.scale, states[row]);
            if (factor != 1.0f && !is_first)
                scale_row(sums + row * q.head_dim, q.head_dim, factor);
        }
        kernels_.find({.m = q.head_dim,
                       .n = q.rows,
                       .k = keys.keys,
                       .lda = q.value_stride,
                       .ldb = tile,
                       .ldc = q.head_dim,
                       .accumulate = !is_first})(keys.values, scores, sums);
        is_first = false;
    }
    for (std::int32_t row = 0; row < q.rows; ++row) {
        const float factor = 1.0f / states[row].sum;
        float* const to = q.out + static_cast<std::int64_t>(row) * q.out_stride;
        const float* const from = sums + row * q.head_dim;
        for (std::int32_t d = 0; d < q.head_dim; ++d)
            to[d] = from[d] * factor;
        if (q.lse != nullptr)
            q.lse[row] = states[row].max + std::log(states[row].sum);
    }
}

void transpose_key_block(const float* keys, std::int64_t stride, std::int64_t count, std::int64_t head_dim, float* to,
                         std::int64_t first)
{
    simd::transpose(keys, stride, count, head_dim, to + first, tile);
    for (std::int64_t d = 0; first + count < tile && d < head_dim; ++d)
        std::fill(to + d * tile + first + count, to + (d + 1) * tile, 0.0f);
}

void check_segments(std::span<const Segment> segments, std::int64_t tokens)
{
    std::int64_t next = 0;
    for (std::size_t i = 0; i < segments.size(); ++i) {
        const Segment& segment = segments[i];
        SELM_EXPECT(segment.begin == next && segment.length >= 1);
        if (segment.trunk >= 0) {
            SELM_EXPECT(segment.trunk < static_cast<std::int64_t>(i));
            SELM_EXPECT(segments[static_cast<std::size_t>(segment.trunk)].trunk < 0);
        }
        next += segment.length;
    }
    SELM_EXPECT(next == tokens);
}

void XsmmEngine::attention(const Tensor& qkv, const AttentionShape& shape, std::span<const Segment> segments,
                           const Tensor& out, const Tensor& lse)
{
    const std::int64_t dim = shape.head_dim, group = shape.heads / shape.kv_heads;
    SELM_EXPECT(shape.heads == group * shape.kv_heads && qkv.columns == (shape.heads + 2 * shape.kv_heads) * dim);
    SELM_EXPECT(out.rows == qkv.rows && out.columns == shape.heads * dim);
    SELM_EXPECT(lse.rows == shape.heads && lse.columns == qkv.rows);
    check_segments(segments, qkv.rows);
    if (uses_bf16_)
        return attention_bf16(qkv, shape, segments, out, lse);
    std::vector<std::int64_t> first_block(segments.size() + 1);
    for (std::size_t i = 0; i < segments.size(); ++i)
        first_block[i + 1] = first_block[i] + blocks_of(segments[i].length);
    float* const blocks = keys_transposed_.get(first_block.back() * dim * tile);

    for (std::int64_t kv = 0; kv < shape.kv_heads; ++kv) {
        const std::int64_t key_column = (shape.heads + kv) * dim, value_column = key_column + shape.kv_heads * dim;
        // Tiles of segment i's keys, appended to key_tiles_; all of them, or those that query tile `last` sees.
        const auto append_tiles = [&](std::size_t i, std::int64_t last, bool is_own) {
            const Segment& segment = segments[i];
            for (std::int64_t block = 0; block <= last; ++block)
                key_tiles_.push_back({.keys_transposed = blocks + (first_block[i] + block) * dim * tile,
                                      .values = qkv.row_f32(segment.begin + block * tile) + value_column,
                                      .keys = narrow(std::min<std::int64_t>(tile, segment.length - block * tile)),
                                      .is_diagonal = is_own && block == last});
        };
        for (std::size_t i = 0; i < segments.size(); ++i) {
            const Segment& segment = segments[i];
            const std::int64_t count = blocks_of(segment.length);
            for (std::int64_t block = 0; block < count; ++block)
                transpose_key_block(qkv.row_f32(segment.begin + block * tile) + key_column, qkv.stride,
                                    std::min<std::int64_t>(tile, segment.length - block * tile), dim,
                                    blocks + (first_block[i] + block) * dim * tile);
            for (std::int64_t block = 0; block < count; ++block) {
                key_tiles_.clear();
                if (segment.trunk >= 0) {
                    const auto trunk = static_cast<std::size_t>(segment.trunk);
                    append_tiles(trunk, blocks_of(segments[trunk].length) - 1, false);
                }
                append_tiles(i, block, true);
                const std::int64_t row = segment.begin + block * tile;
                for (std::int64_t head = kv * group; head < (kv + 1) * group; ++head)
                    attend({.queries = qkv.row_f32(row) + head * dim,
                            .out = out.row_f32(row) + head * dim,
                            .lse = lse.row_f32(head) + row,
                            .rows = narrow(std::min<std::int64_t>(tile, segment.length - block * tile)),
                            .head_dim = narrow(dim),
                            .query_stride = narrow(qkv.stride),
                            .value_stride = narrow(qkv.stride),
                            .out_stride = narrow(out.stride),
                            .scale = shape.scale},
                           key_tiles_);
            }
        }
    }
}

/// Up to 64 query rows of one head, with what their backward pass needs; column offsets are those of the head.
struct XsmmEngine::BackwardTile {
    const float* queries = nullptr;
    const float* d_out = nullptr;
    float* d_queries = nullptr;
    std::int32_t rows = 0, head_dim = 0, stride = 0, d_stride = 0, d_out_stride = 0; ///< of qkv, dqkv, dout
    float scale = 0;
    float lse[tile];   ///< infinity beyond `rows`: those probabilities are 0
    float delta[tile]; ///< dout . out
    float* scratch = nullptr;

    float* queries_transposed() const { return scratch; }
    float* d_out_transposed() const { return scratch + head_dim * tile; }
    float* scores() const { return scratch + 2 * head_dim * tile; }
    float* d_probabilities() const { return scores() + tile * tile; }
    float* d_scores() const { return d_probabilities() + tile * tile; }
    static std::int64_t scratch_elements(std::int64_t head_dim) { return 2 * head_dim * tile + 3 * tile * tile; }
};

void XsmmEngine::attend_backward(const BackwardTile& q, const BackwardKeys& keys)
{
    // Transposed tiles [key][query]: softmax is then element by element, and dV, dK take P^T and dS^T as they lie.
    const GemmShape transposed_scores{
        .m = tile, .n = keys.keys, .k = q.head_dim, .lda = tile, .ldb = q.stride, .ldc = tile, .accumulate = false};
    const GemmKernel kernel = kernels_.find(transposed_scores);
    kernel(q.queries_transposed(), keys.key_rows, q.scores());
    kernel(q.d_out_transposed(), keys.value_rows, q.d_probabilities());
    for (std::int32_t key = 0; key < keys.keys; ++key)
        differentiate_row(q.scores() + key * tile, q.d_probabilities() + key * tile, q.lse, q.delta, q.scale,
                          keys.is_diagonal ? key : 0);
    const auto sum_over_queries = [&](const float* rows, std::int32_t row_stride, const float* weights, float* to) {
        kernels_.find({.m = q.head_dim,
                       .n = keys.keys,
                       .k = q.rows,
                       .lda = row_stride,
                       .ldb = tile,
                       .ldc = q.d_stride,
                       .accumulate = true})(rows, weights, to);
    };
    sum_over_queries(q.d_out, q.d_out_stride, q.scores(), keys.d_value_rows);
    sum_over_queries(q.queries, q.stride, q.d_probabilities(), keys.d_key_rows);
    simd::transpose(q.d_probabilities(), tile, keys.keys, tile, q.d_scores(), tile);
    kernels_.find({.m = q.head_dim,
                   .n = q.rows,
                   .k = keys.keys,
                   .lda = q.stride,
                   .ldb = tile,
                   .ldc = q.d_stride,
                   .accumulate = true})(keys.key_rows, q.d_scores(), q.d_queries);
}

void XsmmEngine::attention_backward(const Tensor& qkv, const AttentionShape& shape, std::span<const Segment> segments,
                                    const Tensor& out, const Tensor& lse, const Tensor& dout, const Tensor& dqkv)
{
    const std::int64_t dim = shape.head_dim, group = shape.heads / shape.kv_heads;
    SELM_EXPECT(shape.heads == group * shape.kv_heads && qkv.columns == (shape.heads + 2 * shape.kv_heads) * dim);
    SELM_EXPECT(dqkv.rows == qkv.rows && dqkv.columns == qkv.columns && lse.rows == shape.heads &&
                lse.columns == qkv.rows);
    SELM_EXPECT(out.rows == qkv.rows && out.columns == shape.heads * dim);
    SELM_EXPECT(dout.rows == out.rows && dout.columns == out.columns);
    check_segments(segments, qkv.rows);
    if (uses_bf16_)
        return attention_backward_bf16(qkv, shape, segments, out, lse, dout, dqkv);
    fill_zero(dqkv);
    BackwardTile q;
    q.head_dim = narrow(dim);
    q.stride = narrow(qkv.stride);
    q.d_stride = narrow(dqkv.stride);
    q.d_out_stride = narrow(dout.stride);
    q.scale = shape.scale;
    q.scratch = backward_tiles_.get(BackwardTile::scratch_elements(dim));

    const auto against_segment = [&](const Segment& segment, std::int64_t blocks, std::int64_t key_column,
                                     bool is_own) {
        const std::int64_t value_column = key_column + shape.kv_heads * dim;
        for (std::int64_t block = 0; block < blocks; ++block) {
            const std::int64_t row = segment.begin + block * tile;
            attend_backward(q, {.key_rows = qkv.row_f32(row) + key_column,
                                .value_rows = qkv.row_f32(row) + value_column,
                                .d_key_rows = dqkv.row_f32(row) + key_column,
                                .d_value_rows = dqkv.row_f32(row) + value_column,
                                .keys = narrow(std::min<std::int64_t>(tile, segment.length - block * tile)),
                                .is_diagonal = is_own && block == blocks - 1});
        }
    };
    for (std::int64_t head = 0; head < shape.heads; ++head) {
        const std::int64_t key_column = (shape.heads + head / group) * dim;
        for (const Segment& segment : segments) {
            for (std::int64_t block = 0; block < blocks_of(segment.length); ++block) {
                const std::int64_t row = segment.begin + block * tile;
                q.rows = narrow(std::min<std::int64_t>(tile, segment.length - block * tile));
                q.queries = qkv.row_f32(row) + head * dim;
                q.d_out = dout.row_f32(row) + head * dim;
                q.d_queries = dqkv.row_f32(row) + head * dim;
                transpose_key_block(q.queries, qkv.stride, q.rows, dim, q.queries_transposed());
                transpose_key_block(q.d_out, dout.stride, q.rows, dim, q.d_out_transposed());
                for (std::int32_t i = 0; i < tile; ++i) {
                    q.lse[i] = i < q.rows ? lse.row_f32(head)[row + i] : infinity;
                    q.delta[i] =
                        i < q.rows ? dot(out.row_f32(row + i) + head * dim, q.d_out + i * dout.stride, dim) : 0;
                }
                if (segment.trunk >= 0) {
                    const Segment& trunk = segments[static_cast<std::size_t>(segment.trunk)];
                    against_segment(trunk, blocks_of(trunk.length), key_column, false);
                }
                against_segment(segment, block + 1, key_column, true);
            }
        }
    }
}

} // namespace selm::xsmm
