#include <algorithm>

#include "relative_tiles.hpp"
#include "selm/base/error.hpp"
#include "simd.hpp"
#include "xsmm_disentangled.hpp"
#include "xsmm_softmax.hpp"

// Backward pass of disentangled attention (xsmm_disentangled.cpp), tile by tile like the forward pass, whose scores it computes
// again. Gradients of the products with relative positions are summed in rows like those of the products, and multiplied
// when a row of tiles, or the segment, is done.
//
// Factors that are summed over rows are rows as they lie in memory; with bf16 operands, pairs of rows.
namespace selm::xsmm {

struct XsmmEngine::DisentangledGradients {
    const Tensor* out = nullptr;
    const Tensor* lse = nullptr;
    const Tensor* d_out = nullptr;
    const Tensor* d_qkv = nullptr;
    std::int64_t head = 0;
    const float* relative_query_rows = nullptr; ///< factor
    std::int64_t relative_query_stride = 0;
    const float* reversed_key_rows = nullptr;   ///< factor, like all below with rows of D
    const float *query_rows = nullptr, *key_rows = nullptr, *d_out_rows = nullptr; ///< factors, the segment's
    const float* d_outs = nullptr;            ///< [L][operand_floats]
    const float* values_transposed = nullptr; ///< [blocks of keys][operand_floats][64]
    float* d_reversed_keys = nullptr;         ///< [S][D]
    float* d_relative_queries = nullptr;      ///< rows of drelative, of this head
    std::int64_t d_relative_stride = 0;
    float* d_content_to_position = nullptr;   ///< [64][stride]
    float* d_position_to_content = nullptr;   ///< [L][stride]
    float* transposed = nullptr;              ///< [stride][64]
};

/// Of a head.
void XsmmEngine::prepare_gradients(DisentangledGradients& to, const DisentangledHead& head, const Tensor& relative)
{
    const std::int64_t positions = head.positions, dim = head.dim, padded = blocks_of(positions) * tile + 16;
    to.d_reversed_keys = relative_gradient_.get(positions * dim + 2 * padded * tile + 2 * pairs_of(positions) * dim);
    std::fill(to.d_reversed_keys, to.d_reversed_keys + positions * dim, 0.0f);
    to.d_content_to_position = to.d_reversed_keys + positions * dim;
    to.transposed = to.d_content_to_position + padded * tile;
    to.relative_query_rows = head.relative_queries;
    to.relative_query_stride = head.relative_stride;
    to.reversed_key_rows = head.reversed_keys;
    if (head.bf16) {
        float* const queries = to.transposed + padded * tile;
        float* const keys = queries + pairs_of(positions) * dim;
        pair_rows(head.relative_queries, head.relative_stride, positions, dim, queries, dim);
        pair_rows(head.last_relative_key(relative), -relative.stride, positions, dim, keys, dim);
        to.relative_query_rows = queries;
        to.relative_query_stride = dim;
        to.reversed_key_rows = keys;
    }
}

/// Of a segment.
void XsmmEngine::prepare_gradients(DisentangledGradients& to, const DisentangledHead& head)
{
    const std::int64_t length = head.segment.length, dim = head.dim, floats = head.operand_floats;
    const float* const d_out = to.d_out->row_f32(head.segment.begin) + head.query_column;
    float* const d_outs = gradient_operands_.get(2 * length * floats + 3 * pairs_of(length) * dim);
    copy_operands(head, d_out, to.d_out->stride, length, d_outs);
    to.d_outs = to.d_out_rows = d_outs;
    to.query_rows = head.queries(0);
    to.key_rows = head.keys(0);
    const float* values = head.values(0);
    if (head.bf16) {
        float* const value_pairs = d_outs + length * floats;
        float* rows = value_pairs + length * floats;
        const float* const qkv = head.qkv->row_f32(head.segment.begin);
        copy_operands(head, qkv + head.value_column, head.qkv->stride, length, value_pairs);
        values = value_pairs;
        const auto paired = [&](const float* from, std::int64_t stride) {
            float* const pairs = rows;
            rows += pairs_of(length) * dim;
            pair_rows(from, stride, length, dim, pairs, dim);
            return pairs;
        };
        to.d_out_rows = paired(d_out, to.d_out->stride);
        to.query_rows = paired(qkv + head.query_column, head.qkv->stride);
        to.key_rows = paired(qkv + head.key_column, head.qkv->stride);
    }
    float* const transposed = values_transposed_.get(blocks_of(length) * tile * floats);
    transpose_blocks(values, floats, length, floats, transposed);
    to.values_transposed = transposed;
    to.d_position_to_content = position_gradient_.get(length * head.stride);
    std::fill(to.d_position_to_content, to.d_position_to_content + length * head.stride, 0.0f);
}

void XsmmEngine::add_product(const DisentangledHead& head, const DisentangledProduct& p)
{
    const float* rows = p.rows;
    std::int64_t depth = p.depth;
    if (head.bf16) {
        float* const pairs = rounded_rows_.get(p.count * p.stride / 2);
        pair_columns(p.rows, p.stride, p.count, p.depth, pairs, p.stride / 2);
        rows = pairs;
        depth = 2 * pairs_of(p.depth);
    }
    kernels_.find({.m = head.dim,
                   .n = narrow(p.count),
                   .k = narrow(depth),
                   .lda = narrow(p.factor_stride),
                   .ldb = narrow(p.stride),
                   .ldc = narrow(p.sum_stride),
                   .accumulate = true,
                   .bf16 = head.bf16})(p.factor, rows, p.sums);
}

void XsmmEngine::attend_disentangled_backward(const DisentangledHead& head, std::int64_t query,
                                              const DisentangledGradients& to)
{
    const std::int32_t rows = head.tile_rows(query), dim = head.dim;
    const std::int64_t row = head.segment.begin + query, stride = head.stride, d_stride = to.d_qkv->stride;
    const bool sums_runs = head.bf16 && head.takes_gradual_tiles;
    float* const d_queries = to.d_qkv->row_f32(row) + head.query_column;
    float* const p = backward_tiles_.get(4 * tile * tile);
    float *const ds = p + tile * tile, *const p_transposed = ds + tile * tile,
                 *const ds_transposed = p_transposed + tile * tile;
    multiply_relative(head, head.key_blocks + head.key_block * tile * head.operand_floats, head.queries(query), rows,
                      head.content_to_position);
    std::fill(to.d_content_to_position, to.d_content_to_position + tile * stride, 0.0f);
    float deltas[tile]; // dout . out, of dout as it is multiplied: for a row's keys the gradients of scores add up to 0
    float* const d_out = rounded_rows_.get(dim);
    for (std::int32_t i = 0; i < rows; ++i) {
        std::copy_n(to.d_out->row_f32(row + i) + head.query_column, dim, d_out);
        if (head.bf16)
            round_to_bf16({d_out, static_cast<std::size_t>(dim)});
        deltas[i] = dot(to.out->row_f32(row + i) + head.query_column, d_out, dim);
    }
    for (std::int64_t key = 0; key < head.segment.length; key += tile) {
        const std::int32_t keys = head.tile_rows(key);
        score_disentangled(head, query, key, p);
        kernels_.find(head.product_with_block(rows, tile))(to.values_transposed + key * head.operand_floats,
                                                           to.d_outs + query * head.operand_floats, ds);
        const std::int32_t* const index = head.index + (query - key);
        float* const d_content = to.d_content_to_position + head.content_origin();
        float* const d_position = to.d_position_to_content + key * stride + head.position_origin();
        for (std::int32_t i = 0; i < rows; ++i) {
            const float lse = to.lse->row_f32(to.head)[row + i];
            float *const p_row = p + i * tile, *const ds_row = ds + i * tile;
            for (std::int32_t j = 0; j < tile; j += 8) {
                Float8 weight = simd::exp_nonpositive(simd::load(p_row + j) * head.scale - lse);
                if (j + 8 > keys)
                    weight = simd::lane_numbers() + j < keys ? weight : simd::broadcast(0.0f);
                simd::store(p_row + j, weight);
                simd::store(ds_row + j, weight * (simd::load(ds_row + j) - deltas[i]) * head.scale);
            }
            for (std::int32_t j = 0; !sums_runs && j < keys; ++j)
                d_content[i * stride - index[i - j]] += ds_row[j];
        }
        simd::transpose(p, tile, rows, keys, p_transposed, tile);
        simd::transpose(ds, tile, rows, keys, ds_transposed, tile);
        if (sums_runs) {
            sum_by_query(ds, tile, index, keys, rows, d_content, stride);
            sum_by_key(ds_transposed, tile, index, keys, rows, d_position, stride);
        }
        for (std::int32_t j = 0; !sums_runs && j < keys; ++j)
            for (std::int32_t i = 0; i < rows; ++i)
                d_position[j * stride + index[i - j]] += ds_transposed[j * tile + i];
        const auto add = [&](const float* left, std::int32_t count, std::int32_t depth, const float* factor, float* sums) {
            add_product(head, {.rows = left,
                               .stride = tile,
                               .count = count,
                               .depth = depth,
                               .factor = factor,
                               .factor_stride = dim,
                               .sums = sums,
                               .sum_stride = d_stride});
        };
        float* const d_key_row = to.d_qkv->row_f32(head.segment.begin + key);
        add(p_transposed, keys, rows, to.d_out_rows + head.rows_before(query) * dim, d_key_row + head.value_column);
        add(ds_transposed, keys, rows, to.query_rows + head.rows_before(query) * dim, d_key_row + head.key_column);
        add(ds, rows, keys, to.key_rows + head.rows_before(key) * dim, d_queries);
    }
    // The relative keys' part: dQ += dC RK, dRK += dC^T Q.
    const std::int64_t columns = head.key_columns(), first = head.key_block * tile;
    add_product(head, {.rows = to.d_content_to_position,
                       .stride = stride,
                       .count = rows,
                       .depth = columns,
                       .factor = to.reversed_key_rows + head.rows_before(first) * dim,
                       .factor_stride = dim,
                       .sums = d_queries,
                       .sum_stride = d_stride});
    simd::transpose(to.d_content_to_position, stride, rows, columns, to.transposed, tile);
    add_product(head, {.rows = to.transposed,
                       .stride = tile,
                       .count = columns,
                       .depth = rows,
                       .factor = to.query_rows + head.rows_before(query) * dim,
                       .factor_stride = dim,
                       .sums = to.d_reversed_keys + first * dim,
                       .sum_stride = dim});
}

/// The relative queries' part of a segment: dK += dP RQ, dRQ += dP^T K.
void XsmmEngine::finish_disentangled_backward(const DisentangledHead& head, const DisentangledGradients& to)
{
    const std::int64_t columns = head.query_columns(), stride = head.stride, first = head.query_block * tile;
    for (std::int64_t key = 0; key < head.segment.length; key += tile) {
        const std::int32_t keys = head.tile_rows(key);
        const float* const d_position = to.d_position_to_content + key * stride;
        add_product(head, {.rows = d_position,
                           .stride = stride,
                           .count = keys,
                           .depth = columns,
                           .factor = to.relative_query_rows + head.rows_before(first) * to.relative_query_stride,
                           .factor_stride = to.relative_query_stride,
                           .sums = to.d_qkv->row_f32(head.segment.begin + key) + head.key_column,
                           .sum_stride = to.d_qkv->stride});
        simd::transpose(d_position, stride, keys, columns, to.transposed, tile);
        add_product(head, {.rows = to.transposed,
                           .stride = tile,
                           .count = columns,
                           .depth = keys,
                           .factor = to.key_rows + head.rows_before(key) * head.dim,
                           .factor_stride = head.dim,
                           .sums = to.d_relative_queries + first * to.d_relative_stride,
                           .sum_stride = to.d_relative_stride});
    }
}

void XsmmEngine::disentangled_attention_backward(const Tensor& qkv, const Tensor& relative,
                                                 const DisentangledShape& shape, std::span<const Segment> segments,
                                                 const Tensor& out, const Tensor& lse, const Tensor& dout,
                                                 const Tensor& dqkv, const Tensor& drelative)
{
    check_disentangled(qkv, relative, shape, segments);
    const std::int64_t dim = shape.head_dim, width = shape.heads * dim, positions = relative.rows;
    SELM_EXPECT(out.rows == qkv.rows && out.columns == width && dout.rows == qkv.rows && dout.columns == width);
    SELM_EXPECT(dqkv.rows == qkv.rows && dqkv.columns == qkv.columns);
    SELM_EXPECT(lse.rows == shape.heads && lse.columns == qkv.rows);
    SELM_EXPECT(drelative.rows == positions && drelative.columns == relative.columns);
    fill_zero(dqkv);
    fill_zero(drelative);
    DisentangledGradients to;
    to.out = &out;
    to.lse = &lse;
    to.d_out = &dout;
    to.d_qkv = &dqkv;
    to.d_relative_stride = drelative.stride;
    for (std::int64_t i = 0; i < shape.heads; ++i) {
        DisentangledHead head;
        prepare_head(head, qkv, relative, shape, i);
        prepare_gradients(to, head, relative);
        to.head = i;
        to.d_relative_queries = drelative.f32() + i * dim;
        for (const Segment& segment : segments) {
            prepare_segment(head, segment);
            prepare_gradients(to, head);
            for (std::int64_t query = 0; query < segment.length; query += tile)
                attend_disentangled_backward(head, query, to);
            finish_disentangled_backward(head, to);
        }
        for (std::int64_t position = 0; position < positions; ++position) {
            float* const row = drelative.row_f32(positions - 1 - position) + width + i * dim;
            for (std::int64_t d = 0; d < dim; ++d)
                row[d] += to.d_reversed_keys[position * dim + d];
        }
    }
}

} // namespace selm::xsmm
