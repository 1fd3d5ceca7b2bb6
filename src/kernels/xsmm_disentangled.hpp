#pragma once

#include <algorithm>
#include <cstdint>

#include "bf16_rows.hpp"
#include "xsmm_attention.hpp"
#include "xsmm_blocks.hpp"
#include "xsmm_engine.hpp"

// What the forward and the backward pass of disentangled attention share: see xsmm_disentangled.cpp.
namespace selm::xsmm {

struct XsmmEngine::DisentangledHead {
    std::int32_t dim = 0;
    bool bf16 = false;                   ///< operands of products are pairs of bf16 numbers
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
    /// Rows, or pairs of rows, before a position that is a multiple of 64.
    std::int64_t rows_before(std::int64_t position) const { return bf16 ? position / 2 : position; }
    /// Rows of D floats, or pairs of such rows.
    const float* values(std::int64_t position) const
    {
        return queries(2 * segment.length) + rows_before(position) * dim;
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
    const float* last_relative_key(const Tensor& relative) const
    {
        return relative.row_f32(positions - 1) + relative.columns / 2 + query_column;
    }
    std::int64_t key_columns() const { return std::min(blocks * tile, positions - key_block * tile); }
    std::int64_t query_columns() const { return std::min(blocks * tile, positions - query_block * tile); }
};

/// Blocks [dim][64] of 64 rows each, transposed.
void transpose_blocks(const float* rows, std::int64_t stride, std::int64_t count, std::int64_t dim, float* to);

void check_disentangled(const Tensor& qkv, const Tensor& relative, const DisentangledShape& shape,
                        std::span<const Segment> segments);

} // namespace selm::xsmm
