#include <algorithm>
#include <cmath>

#include "bf16_rows.hpp"
#include "bf16_softmax.hpp"
#include "selm/base/error.hpp"
#include "simd.hpp"
#include "xsmm_attention.hpp"
#include "xsmm_blocks.hpp"
#include "xsmm_engine.hpp"
#include "xsmm_softmax.hpp"

// Attention as in xsmm_attention.cpp on operands rounded to bf16. All heads that share a key head go through one tile:
// its rows (backward: its lanes) are query by query the heads of the group, as they lie in qkv. Tiles of keys start at
// multiples of 64 of a segment's own positions; whole blocks go in pairs, and the block on the diagonal in two halves, the
// second for the second half of the queries only.
namespace selm::xsmm {
namespace {

constexpr std::int32_t half_tile = tile / 2, wide_tile = 2 * tile;
constexpr float ln_2 = 0.693147180559945309f;
constexpr float never = 1e30f; ///< log2 of a softmax denominator that makes every weight 0

std::int64_t rounded_up(std::int64_t value, std::int64_t step)
{
    return (value + step - 1) / step * step;
}

/// to [queries * group][D] = the group's heads of some queries; rows up to `rows` are 0.
void gather_group(const float* from, std::int64_t stride, std::int64_t queries, std::int64_t width, std::int64_t elements,
                  float* to)
{
    for (std::int64_t query = 0; query < queries; ++query)
        std::copy_n(from + query * stride, width, to + query * width);
    std::fill(to + queries * width, to + elements, 0.0f);
}

} // namespace

void pack_key_block(const float* keys, std::int64_t stride, std::int64_t count, std::int64_t head_dim, float* scratch,
                    float* to, std::int64_t first)
{
    pair_columns(keys, stride, count, head_dim, scratch, head_dim / 2);
    transpose_key_block(scratch, head_dim / 2, count, head_dim / 2, to, first);
}

void pack_value_block(const float* values, std::int64_t stride, std::int64_t count, std::int64_t head_dim, float* to,
                      std::int64_t first)
{
    pair_rows(values, stride, count, head_dim, to + first / 2 * head_dim, head_dim);
    std::fill(to + (first / 2 + pairs_of(count)) * head_dim, to + half_tile * head_dim, 0.0f);
}

void XsmmEngine::append_bf16_tiles(const float* keys, const float* values, std::int64_t blocks, std::int64_t positions,
                                   std::int64_t head_dim)
{
    const std::int64_t block_pairs = tile * head_dim / 2;
    for (std::int64_t block = 0; block < blocks; block += 2)
        bf16_key_tiles_.push_back(
            {.keys = keys + block * block_pairs,
             .values = values + block * block_pairs,
             .count = narrow(std::min({positions - block * tile, (blocks - block) * tile, std::int64_t{wide_tile}})),
             .is_diagonal = false});
}

void XsmmEngine::append_bf16_diagonal(const float* keys, const float* values, std::int64_t count, std::int64_t head_dim,
                                      std::int64_t before)
{
    for (std::int64_t begin = 0; begin < count; begin += half_tile)
        bf16_key_tiles_.push_back({.keys = keys + begin,
                                   .values = values + begin / 2 * head_dim,
                                   .count = narrow(std::min<std::int64_t>(half_tile, count - begin)),
                                   .first_query = narrow(std::max<std::int64_t>(0, begin - before)),
                                   .before = narrow(std::max<std::int64_t>(0, before - begin)),
                                   .is_diagonal = true});
}

void XsmmEngine::attend_bf16(const Bf16QueryTile& q, std::span<const Bf16KeyTile> tiles)
{
    const std::int64_t rows = q.queries * q.group, dim = q.head_dim;
    float* const pairs = query_pairs_.get(rows * dim / 2);
    pair_columns(q.from, q.stride, q.queries, q.group * dim, pairs, q.group * dim / 2);
    float* const scores = score_tile_.get(rows * wide_tile);
    float* const weights = weight_tile_.get(rows * wide_tile / 2);
    float* const sums = output_tile_.get(rows * dim);
    row_states_.resize(static_cast<std::size_t>(rows));
    bool is_first = true;
    for (const Bf16KeyTile& keys : tiles) {
        const std::int64_t first = keys.first_query * q.group, some = rows - first;
        const std::int32_t width = keys.is_diagonal ? half_tile : tile;
        for (std::int64_t begin = 0; begin < keys.count; begin += width)
            kernels_.find({.m = width,
                           .n = narrow(some),
                           .k = narrow(dim),
                           .lda = tile,
                           .ldb = narrow(dim),
                           .ldc = wide_tile,
                           .accumulate = false,
                           .bf16 = true})(keys.keys + begin * dim / 2, pairs + first * dim / 2, scores + begin);
        soften_rows({.scores = scores,
                     .weights = weights,
                     .stride = wide_tile,
                     .rows = some,
                     .group = q.group,
                     .width = keys.is_diagonal ? half_tile : rounded_up(keys.count, 16),
                     .keys = keys.count,
                     .before = keys.before,
                     .is_diagonal = keys.is_diagonal,
                     .is_first = is_first,
                     .factor = q.scale * log2_e,
                     .states = row_states_.data() + first,
                     .sums = sums + first * dim,
                     .columns = dim});
        kernels_.find({.m = narrow(dim),
                       .n = narrow(some),
                       .k = keys.is_diagonal ? half_tile : narrow(rounded_up(keys.count, 2)),
                       .lda = narrow(dim),
                       .ldb = wide_tile,
                       .ldc = narrow(dim),
                       .accumulate = !is_first,
                       .bf16 = true})(keys.values, weights, sums + first * dim);
        is_first = false;
    }
    for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t query = row / q.group, head = row % q.group;
        const Bf16RowState& state = row_states_[static_cast<std::size_t>(row)];
        scale_into(sums + row * dim, dim, 1.0f / state.sum, q.out + query * q.out_stride + head * dim);
        if (q.lse != nullptr)
            q.lse[head * q.lse_stride + query] = state.max * ln_2 + std::log(state.sum);
    }
}

void XsmmEngine::attention_bf16(const Tensor& qkv, const AttentionShape& shape, std::span<const Segment> segments,
                                const Tensor& out, const Tensor& lse)
{
    const std::int64_t dim = shape.head_dim, group = shape.heads / shape.kv_heads, block_pairs = tile * dim / 2;
    SELM_EXPECT(dim % 2 == 0 && shape.scale > 0);
    std::vector<std::int64_t> first_block(segments.size() + 1);
    for (std::size_t i = 0; i < segments.size(); ++i)
        first_block[i + 1] = first_block[i] + blocks_of(segments[i].length);
    float* const keys = keys_transposed_.get((2 * first_block.back() + 1) * block_pairs);
    float* const values = keys + first_block.back() * block_pairs;
    float* const scratch = values + first_block.back() * block_pairs;

    for (std::int64_t kv = 0; kv < shape.kv_heads; ++kv) {
        const std::int64_t key_column = (shape.heads + kv) * dim, value_column = key_column + shape.kv_heads * dim;
        for (std::size_t i = 0; i < segments.size(); ++i) {
            const Segment& segment = segments[i];
            float* const own_keys = keys + first_block[i] * block_pairs;
            float* const own_values = values + first_block[i] * block_pairs;
            for (std::int64_t block = 0; block < blocks_of(segment.length); ++block) {
                const std::int64_t row = segment.begin + block * tile;
                const std::int64_t count = std::min<std::int64_t>(tile, segment.length - block * tile);
                pack_key_block(qkv.row_f32(row) + key_column, qkv.stride, count, dim, scratch,
                               own_keys + block * block_pairs);
                pack_value_block(qkv.row_f32(row) + value_column, qkv.stride, count, dim,
                                 own_values + block * block_pairs);
                bf16_key_tiles_.clear();
                if (segment.trunk >= 0) {
                    const auto trunk = static_cast<std::size_t>(segment.trunk);
                    const std::int64_t offset = first_block[trunk] * block_pairs;
                    append_bf16_tiles(keys + offset, values + offset, blocks_of(segments[trunk].length),
                                      segments[trunk].length, dim);
                }
                append_bf16_tiles(own_keys, own_values, block, segment.length, dim);
                append_bf16_diagonal(own_keys + block * block_pairs, own_values + block * block_pairs, count, dim);
                attend_bf16({.from = qkv.row_f32(row) + kv * group * dim,
                             .out = out.row_f32(row) + kv * group * dim,
                             .lse = lse.row_f32(kv * group) + row,
                             .queries = count,
                             .group = group,
                             .head_dim = dim,
                             .stride = qkv.stride,
                             .out_stride = out.stride,
                             .lse_stride = lse.stride,
                             .scale = shape.scale},
                            bf16_key_tiles_);
            }
        }
    }
}

/// Lanes of up to 64 queries times the heads of a group, with what their backward pass needs.
struct XsmmEngine::Bf16BackwardTile {
    std::int64_t lanes = 0, group = 0, head_dim = 0; ///< lanes: a multiple of 16
    float scale = 0;
    float* scratch = nullptr;

    std::int64_t operand() const { return lanes * head_dim / 2; }
    float* queries_by_column() const { return scratch; } ///< pairs [D/2][lanes]
    float* d_out_by_column() const { return scratch + operand(); }
    float* queries_by_lane() const { return scratch + 2 * operand(); } ///< pairs of lanes [lanes/2][D]
    float* d_out_by_lane() const { return scratch + 3 * operand(); }
    float* log2_sums() const { return scratch + 4 * operand(); }
    float* delta() const { return log2_sums() + lanes; }
    float* d_queries() const { return delta() + lanes; }                     ///< [D][lanes]
    float* rows() const { return d_queries() + lanes * head_dim; }           ///< [lanes][D]
    float* scores() const { return rows() + lanes * head_dim; }              ///< [64][lanes]
    float* d_weights() const { return scores() + tile * lanes; }             ///< [64][lanes]
    float* weights_by_key() const { return d_weights() + tile * lanes; }     ///< bf16 [64][lanes]
    float* d_scores_by_key() const { return weights_by_key() + half_tile * lanes; }
    float* d_scores_by_lane() const { return d_scores_by_key() + half_tile * lanes; } ///< pairs of keys [32][lanes]
    static std::int64_t scratch_elements(std::int64_t lanes, std::int64_t head_dim)
    {
        return lanes * (4 * head_dim + 2 + 2 * tile + 3 * half_tile);
    }
};

void XsmmEngine::attend_backward_bf16(const Bf16BackwardTile& q, const Bf16BackwardKeys& keys, bool is_first)
{
    const std::int64_t first = keys.first_query * q.group, lanes = q.lanes - first, dim = q.head_dim;
    const GemmKernel transposed_scores = kernels_.find({.m = narrow(lanes),
                                                        .n = keys.count,
                                                        .k = narrow(dim),
                                                        .lda = narrow(q.lanes),
                                                        .ldb = narrow(dim),
                                                        .ldc = narrow(q.lanes),
                                                        .accumulate = false,
                                                        .bf16 = true});
    transposed_scores(q.queries_by_column() + first, keys.key_rows, q.scores());
    transposed_scores(q.d_out_by_column() + first, keys.value_rows, q.d_weights());
    differentiate_rows({.scores = q.scores(),
                        .d_weights = q.d_weights(),
                        .stride = q.lanes,
                        .keys = keys.count,
                        .lanes = lanes,
                        .hidden_lanes_per_key = keys.is_diagonal ? q.group : 0,
                        .factor = q.scale * log2_e,
                        .scale = q.scale,
                        .log2_sums = q.log2_sums() + first,
                        .delta = q.delta() + first,
                        .weights_by_key = q.weights_by_key(),
                        .d_scores_by_key = q.d_scores_by_key(),
                        .d_scores_by_lane = q.d_scores_by_lane()});
    const GemmKernel sum_over_lanes = kernels_.find({.m = narrow(dim),
                                                     .n = keys.count,
                                                     .k = narrow(lanes),
                                                     .lda = narrow(dim),
                                                     .ldb = narrow(q.lanes),
                                                     .ldc = narrow(keys.d_stride),
                                                     .accumulate = true,
                                                     .bf16 = true});
    sum_over_lanes(q.d_out_by_lane() + first / 2 * dim, q.weights_by_key(), keys.d_value_rows);
    sum_over_lanes(q.queries_by_lane() + first / 2 * dim, q.d_scores_by_key(), keys.d_key_rows);
    kernels_.find({.m = narrow(lanes),
                   .n = narrow(dim),
                   .k = narrow(rounded_up(keys.count, 2)),
                   .lda = narrow(q.lanes),
                   .ldb = tile,
                   .ldc = narrow(q.lanes),
                   .accumulate = !is_first,
                   .bf16 = true})(q.d_scores_by_lane(), keys.keys_transposed, q.d_queries() + first);
}

void XsmmEngine::attention_backward_bf16(const Tensor& qkv, const AttentionShape& shape,
                                         std::span<const Segment> segments, const Tensor& out, const Tensor& lse,
                                         const Tensor& dout, const Tensor& dqkv)
{
    const std::int64_t dim = shape.head_dim, group = shape.heads / shape.kv_heads, width = group * dim;
    SELM_EXPECT(dim % 2 == 0 && shape.scale > 0);
    fill_zero(dqkv);
    const std::int64_t most_lanes = tile * group, row_pairs = dim / 2, tokens = qkv.rows;
    Bf16BackwardTile q;
    q.group = group;
    q.head_dim = dim;
    q.scale = shape.scale;
    q.scratch = backward_tiles_.get(Bf16BackwardTile::scratch_elements(most_lanes, dim));
    std::vector<std::int64_t> first_block(segments.size() + 1);
    for (std::size_t i = 0; i < segments.size(); ++i)
        first_block[i + 1] = first_block[i] + blocks_of(segments[i].length);
    float* const key_rows = keys_transposed_.get((2 * tokens + (first_block.back() + 1) * tile) * row_pairs);
    float* const value_rows = key_rows + tokens * row_pairs;
    float* const keys_transposed = value_rows + tokens * row_pairs; // blocks of bf16 [D][64]
    float* const scratch = keys_transposed + first_block.back() * tile * row_pairs;

    for (std::int64_t kv = 0; kv < shape.kv_heads; ++kv) {
        const std::int64_t key_column = (shape.heads + kv) * dim, value_column = key_column + shape.kv_heads * dim;
        pair_columns(qkv.f32() + key_column, qkv.stride, tokens, dim, key_rows, row_pairs);
        pair_columns(qkv.f32() + value_column, qkv.stride, tokens, dim, value_rows, row_pairs);
        const auto against = [&](std::size_t i, std::int64_t begin, std::int64_t count, std::int64_t first_query,
                                 bool is_diagonal, bool is_first) {
            const std::int64_t row = segments[i].begin + begin;
            attend_backward_bf16(q,
                                 {.key_rows = key_rows + row * row_pairs,
                                  .value_rows = value_rows + row * row_pairs,
                                  .keys_transposed = keys_transposed +
                                                     (first_block[i] + begin / tile) * tile * row_pairs + begin % tile / 2,
                                  .d_key_rows = dqkv.row_f32(row) + key_column,
                                  .d_value_rows = dqkv.row_f32(row) + value_column,
                                  .d_stride = dqkv.stride,
                                  .count = narrow(count),
                                  .first_query = narrow(first_query),
                                  .is_diagonal = is_diagonal},
                                 is_first);
        };
        for (std::size_t i = 0; i < segments.size(); ++i) {
            const Segment& segment = segments[i];
            for (std::int64_t block = 0; block < blocks_of(segment.length); ++block) {
                const std::int64_t row = segment.begin + block * tile;
                const std::int64_t queries = std::min<std::int64_t>(tile, segment.length - block * tile);
                pair_rows(qkv.row_f32(row) + key_column, qkv.stride, queries, dim, scratch, dim);
                simd::transpose(scratch, dim, pairs_of(queries), dim,
                                keys_transposed + (first_block[i] + block) * tile * row_pairs, half_tile);
                q.lanes = rounded_up(queries * group, 32); // kernels of 16 more than a multiple of 64 are slow
                const auto prepare = [&](const float* from, std::int64_t stride, float* by_column, float* by_lane) {
                    gather_group(from, stride, queries, width, q.lanes * dim, q.rows());
                    pair_rows(q.rows(), dim, q.lanes, dim, by_lane, dim);
                    pair_columns(q.rows(), dim, q.lanes, dim, q.scores(), row_pairs);
                    simd::transpose(q.scores(), row_pairs, q.lanes, row_pairs, by_column, q.lanes);
                };
                prepare(qkv.row_f32(row) + kv * width, qkv.stride, q.queries_by_column(), q.queries_by_lane());
                prepare(dout.row_f32(row) + kv * width, dout.stride, q.d_out_by_column(), q.d_out_by_lane());
                for (std::int64_t lane = 0; lane < q.lanes; ++lane) {
                    const std::int64_t query = lane / group, head = kv * group + lane % group;
                    const bool is_valid = query < queries;
                    q.log2_sums()[lane] = is_valid ? lse.row_f32(head)[row + query] * log2_e : never;
                    q.delta()[lane] = is_valid ? dot(out.row_f32(row + query) + head * dim,
                                                     dout.row_f32(row + query) + head * dim, dim)
                                               : 0.0f;
                }
                bool is_first = true;
                if (segment.trunk >= 0) {
                    const auto trunk = static_cast<std::size_t>(segment.trunk);
                    for (std::int64_t begin = 0; begin < segments[trunk].length; begin += tile, is_first = false)
                        against(trunk, begin, std::min<std::int64_t>(tile, segments[trunk].length - begin), 0, false,
                                is_first);
                }
                for (std::int64_t begin = 0; begin < block * tile; begin += tile, is_first = false)
                    against(i, begin, tile, 0, false, is_first);
                for (std::int64_t begin = 0; begin < queries; begin += half_tile, is_first = false)
                    against(i, block * tile + begin, std::min<std::int64_t>(half_tile, queries - begin), begin, true,
                            is_first);
                simd::transpose(q.d_queries(), q.lanes, dim, q.lanes, q.rows(), dim);
                for (std::int64_t query = 0; query < queries; ++query)
                    std::copy_n(q.rows() + query * width, width, dqkv.row_f32(row + query) + kv * width);
            }
        }
    }
}

} // namespace selm::xsmm
