#include <algorithm>
#include <cmath>

#include "bf16_rows.hpp"
#include "bf16_softmax.hpp"
#include "relative_tiles.hpp"
#include "selm/base/error.hpp"
#include "simd.hpp"
#include "xsmm_attention.hpp"
#include "xsmm_blocks.hpp"
#include "xsmm_engine.hpp"
#include "xsmm_softmax.hpp"

// Disentangled attention (He et al., DeBERTa, 2021) in tiles of 64 queries by 64 keys with an online softmax.
//
// Per segment and head, the products of its queries with the relative keys and of its keys with the relative queries
// that its distances reach are made once: rows of at most S numbers. A tile then takes its 64 x 64 numbers out of both.
// Along a row of queries, distances fall as the keys go on, so relative keys are kept in reverse order: where one
// relative position is one distance (near the diagonal) both products are read in runs; far away all distances share
// one position and the tile gets a number per row and a number per column; only between do indices decide.
//
// With bf16 operands, forward, rows of queries and keys are rows of pairs, which are transposed and multiplied where f32 rows
// are; values are pairs of rows, and a tile's softmax weights are rounded right before they are multiplied. Backward,
// products are f32 products of the rounded rows: the weights are those of the forward pass.
namespace selm::xsmm {

/// Of products: as they are; rounded to bf16, in the places of floats; the same, as pairs.
enum class XsmmEngine::DisentangledOperands { f32, rounded, pairs };

struct XsmmEngine::DisentangledHead {
    std::int32_t dim = 0;
    DisentangledOperands operands = DisentangledOperands::f32;
    bool bf16 = false;                   ///< operands are pairs
    std::int32_t operand_floats = 0;     ///< of a row of queries or keys: D, or the pairs of D numbers
    std::int64_t positions = 0;          ///< S
    const std::int32_t* index = nullptr; ///< relative position of distance 0; distances to both sides of it
    bool takes_gradual_tiles = false;    ///< as in relative_tiles.hpp
    float scale = 0;
    const Tensor* qkv = nullptr;
    std::int64_t query_column = 0, key_column = 0, value_column = 0;
    const float* relative_queries = nullptr; ///< rows of the relative projections, of this head
    std::int64_t relative_stride = 0;
    float* reversed_keys = nullptr;  ///< [S][operand_floats], last relative key first
    float* query_blocks = nullptr;   ///< [ceil(S/64)][operand_floats][64], relative queries transposed
    float* key_blocks = nullptr;     ///< the same of reversed_keys

    Segment segment;
    std::int64_t query_block = 0, key_block = 0;   ///< first blocks that the segment's distances reach
    std::int64_t blocks = 0;                       ///< how many, of both
    float* contents = nullptr;                     ///< the segment's queries, keys and values, this head's
    std::int64_t stride = 0;                       ///< of rows of products
    float* keys_transposed = nullptr;              ///< [blocks of keys][operand_floats][64]
    float* content_to_position = nullptr;          ///< [64][stride]: queries of a tile times reversed relative keys
    float* position_to_content = nullptr;          ///< [L][stride]: keys times relative queries

    std::int32_t tile_rows(std::int64_t begin) const
    {
        return narrow(std::min<std::int64_t>(tile, segment.length - begin));
    }
    const float* queries(std::int64_t position) const { return contents + position * operand_floats; }
    const float* keys(std::int64_t position) const { return queries(segment.length + position); }
    /// Rows of D floats from a position on that is a multiple of 64, or pairs of such rows.
    const float* values(std::int64_t position) const
    {
        return queries(2 * segment.length) + (bf16 ? position / 2 : position) * dim;
    }
    /// Rows of queries or keys times a transposed block of 64.
    GemmShape product_with_block(std::int64_t rows, std::int64_t row_stride) const
    {
        const std::int32_t depth = bf16 ? 2 * operand_floats : dim;
        return {.m = tile,
                .n = narrow(rows),
                .k = depth,
                .lda = tile,
                .ldb = depth,
                .ldc = narrow(row_stride),
                .accumulate = false,
                .bf16 = bf16};
    }
    /// Column of content_to_position of relative position 0.
    std::int64_t content_origin() const { return positions - 1 - key_block * tile; }
    /// Column of position_to_content of relative position 0 (not positive).
    std::int64_t position_origin() const { return -query_block * tile; }
    std::int64_t key_columns() const { return std::min(blocks * tile, positions - key_block * tile); }
    std::int64_t query_columns() const { return std::min(blocks * tile, positions - query_block * tile); }
};

struct XsmmEngine::DisentangledGradients {
    const Tensor* out = nullptr;
    const Tensor* lse = nullptr;
    const Tensor* d_out = nullptr;
    const Tensor* d_qkv = nullptr;
    std::int64_t head = 0;
    const float* values_transposed = nullptr; ///< [blocks of keys][D][64]
    float* d_reversed_keys = nullptr;         ///< [S][D]
    float* d_relative_queries = nullptr;      ///< rows of drelative, of this head
    std::int64_t d_relative_stride = 0;
    float* d_content_to_position = nullptr;   ///< [64][stride]
    float* d_position_to_content = nullptr;   ///< [L][stride]
    float* transposed = nullptr;              ///< [stride][64]
};

namespace {

/// How the relative positions of a tile's distances run.
enum class Run { one_position, one_per_distance, other };

Run run_of(const std::int32_t* first, std::int64_t distances)
{
    const std::int32_t spread = first[distances - 1] - first[0];
    return spread == 0 ? Run::one_position : spread == distances - 1 ? Run::one_per_distance : Run::other;
}

void transpose_blocks(const float* rows, std::int64_t stride, std::int64_t count, std::int64_t dim, float* to)
{
    for (std::int64_t row = 0; row < count; row += tile)
        transpose_key_block(rows + row * stride, stride, std::min<std::int64_t>(tile, count - row), dim,
                            to + row * dim);
}

} // namespace

void XsmmEngine::prepare_head(DisentangledHead& head, const Tensor& qkv, const Tensor& relative,
                              const DisentangledShape& shape, std::int64_t index, DisentangledOperands operands)
{
    const bool bf16 = operands == DisentangledOperands::pairs;
    const std::int64_t dim = shape.head_dim, width = shape.heads * dim, positions = relative.rows;
    const std::int64_t padded = blocks_of(positions) * tile;
    head.dim = narrow(dim);
    head.operands = operands;
    head.bf16 = bf16;
    head.operand_floats = narrow(bf16 ? pairs_of(dim) : dim);
    head.positions = positions;
    head.index = shape.relative_index.data() + shape.relative_index.size() / 2;
    const auto is_jump = [](std::int32_t a, std::int32_t b) { return b > a + 1; };
    head.takes_gradual_tiles = can_take_gradual_tiles() && std::adjacent_find(shape.relative_index.begin(), shape.relative_index.end(),
                                                                              is_jump) == shape.relative_index.end();
    head.scale = shape.scale;
    head.qkv = &qkv;
    head.query_column = index * dim;
    head.key_column = width + index * dim;
    head.value_column = 2 * width + index * dim;
    head.relative_queries = relative.f32() + index * dim;
    head.relative_stride = relative.stride;
    head.query_blocks = relative_blocks_.get(4 * padded * dim);
    head.key_blocks = head.query_blocks + padded * dim;
    head.reversed_keys = head.key_blocks + padded * dim;
    const std::int64_t floats = head.operand_floats;
    if (operands != DisentangledOperands::f32) {
        float* const rows = head.reversed_keys + padded * dim;
        copy_operands(head.relative_queries, relative.stride, positions, dim, operands, rows);
        head.relative_queries = rows;
        head.relative_stride = floats;
    }
    transpose_blocks(head.relative_queries, head.relative_stride, positions, floats, head.query_blocks);
    for (std::int64_t position = 0; position < positions; ++position)
        copy_operands(relative.row_f32(positions - 1 - position) + width + index * dim, dim, 1, dim, operands,
                      head.reversed_keys + position * floats);
    transpose_blocks(head.reversed_keys, floats, positions, floats, head.key_blocks);
}

void XsmmEngine::copy_operands(const float* from, std::int64_t stride, std::int64_t rows, std::int64_t dim,
                               DisentangledOperands operands, float* to)
{
    if (operands == DisentangledOperands::pairs) {
        pair_columns(from, stride, rows, dim, to, pairs_of(dim));
        return;
    }
    for (std::int64_t row = 0; row < rows; ++row)
        std::copy_n(from + row * stride, dim, to + row * dim);
    if (operands == DisentangledOperands::rounded)
        round_to_bf16({to, static_cast<std::size_t>(rows * dim)});
}

void XsmmEngine::prepare_segment(DisentangledHead& head, const Segment& segment)
{
    head.segment = segment;
    const std::int64_t lowest = head.index[1 - segment.length], highest = head.index[segment.length - 1];
    head.query_block = lowest / tile;
    head.key_block = (head.positions - 1 - highest) / tile;
    const std::int64_t query_blocks = highest / tile + 1 - head.query_block;
    const std::int64_t key_blocks = (head.positions - 1 - lowest) / tile + 1 - head.key_block;
    head.blocks = std::max(query_blocks, key_blocks);
    head.query_block = std::max<std::int64_t>(0, std::min(head.query_block, blocks_of(head.positions) - head.blocks));
    head.key_block = std::max<std::int64_t>(0, std::min(head.key_block, blocks_of(head.positions) - head.blocks));
    head.stride = head.blocks * tile + 16; // not a power of two: rows would share few places of the cache
    // Rows of qkv lie a page apart or more, at places of few cache sets: a head's part is copied together.
    const std::int64_t length = segment.length, dim = head.dim, floats = head.operand_floats;
    head.contents = contents_.get(2 * length * floats + (length + 1) * dim);
    const std::int64_t columns[3] = {head.query_column, head.key_column, head.value_column};
    for (std::int64_t which = 0; which < 3; ++which) {
        const float* const from = head.qkv->row_f32(segment.begin) + columns[which];
        float* const to = head.contents + which * length * floats;
        if (head.bf16 && which == 2)
            pair_rows(from, head.qkv->stride, length, dim, to, dim);
        else
            copy_operands(from, head.qkv->stride, length, dim, head.operands, to);
    }
    head.keys_transposed = keys_transposed_.get(blocks_of(length) * tile * floats);
    head.content_to_position = content_to_position_.get(tile * head.stride);
    head.position_to_content = position_to_content_.get(segment.length * head.stride);
    transpose_blocks(head.keys(0), floats, segment.length, floats, head.keys_transposed);
    multiply_relative(head, head.query_blocks + head.query_block * tile * floats, head.keys(0), segment.length,
                      head.position_to_content);
}

void XsmmEngine::multiply_relative(const DisentangledHead& head, const float* blocks, const float* rows,
                                   std::int64_t count, float* to)
{
    const std::int64_t floats = head.operand_floats;
    for (std::int64_t row = 0; row < count; row += rows_per_call) {
        const GemmKernel kernel = kernels_.find(head.product_with_block(std::min(rows_per_call, count - row), head.stride));
        for (std::int64_t block = 0; block < head.blocks; ++block)
            kernel(blocks + block * tile * floats, rows + row * floats, to + row * head.stride + block * tile);
    }
}

void XsmmEngine::score_disentangled(const DisentangledHead& head, std::int64_t query, std::int64_t key, float* scores)
{
    const std::int32_t rows = head.tile_rows(query), keys = head.tile_rows(key);
    kernels_.find(head.product_with_block(rows, tile))(head.keys_transposed + key * head.operand_floats,
                                                       head.queries(query), scores);
    // Distance of row i and key j: (query - key) + i - j.
    const std::int32_t* const index = head.index + (query - key);
    const float* const content = head.content_to_position + head.content_origin();
    const float* const position = head.position_to_content + key * head.stride + head.position_origin();
    const std::int64_t stride = head.stride;
    alignas(64) float by_query[tile * tile], by_key[tile * tile]; // position to content, [i][j] and [j][i]
    switch (run_of(index - (keys - 1), rows + keys - 1)) {
    case Run::one_position: {
        for (std::int32_t j = 0; j < keys; ++j)
            by_key[j] = position[j * stride + index[0]];
        for (std::int32_t i = 0; i < rows; ++i) {
            const float added = content[i * stride - index[0]];
            for (std::int32_t j = 0; j < keys; ++j)
                scores[i * tile + j] += by_key[j] + added;
        }
        break;
    }
    case Run::one_per_distance: {
        simd::transpose(position + index[0], stride - 1, keys, rows, by_query, tile);
        for (std::int32_t i = 0; i < rows; ++i) {
            const float* const from = content + i * (stride - 1) - index[0];
            for (std::int32_t j = 0; j < keys; ++j)
                scores[i * tile + j] += by_query[i * tile + j] + from[j];
        }
        break;
    }
    case Run::other: {
        if (head.takes_gradual_tiles) {
            take_by_key(position, stride, index, keys, rows, by_key, tile);
            simd::transpose(by_key, tile, keys, rows, by_query, tile);
            add_by_query(content, stride, index, keys, rows, by_query, scores, tile);
            break;
        }
        for (std::int32_t j = 0; j < keys; ++j)
            for (std::int32_t i = 0; i < rows; ++i)
                by_key[j * tile + i] = position[j * stride + index[i - j]];
        simd::transpose(by_key, tile, keys, rows, by_query, tile);
        for (std::int32_t i = 0; i < rows; ++i)
            for (std::int32_t j = 0; j < keys; ++j)
                scores[i * tile + j] += by_query[i * tile + j] + content[i * stride - index[i - j]];
        break;
    }
    }
}

void XsmmEngine::attend_disentangled(const DisentangledHead& head, std::int64_t query, const Tensor& out,
                                     const Tensor& lse)
{
    const std::int32_t rows = head.tile_rows(query);
    const std::int64_t row = head.segment.begin + query;
    float* const scores = score_tile_.get(tile * tile + tile * tile / 2);
    float* const weight_pairs = scores + tile * tile;
    float* const sums = output_tile_.get(2 * tile * head.dim); // of all tiles so far, and of one (see place_tile)
    float* const part = sums + tile * head.dim;
    multiply_relative(head, head.key_blocks + head.key_block * tile * head.operand_floats, head.queries(query), rows,
                      head.content_to_position);
    RowState states[tile];
    Bf16RowState bf16_states[tile];
    float factors[tile];
    for (std::int64_t key = 0; key < head.segment.length; key += tile) {
        const std::int32_t keys = head.tile_rows(key);
        score_disentangled(head, query, key, scores);
        if (head.bf16) {
            soften_rows({.scores = scores,
                         .weights = weight_pairs,
                         .stride = tile,
                         .rows = rows,
                         .group = 1,
                         .width = tile,
                         .keys = keys,
                         .is_first = key == 0,
                         .factor = head.scale * log2_e,
                         .states = bf16_states,
                         .sums = sums,
                         .columns = head.dim});
            kernels_.find({.m = head.dim,
                           .n = rows,
                           .k = 2 * narrow(pairs_of(keys)),
                           .lda = head.dim,
                           .ldb = tile,
                           .ldc = head.dim,
                           .accumulate = key > 0,
                           .bf16 = true})(head.values(key), weight_pairs, sums);
            continue;
        }
        for (std::int32_t i = 0; i < rows; ++i)
            factors[i] = soften_row(scores + i * tile, keys, head.scale, states[i]);
        kernels_.find({.m = head.dim,
                       .n = rows,
                       .k = keys,
                       .lda = head.dim,
                       .ldb = tile,
                       .ldc = head.dim,
                       .accumulate = false})(head.values(key), scores, key == 0 ? sums : part);
        for (std::int32_t i = 0; key > 0 && i < rows; ++i)
            for (std::int32_t d = i * head.dim; d < (i + 1) * head.dim; ++d)
                sums[d] = sums[d] * factors[i] + part[d];
    }
    for (std::int32_t i = 0; i < rows; ++i) {
        const RowState state =
            head.bf16 ? RowState{bf16_states[i].max / log2_e, bf16_states[i].sum} : states[i];
        const float factor = 1.0f / state.sum;
        float* const to = out.row_f32(row + i) + head.query_column;
        for (std::int32_t d = 0; d < head.dim; ++d)
            to[d] = sums[i * head.dim + d] * factor;
        if (!lse.empty())
            lse.row_f32(head.query_column / head.dim)[row + i] = state.max + std::log(state.sum);
    }
}

namespace {

void check_disentangled(const Tensor& qkv, const Tensor& relative, const DisentangledShape& shape,
                        std::span<const Segment> segments)
{
    SELM_EXPECT(qkv.columns == 3 * shape.heads * shape.head_dim);
    SELM_EXPECT(relative.columns == 2 * shape.heads * shape.head_dim && shape.relative_index.size() % 2 == 1);
    check_segments(segments, qkv.rows);
    for (const Segment& segment : segments) {
        SELM_EXPECT(segment.trunk < 0);
        SELM_EXPECT(2 * segment.length - 1 <= static_cast<std::int64_t>(shape.relative_index.size()));
    }
    for (std::size_t i = 0; i < shape.relative_index.size(); ++i) {
        SELM_EXPECT(shape.relative_index[i] >= 0 && shape.relative_index[i] < relative.rows);
        SELM_EXPECT(i == 0 || shape.relative_index[i] >= shape.relative_index[i - 1]);
    }
}

} // namespace

void XsmmEngine::disentangled_attention(const Tensor& qkv, const Tensor& relative, const DisentangledShape& shape,
                                        std::span<const Segment> segments, const Tensor& out, const Tensor& lse)
{
    check_disentangled(qkv, relative, shape, segments);
    SELM_EXPECT(out.rows == qkv.rows && out.columns == shape.heads * shape.head_dim);
    SELM_EXPECT(lse.empty() || (lse.rows == shape.heads && lse.columns == qkv.rows));
    for (std::int64_t i = 0; i < shape.heads; ++i) {
        DisentangledHead head;
        prepare_head(head, qkv, relative, shape, i, uses_bf16_ ? DisentangledOperands::pairs : DisentangledOperands::f32);
        for (const Segment& segment : segments) {
            prepare_segment(head, segment);
            for (std::int64_t query = 0; query < segment.length; query += tile)
                attend_disentangled(head, query, out, lse);
        }
    }
}

void XsmmEngine::attend_disentangled_backward(const DisentangledHead& head, std::int64_t query,
                                              const DisentangledGradients& to)
{
    const std::int32_t rows = head.tile_rows(query), dim = head.dim;
    const std::int64_t row = head.segment.begin + query, stride = head.stride;
    const auto d_stride = narrow(to.d_qkv->stride), d_out_stride = narrow(to.d_out->stride);
    const float* const queries = head.queries(query);
    const float* const d_out = to.d_out->row_f32(row) + head.query_column;
    float* const d_queries = to.d_qkv->row_f32(row) + head.query_column;
    float* const p = backward_tiles_.get(4 * tile * tile);
    float *const ds = p + tile * tile, *const p_transposed = ds + tile * tile,
                 *const ds_transposed = p_transposed + tile * tile;
    multiply_relative(head, head.key_blocks + head.key_block * tile * dim, queries, rows, head.content_to_position);
    std::fill(to.d_content_to_position, to.d_content_to_position + tile * stride, 0.0f);
    for (std::int64_t key = 0; key < head.segment.length; key += tile) {
        const std::int32_t keys = head.tile_rows(key);
        score_disentangled(head, query, key, p);
        kernels_.find({.m = tile,
                       .n = rows,
                       .k = dim,
                       .lda = tile,
                       .ldb = d_out_stride,
                       .ldc = tile,
                       .accumulate = false})(to.values_transposed + key * dim, d_out, ds);
        const std::int32_t* const index = head.index + (query - key);
        float* const d_content = to.d_content_to_position + head.content_origin();
        float* const d_position = to.d_position_to_content + key * stride + head.position_origin();
        for (std::int32_t i = 0; i < rows; ++i) {
            const float lse = to.lse->row_f32(to.head)[row + i];
            const float delta = dot(to.out->row_f32(row + i) + head.query_column, d_out + i * d_out_stride, dim);
            float *const p_row = p + i * tile, *const ds_row = ds + i * tile;
            for (std::int32_t j = 0; j < tile; j += 8) {
                Float8 weight = simd::exp_nonpositive(simd::load(p_row + j) * head.scale - lse);
                if (j + 8 > keys)
                    weight = simd::lane_numbers() + j < keys ? weight : simd::broadcast(0.0f);
                simd::store(p_row + j, weight);
                simd::store(ds_row + j, weight * (simd::load(ds_row + j) - delta) * head.scale);
            }
            for (std::int32_t j = 0; j < keys; ++j)
                d_content[i * stride - index[i - j]] += ds_row[j];
        }
        simd::transpose(p, tile, rows, keys, p_transposed, tile);
        simd::transpose(ds, tile, rows, keys, ds_transposed, tile);
        for (std::int32_t j = 0; j < keys; ++j)
            for (std::int32_t i = 0; i < rows; ++i)
                d_position[j * stride + index[i - j]] += ds_transposed[j * tile + i];
        const auto add_product = [&](std::int32_t n, std::int32_t k, const float* a, std::int32_t lda, const float* b,
                                     float* c) {
            kernels_.find({.m = dim, .n = n, .k = k, .lda = lda, .ldb = tile, .ldc = d_stride, .accumulate = true})(
                a, b, c);
        };
        float* const d_key_row = to.d_qkv->row_f32(head.segment.begin + key);
        add_product(keys, rows, d_out, d_out_stride, p_transposed, d_key_row + head.value_column);
        add_product(keys, rows, queries, dim, ds_transposed, d_key_row + head.key_column);
        add_product(rows, keys, head.keys(key), dim, ds, d_queries);
    }
    // The relative keys' part: dQ += dC RK, dRK += dC^T Q.
    const auto columns = narrow(head.key_columns());
    float* const relative_rows = head.reversed_keys + head.key_block * tile * dim;
    kernels_.find({.m = dim,
                   .n = rows,
                   .k = columns,
                   .lda = dim,
                   .ldb = narrow(stride),
                   .ldc = d_stride,
                   .accumulate = true})(relative_rows, to.d_content_to_position, d_queries);
    simd::transpose(to.d_content_to_position, stride, rows, columns, to.transposed, tile);
    kernels_.find({.m = dim,
                   .n = columns,
                   .k = rows,
                   .lda = dim,
                   .ldb = tile,
                   .ldc = dim,
                   .accumulate = true})(queries, to.transposed,
                                        to.d_reversed_keys + head.key_block * tile * dim);
}

/// The relative queries' part of a segment: dK += dP RQ, dRQ += dP^T K.
void XsmmEngine::finish_disentangled_backward(const DisentangledHead& head, const DisentangledGradients& to)
{
    const auto columns = narrow(head.query_columns()), stride = narrow(head.stride);
    const std::int64_t first = head.query_block * tile;
    for (std::int64_t key = 0; key < head.segment.length; key += tile) {
        const std::int32_t keys = head.tile_rows(key);
        const float* const d_position = to.d_position_to_content + key * stride;
        kernels_.find({.m = head.dim,
                       .n = keys,
                       .k = columns,
                       .lda = narrow(head.relative_stride),
                       .ldb = stride,
                       .ldc = narrow(to.d_qkv->stride),
                       .accumulate = true})(head.relative_queries + first * head.relative_stride, d_position,
                                            to.d_qkv->row_f32(head.segment.begin + key) + head.key_column);
        simd::transpose(d_position, stride, keys, columns, to.transposed, tile);
        kernels_.find({.m = head.dim,
                       .n = columns,
                       .k = keys,
                       .lda = head.dim,
                       .ldb = tile,
                       .ldc = narrow(to.d_relative_stride),
                       .accumulate = true})(head.keys(key), to.transposed,
                                            to.d_relative_queries + first * to.d_relative_stride);
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
        prepare_head(head, qkv, relative, shape, i, uses_bf16_ ? DisentangledOperands::rounded : DisentangledOperands::f32);
        to.head = i;
        to.d_relative_queries = drelative.f32() + i * dim;
        const std::int64_t padded = blocks_of(positions) * tile + 16;
        to.d_reversed_keys = relative_gradient_.get(positions * dim + 2 * padded * tile);
        to.d_content_to_position = to.d_reversed_keys + positions * dim;
        to.transposed = to.d_content_to_position + padded * tile;
        std::fill(to.d_reversed_keys, to.d_reversed_keys + positions * dim, 0.0f);
        for (const Segment& segment : segments) {
            prepare_segment(head, segment);
            float* const values = values_transposed_.get(blocks_of(segment.length) * tile * dim);
            transpose_blocks(head.values(0), dim, segment.length, dim, values);
            to.values_transposed = values;
            to.d_position_to_content = position_gradient_.get(segment.length * head.stride);
            std::fill(to.d_position_to_content, to.d_position_to_content + segment.length * head.stride, 0.0f);
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
