#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Arithmetic of one element, with one body for the host's loops and for the CUDA kernels. C++17 and no other header of the
// project: nvcc reads this file.
#ifdef __CUDACC__
#define SELM_HOST_DEVICE __host__ __device__
#else
#define SELM_HOST_DEVICE
#endif

namespace selm {

SELM_HOST_DEVICE inline std::uint32_t float_bits(float value)
{
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

SELM_HOST_DEVICE inline float float_of_bits(std::uint32_t bits)
{
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

/// Round to nearest even; a NaN stays a NaN (made quiet).
SELM_HOST_DEVICE inline std::uint16_t bf16_of(float value)
{
    const std::uint32_t bits = float_bits(value);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t quiet = (bits >> 16) | 0x40u;
    return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

SELM_HOST_DEVICE inline float float_of_bf16(std::uint16_t value)
{
    return float_of_bits(static_cast<std::uint32_t>(value) << 16);
}

/// An AdamW step's scalars, in the precision that torch.optim.AdamW applies them in (computed in double, used in float).
struct AdamWFactors {
    float gradient_scale, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_root_bias2, epsilon;
};

/// One element of AdamW (Loshchilov & Hutter 2019, algorithm 2): the moments are updated.
/// @return the new weight.
SELM_HOST_DEVICE inline float adamw_element(const AdamWFactors& f, float gradient, float weight, float& exp_avg,
                                            float& exp_avg_sq)
{
    const float g = gradient * f.gradient_scale;
    const float m = exp_avg + (g - exp_avg) * f.one_minus_beta1;
    const float v = exp_avg_sq * f.beta2 + g * g * f.one_minus_beta2;
    exp_avg = m;
    exp_avg_sq = v;
    return weight * f.decay - f.step_size * (m / (std::sqrt(v) * f.inverse_root_bias2 + f.epsilon));
}

/// Elements whose squares are added up into one number before the numbers are added up, in order; and the sums that run
/// side by side in such a block. The host and the device add in the same order.
constexpr std::int64_t sum_block_elements = 4096;
constexpr std::int64_t sum_lanes = 8;

} // namespace selm
