#pragma once

#include <cstdint>

#include <Kokkos_Core.hpp>

#include "elementwise.hpp"

// Bodies of the row kernels: plain loops over one row, written so that compilers turn them into vector code.
namespace selm::elementwise {

/// partial[0] + ... + partial[width - 1], the halves added to each other again and again.
template<int width>
KOKKOS_FORCEINLINE_FUNCTION float sum_halves(float* partial)
{
    if constexpr (width == 1) {
        return partial[0];
    } else {
        for (int lane = 0; lane < width / 2; ++lane)
            partial[lane] += partial[lane + width / 2];
        return sum_halves<width / 2>(partial);
    }
}

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
    return sum_halves<lanes>(partial);
}

struct TwoSums {
    float first = 0, second = 0;
};

/// Two sums over one row, side by side: half as many partial sums each.
template<typename First, typename Second>
KOKKOS_INLINE_FUNCTION TwoSums row_sums(std::int64_t columns, const First& first, const Second& second)
{
    constexpr int width = lanes / 2;
    float firsts[width] = {}, seconds[width] = {};
    const std::int64_t whole = columns - columns % width;
    for (std::int64_t c = 0; c < whole; c += width)
        for (int lane = 0; lane < width; ++lane) {
            firsts[lane] += first(c + lane);
            seconds[lane] += second(c + lane);
        }
    for (std::int64_t c = whole; c < columns; ++c) {
        firsts[c - whole] += first(c);
        seconds[c - whole] += second(c);
    }
    return {sum_halves<width>(firsts), sum_halves<width>(seconds)};
}

KOKKOS_INLINE_FUNCTION void add_row(const float* from, std::int64_t columns, float* __restrict to)
{
    for (std::int64_t c = 0; c < columns; ++c)
        to[c] += from[c];
}

/// A row's part of the gradient of RMSNorm's gain.
KOKKOS_INLINE_FUNCTION void add_scaled_product(const float* dy, const float* x, float rstd, std::int64_t columns,
                                               float* __restrict dgain)
{
    for (std::int64_t c = 0; c < columns; ++c)
        dgain[c] += dy[c] * x[c] * rstd;
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

struct Moments {
    float mean = 0;
    float rstd = 0;
};

/// A row's part of the gradient of LayerNorm's gain.
KOKKOS_INLINE_FUNCTION void add_normalised_product(const float* dy, const float* x, const Moments& moments,
                                                   std::int64_t columns, float* __restrict dgain)
{
    const float mean = moments.mean, rstd = moments.rstd;
    for (std::int64_t c = 0; c < columns; ++c)
        dgain[c] += dy[c] * ((x[c] - mean) * rstd);
}

/// y = (x - mean) * rstd * gain + bias; y may be x.
KOKKOS_INLINE_FUNCTION Moments layer_norm_row(const float* x, const float* gain, const float* bias, float eps,
                                              std::int64_t columns, float* y)
{
    const auto count = static_cast<float>(columns);
    const float mean = row_sum(columns, [x](std::int64_t c) { return x[c]; }) / count;
    const float variance =
        row_sum(columns, [=](std::int64_t c) { return (x[c] - mean) * (x[c] - mean); }) / count;
    const float rstd = 1.0f / std::sqrt(variance + eps);
    for (std::int64_t c = 0; c < columns; ++c)
        y[c] = (x[c] - mean) * rstd * gain[c] + bias[c];
    return {mean, rstd};
}

/// With n = (x - mean) * rstd and h = dy * gain: dx = rstd * (h - mean(h) - n * mean(h * n)). dx may be dy.
KOKKOS_INLINE_FUNCTION void layer_norm_backward_row(const float* x, const float* gain, const Moments& moments,
                                                    const float* dy, std::int64_t columns, float* dx)
{
    const float mean = moments.mean, rstd = moments.rstd, count = static_cast<float>(columns);
    const TwoSums sums = row_sums(
        columns, [=](std::int64_t c) { return dy[c] * gain[c]; },
        [=](std::int64_t c) { return dy[c] * gain[c] * ((x[c] - mean) * rstd); });
    const float mean_h = sums.first / count, mean_hn = sums.second / count;
    for (std::int64_t c = 0; c < columns; ++c)
        dx[c] = rstd * (dy[c] * gain[c] - mean_h - (x[c] - mean) * rstd * mean_hn);
}

/// The normal distribution at x: its function Phi (relative error below 1e-6 also in the lower tail) and its density.
struct Normal {
    float distribution = 0;
    float density = 0;
};

/// Phi(-|x|) = density(x) * R(|x|), R (Mills' ratio) as a polynomial in t = 1 / (1 + 0.35 |x|) on [0, 13.2], where
/// Phi(-|x|) leaves the range of floats. The coefficients are a weighted least-squares fit of their own.
KOKKOS_INLINE_FUNCTION Normal normal_at(float x)
{
    constexpr float one_over_root_two_pi = 0.3989422804f;
    const float magnitude = x < 0.0f ? -x : x;
    const float t = 1.0f / (1.0f + magnitude * 0.35f);
    float ratio = -0.0729816034f;
    ratio = ratio * t + 0.360504448f;
    ratio = ratio * t - 0.640180647f;
    ratio = ratio * t + 0.398055315f;
    ratio = ratio * t - 0.0572674833f;
    ratio = ratio * t + 0.264181942f;
    ratio = ratio * t + 0.300451487f;
    ratio = ratio * t + 0.350571007f;
    ratio = ratio * t + 0.349979609f;
    const float density = bounded_exp(-0.5f * x * x) * one_over_root_two_pi;
    const float tail = density * (ratio * t);
    return {x < 0.0f ? tail : 1.0f - tail, density};
}

KOKKOS_INLINE_FUNCTION void gelu_row(const float* x, std::int64_t columns, float* a)
{
    for (std::int64_t c = 0; c < columns; ++c)
        a[c] = x[c] * normal_at(x[c]).distribution;
}

/// x becomes da * (Phi(x) + x phi(x)); a receives the forward value.
KOKKOS_INLINE_FUNCTION void gelu_backward_row(float* x, const float* da, std::int64_t columns, float* a)
{
    for (std::int64_t c = 0; c < columns; ++c) {
        const float value = x[c];
        const Normal normal = normal_at(value);
        a[c] = value * normal.distribution;
        x[c] = da[c] * (normal.distribution + value * normal.density);
    }
}

/// Both halves of one head: (a, b) -> (a cos - b sin, b cos + a sin).
KOKKOS_INLINE_FUNCTION void rope_halves(float* __restrict first, float* __restrict second, const float* __restrict cos,
                                        const float* __restrict sin, float sign, std::int64_t half)
{
    for (std::int64_t i = 0; i < half; ++i) {
        const float a = first[i], b = second[i], s = sign * sin[i];
        first[i] = a * cos[i] - b * s;
        second[i] = b * cos[i] + a * s;
    }
}

KOKKOS_INLINE_FUNCTION void swiglu_row(const float* gate, const float* up, std::int64_t columns, float* a)
{
    for (std::int64_t c = 0; c < columns; ++c)
        a[c] = gate[c] / (1.0f + bounded_exp(-gate[c])) * up[c];
}

/// gate, up become their gradients; a receives the forward value.
KOKKOS_INLINE_FUNCTION void swiglu_backward_row(float* gate, float* up, const float* da, std::int64_t columns, float* a)
{
    for (std::int64_t c = 0; c < columns; ++c) {
        const float g = gate[c], u = up[c], d = da[c];
        const float sigmoid = 1.0f / (1.0f + bounded_exp(-g));
        const float silu = g * sigmoid;
        a[c] = silu * u;
        up[c] = d * silu;
        gate[c] = d * u * (sigmoid + silu * (1.0f - sigmoid));
    }
}

} // namespace selm::elementwise
