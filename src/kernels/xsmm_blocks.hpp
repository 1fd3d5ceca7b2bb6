#pragma once

#include <cstdint>

#include "selm/base/error.hpp"

namespace selm::xsmm {

/// Rows of x per kernel call of a matrix product.
inline constexpr std::int64_t rows_per_call = 64;

/// Outputs (or inputs) per panel, at most.
inline constexpr std::int64_t most_panel_width = 64;

/**
 * to (+)= from, `rows` rows of `columns` elements. A kernel adds its products one after another to what C holds: into a
 * long-running sum every single product would be rounded off. So sums of one call are computed apart and then added.
 */
inline void place_tile(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns, bool add,
                       float* to, std::int64_t to_stride)
{
    for (std::int64_t row = 0; row < rows; ++row, from += from_stride, to += to_stride)
        for (std::int64_t column = 0; column < columns; ++column)
            to[column] = add ? to[column] + from[column] : from[column];
}

/// to = before + from; before may be to. A before_stride of 0: the same row, a bias, for all.
inline void place_tile_on(const float* before, std::int64_t before_stride, const float* from, std::int64_t from_stride,
                          std::int64_t rows, std::int64_t columns, float* to, std::int64_t to_stride)
{
    for (std::int64_t row = 0; row < rows; ++row, before += before_stride, from += from_stride, to += to_stride)
        for (std::int64_t column = 0; column < columns; ++column)
            to[column] = before[column] + from[column];
}

/// LIBXSMM counts in 32 bits.
inline std::int32_t narrow(std::int64_t value)
{
    SELM_EXPECT(value >= 0 && value <= INT32_MAX);
    return static_cast<std::int32_t>(value);
}

/// Size of blocks that divide `total` as evenly as multiples of `step` allow, none above `most` (a multiple of step): a
/// last block of a few rows would cost a whole sweep over the weights.
inline std::int64_t even_block(std::int64_t total, std::int64_t most, std::int64_t step)
{
    if (total <= most)
        return most;
    const std::int64_t blocks = (total + most - 1) / most;
    return ((total + blocks - 1) / blocks + step - 1) / step * step;
}

} // namespace selm::xsmm
