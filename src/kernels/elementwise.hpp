#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <span>

#include "scalar_functions.hpp"
#include "selm/kernels/engine.hpp"

// Elementwise and row kernels in Kokkos, with one body for every execution space; the functions declared here run on
// the host's default execution space. A row's reduction order is fixed, so its bits do not depend on the other rows.
// Shapes as in engine.hpp; all tensors are f32 unless said.
namespace selm::elementwise {

/// Floats summed side by side by the row reductions: several vectors of any instruction set, so that no addition waits for
/// the one before it.
inline constexpr int lanes = 64;

inline std::uint16_t to_bf16(float value) { return bf16_of(value); }
inline float from_bf16(std::uint16_t value) { return float_of_bf16(value); }

/**
 * @brief exp(x) with a relative error below 2e-7 for -87.3 <= x <= 88; 0 below -87.7, exp(88) above 88. Of a NaN it makes one of
 * these numbers: it is for factors of an x that stays NaN.
 *
 * Written without branches or calls, so that loops over it become vector code: the bounds are those of integers (compilers
 * turn bounds of floats into branches), in whose order the bits of floats are when both are positive and, unsigned, when
 * both are negative. Cody-Waite reduction to [-ln2/2, ln2/2] and the minimax polynomial of Cephes' expf.
 */
inline float bounded_exp(float x)
{
    constexpr float log2_e = 1.44269504088896341f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    constexpr float round_magic = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
    const std::int32_t below = std::min(std::bit_cast<std::int32_t>(x), std::bit_cast<std::int32_t>(88.0f));
    const std::uint32_t bounded = std::min(static_cast<std::uint32_t>(below), std::bit_cast<std::uint32_t>(-88.0f));
    const float argument = std::bit_cast<float>(bounded);
    const float shifted = argument * log2_e + round_magic;
    const float n = shifted - round_magic;
    const float r = (argument - n * ln2_high) - n * ln2_low;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    // The low mantissa bits of `shifted` hold n, from -127 to 127: moved into the exponent of 1 they make 2^n, or 0 of -127.
    return p * std::bit_cast<float>((std::bit_cast<std::uint32_t>(shifted) << 23) + 0x3f800000u);
}

void fill_zero(const Tensor& x);
void embed(std::span<const std::int32_t> tokens, const Tensor& embedding_VH, const Tensor& x_TH);
void embed_backward(std::span<const std::int32_t> tokens, const Tensor& dx_TH, const Tensor& d_embedding_VH);
void rms_norm(const Tensor& x_TH, const Tensor& gain, float eps, const Tensor& y_TH, const Tensor& rstd);
void rms_norm_backward(const Tensor& x_TH, const Tensor& gain, const Tensor& rstd, const Tensor& dy_TH,
                       const Tensor& dx_TH, const Tensor& dgain);
void bias_backward(const Tensor& dy_TN, const Tensor& dbias);
void layer_norm(const Tensor& x_TH, const Tensor& residual_TH, const Tensor& gain, const Tensor& bias, float eps,
                const Tensor& y_TH, const Tensor& mean, const Tensor& rstd);
void layer_norm_backward(const Tensor& x_TH, const Tensor& gain, const Tensor& mean, const Tensor& rstd,
                         const Tensor& dy_TH, const Tensor& dx_TH, const Tensor& dgain, const Tensor& dbias);
void gelu(const Tensor& x_TI, const Tensor& a_TI);
void gelu_backward(const Tensor& x_TI, const Tensor& da_TI, const Tensor& a_TI);
void tanh(const Tensor& x);
void tanh_backward(const Tensor& y, const Tensor& dy);
void rope(const Tensor& qkv, const AttentionShape& shape, std::span<const std::int32_t> positions, const Tensor& cos,
          const Tensor& sin, bool backward);
void swiglu(const Tensor& gate_up, const Tensor& a_TI);
void swiglu_backward(const Tensor& gate_up, const Tensor& da_TI, const Tensor& a_TI);
void gather_rows(const Tensor& x, std::span<const std::int64_t> index, const Tensor& out);
void convert(const Tensor& from, const Tensor& to);
void scatter_add_rows(const Tensor& d, std::span<const std::int64_t> index, const Tensor& x);

} // namespace selm::elementwise
