#include <algorithm>
#include <cmath>

#include "bf16_rows.hpp"
#include "bf16_softmax.hpp"
#include "relative_tiles.hpp"
#include "selm/base/error.hpp"
#include "simd.hpp"
#include "xsmm_disentangled.hpp"
#include "xsmm_softmax.hpp"

// Disentangled attention (He et al., DeBERTa, 2021) in tiles of 64 queries by 64 keys with an online softmax.
//
// Per segment and head, the products of its queries with the relative keys and of its keys with the relative queries
// that its distances reach are made once: rows of at most S numbers. A tile then takes its 64 x 64 numbers out of both.
// Along a row of queries, distances fall as the keys go on, so relative keys are kept in reverse order: where one
// relative position is one distance (near the diagonal) both products are read in runs; far away all distances share
// one position and the tile gets a number per row and a number per column; only between do indices decide.
//
// With bf16 operands rows of queries and keys are rows of pairs, which are transposed and multiplied where f32 rows
// are; values are pairs of rows, and a tile's softmax weights are rounded right before they are multiplied.
namespace selm::xsmm {

void transpose_blocks(const float* rows, std::int64_t stride, std::int64_t count, std::int64_t dim, float* to)
{
    for (std::int64_t row = 0; row < count; row += tile)
        transpose_key_block(rows + row * stride, stride, std::min<std::int64_t>(tile, count - row), dim,
                            to + row * dim);
}

namespace {

/// How the relative positions of a tile's distances run.
enum class Run { one_position, one_per_distance, other };

Run run_of(const std::int32_t* first, std::int64_t distances)
{
    const std::int32_t spread = first[distances - 1] - first[0];
    return spread == 0 ? Run::one_position : spread == distances - 1 ? Run::one_per_distance : Run::other;
}

} // namespace

void XsmmEngine::prepare_head(DisentangledHead& head, const Tensor& qkv, const Tensor& relative,
                              const DisentangledShape& shape, std::int64_t index)
{
    const std::int64_t dim = shape.head_dim, width = shape.heads * dim, positions = relative.rows;
    const std::int64_t padded = blocks_of(positions) * tile;
    head.dim = narrow(dim);
    head.bf16 = uses_bf16_;
    head.operand_floats = narrow(head.bf16 ? pairs_of(dim) : dim);
    head.positions = positions;
    head.index = shape.relative_index.data() + shape.relative_index.size() / 2;
    const std::span<const std::int32_t> indices = shape.relative_index;
    const auto is_jump = [](std::int32_t a, std::int32_t b) { return b > a + 1; };
    head.takes_gradual_tiles =
        can_take_gradual_tiles() && std::adjacent_find(indices.begin(), indices.end(), is_jump) == indices.end();
    head.scale = shape.scale;
    head.qkv = &qkv;
    head.query_column = index * dim;
    head.key_column = width + index * dim;
    head.value_column = 2 * width + index * dim;
    head.relative_queries = relative.f32() + index * dim;
    head.relative_stride = relative.stride;
    head.query_blocks = relative_blocks_.get(3 * padded * dim);
    head.key_blocks = head.query_blocks + padded * dim;
    head.reversed_keys = head.key_blocks + padded * dim;
    const std::int64_t floats = head.operand_floats;
    if (head.bf16) {
        float* const pairs = head.reversed_keys;
        copy_operands(head, head.relative_queries, relative.stride, positions, pairs);
        transpose_blocks(pairs, floats, positions, floats, head.query_blocks);
    } else {
        transpose_blocks(head.relative_queries, relative.stride, positions, dim, head.query_blocks);
    }
    copy_operands(head, head.last_relative_key(relative), -relative.stride, positions, head.reversed_keys);
    transpose_blocks(head.reversed_keys, floats, positions, floats, head.key_blocks);
}

void XsmmEngine::copy_operands(const DisentangledHead& head, const float* from, std::int64_t stride, std::int64_t rows,
                               float* to)
{
    if (head.bf16)
        pair_columns(from, stride, rows, head.dim, to, head.operand_floats);
    else
        for (std::int64_t row = 0; row < rows; ++row)
            std::copy_n(from + row * stride, head.dim, to + row * head.dim);
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
            copy_operands(head, from, head.qkv->stride, length, to);
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

void XsmmEngine::disentangled_attention(const Tensor& qkv, const Tensor& relative, const DisentangledShape& shape,
                                        std::span<const Segment> segments, const Tensor& out, const Tensor& lse)
{
    check_disentangled(qkv, relative, shape, segments);
    SELM_EXPECT(out.rows == qkv.rows && out.columns == shape.heads * shape.head_dim);
    SELM_EXPECT(lse.empty() || (lse.rows == shape.heads && lse.columns == qkv.rows));
    for (std::int64_t i = 0; i < shape.heads; ++i) {
        DisentangledHead head;
        prepare_head(head, qkv, relative, shape, i);
        for (const Segment& segment : segments) {
            prepare_segment(head, segment);
            for (std::int64_t query = 0; query < segment.length; query += tile)
                attend_disentangled(head, query, out, lse);
        }
    }
}

} // namespace selm::xsmm
