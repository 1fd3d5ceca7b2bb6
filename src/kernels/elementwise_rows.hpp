#pragma once

#include <cstdint>

#include <Kokkos_Core.hpp>

#include "elementwise.hpp"

// Bodies of the row kernels: plain loops over one row, written so that compilers turn them into vector code.
namespace selm::elementwise {

/// Sum over one row of f(column), in a fixed order: `lanes` partial sums, added pairwise.
template<typename Term>
KOKKOS_INLINE_FUNCTION float row_sum(std::int64_t columns, const Term& term)
{
    float partial[lanes] = {};
    const std::int64_t whole = columns - columns % lanes;
    for (std::int64_t c = 0; c < whole; c += lanes)
        for (int lane = 0; lane < lanes; ++lane)
            partial[lane] += term(c + lane);
    for (std::int64_t c = whole; c < columns; ++c)
        partial[c - whole] += term(c);
    for (int width = lanes / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane)
            partial[lane] += partial[lane + width];
    return partial[0];
}

/// y = gain * x * rstd; @return rstd.
KOKKOS_INLINE_FUNCTION float rms_norm_row(const float* x, const float* gain, float eps, std::int64_t columns, float* y)
{
    const float sum = row_sum(columns, [x](std::int64_t c) { return x[c] * x[c]; });
    const float rstd = 1.0f / std::sqrt(sum / static_cast<float>(columns) + eps);
    for (std::int64_t c = 0; c < columns; ++c)
        y[c] = x[c] * rstd * gain[c];
    return rstd;
}

/// With n = x * rstd and h = dy * gain: dx += rstd * (h - n * mean(h * n)).
KOKKOS_INLINE_FUNCTION void rms_norm_backward_row(const float* x, const float* gain, float rstd, const float* dy,
                                                  std::int64_t columns, float* dx)
{
    const float sum = row_sum(columns, [=](std::int64_t c) { return dy[c] * gain[c] * x[c]; });
    const float factor = sum * rstd * rstd / static_cast<float>(columns);
    for (std::int64_t c = 0; c < columns; ++c)
        dx[c] += rstd * (dy[c] * gain[c] - x[c] * factor);
}

/// One head: (a, b) -> (a cos - b sin, b cos + a sin), a and b its halves.
KOKKOS_INLINE_FUNCTION void rope_head(float* head, const float* cos, const float* sin, float sign, std::int64_t half)
{
    for (std::int64_t i = 0; i < half; ++i) {
        const float a = head[i], b = head[i + half], s = sign * sin[i];
        head[i] = a * cos[i] - b * s;
        head[i + half] = b * cos[i] + a * s;
    }
}

KOKKOS_INLINE_FUNCTION void swiglu_row(const float* gate, const float* up, std::int64_t columns, float* a)
{
    for (std::int64_t c = 0; c < columns; ++c)
        a[c] = gate[c] / (1.0f + fast_exp(-gate[c])) * up[c];
}

/// gate, up become their gradients; a receives the forward value.
KOKKOS_INLINE_FUNCTION void swiglu_backward_row(float* gate, float* up, const float* da, std::int64_t columns, float* a)
{
    for (std::int64_t c = 0; c < columns; ++c) {
        const float g = gate[c], u = up[c], d = da[c];
        const float sigmoid = 1.0f / (1.0f + fast_exp(-g));
        const float silu = g * sigmoid;
        a[c] = silu * u;
        up[c] = d * silu;
        gate[c] = d * u * (sigmoid + silu * (1.0f - sigmoid));
    }
}

} // namespace selm::elementwise
