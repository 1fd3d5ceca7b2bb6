#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "simd.hpp"
#include "xsmm_attention.hpp"

// Row operations of the attention kernels, on tiles whose rows are 64 floats.
namespace selm::xsmm {

using simd::Float8;
inline constexpr std::int32_t vectors_per_row = tile / 8;
inline constexpr float infinity = std::numeric_limits<float>::infinity();

/// Running softmax of one query row.
struct RowState {
    float max = -infinity;
    float sum = 0;
};

/**
 * One row of scores becomes exp(scale * score - max); keys from `visible` on become 0.
 * @return the factor by which earlier sums of the row are to be multiplied (1 when its maximum stays).
 */
inline float soften_row(float* scores, std::int32_t visible, float scale, RowState& state)
{
    Float8 row[vectors_per_row];
    Float8 largest = simd::broadcast(-infinity);
    for (std::int32_t i = 0; i < vectors_per_row; ++i) {
        row[i] = simd::load(scores + 8 * i) * scale;
        if (8 * (i + 1) > visible)
            row[i] = simd::lane_numbers() + 8 * i < visible ? row[i] : simd::broadcast(-infinity);
        largest = simd::max(largest, row[i]);
    }
    const float new_max = std::max(state.max, simd::max_lanes(largest));
    Float8 sum = simd::broadcast(0.0f);
    for (std::int32_t i = 0; i < vectors_per_row; ++i) {
        const Float8 p = simd::exp_nonpositive(row[i] - new_max);
        simd::store(scores + 8 * i, p);
        sum += p;
    }
    float factor = 1.0f;
    if (new_max != state.max)
        factor = simd::exp_nonpositive(simd::broadcast(state.max - new_max))[0];
    state.sum = state.sum * factor + simd::sum_lanes(sum);
    state.max = new_max;
    return factor;
}

inline float dot(const float* a, const float* b, std::int64_t count)
{
    Float8 sum = simd::broadcast(0.0f);
    const std::int64_t whole = count - count % 8;
    for (std::int64_t i = 0; i < whole; i += 8)
        sum += simd::load(a + i) * simd::load(b + i);
    float rest = 0;
    for (std::int64_t i = whole; i < count; ++i)
        rest += a[i] * b[i];
    return simd::sum_lanes(sum) + rest;
}

inline void scale_row(float* row, std::int32_t columns, float factor)
{
    for (std::int32_t column = 0; column < columns; ++column)
        row[column] *= factor;
}

} // namespace selm::xsmm
