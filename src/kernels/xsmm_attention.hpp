#pragma once

#include <cstdint>
#include <span>

#include "selm/kernels/engine.hpp"

namespace selm::xsmm {

/// Side of a tile of attention scores, and keys per transposed block.
inline constexpr std::int32_t tile = 64;
static_assert(prefill_tile == tile);

inline std::int64_t blocks_of(std::int64_t positions)
{
    return (positions + tile - 1) / tile;
}

/// to [head_dim][64] = up to 64 rows of keys, transposed, from column `first` on; columns behind them are 0, before them as they were.
void transpose_key_block(const float* keys, std::int64_t stride, std::int64_t count, std::int64_t head_dim, float* to,
                         std::int64_t first = 0);

/// to, pairs [head_dim / 2][64] = up to 64 rows of keys rounded to bf16, transposed, as transpose_key_block. Scratch:
/// 32 * head_dim floats.
void pack_key_block(const float* keys, std::int64_t stride, std::int64_t count, std::int64_t head_dim, float* scratch,
                    float* to, std::int64_t first = 0);

/// to, pairs of keys [32][head_dim] = up to 64 rows of values rounded to bf16, from the key `first` (even) on; those of keys
/// behind them are 0.
void pack_value_block(const float* values, std::int64_t stride, std::int64_t count, std::int64_t head_dim, float* to,
                      std::int64_t first = 0);

/// Contract of Segment (engine.hpp).
void check_segments(std::span<const Segment> segments, std::int64_t tokens);

} // namespace selm::xsmm
