#pragma once

// Sixteen floats side by side, for functions that also round to bf16. Compiled for AVX-512 whatever the build's target
// is: every function says so, and is called after cpu_has_bf16() (bf16_rows.hpp) only.
#if defined(__x86_64__)

#include <cstdint>

// g++ 12 takes the undefined vector inside some intrinsics, of which every lane is replaced, for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#define SELM_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define SELM_BF16_INLINE __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"), always_inline)) inline

namespace selm::xsmm {

/// The first `count` lanes; none when count <= 0.
SELM_BF16_INLINE __mmask16 first_lanes(std::int64_t count)
{
    return static_cast<__mmask16>(count >= 16 ? 0xffffu : count <= 0 ? 0u : (1u << count) - 1u);
}

/// 16 floats rounded to bf16, each in the low half of its lane.
SELM_BF16_INLINE __m512i rounded(__m512 values)
{
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
}

/// 2^x with relative error below 3e-7: a minimax polynomial of degree 5 on [-1/2, 1/2]. 0 far below -126; NaN and infinity
/// give NaN.
SELM_BF16_INLINE __m512 exp2(__m512 x)
{
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(0.0013276471f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.009675541f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.05550713f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.2402212f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69314694f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

} // namespace selm::xsmm

#endif
