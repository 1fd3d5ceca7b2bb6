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

/// Lane i: first[i] rounded to bf16 in the low half, second[i] in the high one.
SELM_BF16_INLINE __m512i paired(__m512 first, __m512 second)
{
    alignas(64) static constexpr std::uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                            8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), both);
}

/// row[j] lane i = row[i] lane j before.
SELM_BF16_INLINE void transpose_16x16(__m512i (&row)[16])
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        row[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        row[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        row[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        row[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // Now quarter q of row[4 k + c] is column 4 q + c of rows 4 k to 4 k + 3.
    for (int c = 0; c < 4; ++c) {
        const __m512i low = _mm512_shuffle_i32x4(row[c], row[4 + c], 0x88);
        const __m512i high = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0x88);
        const __m512i low_odd = _mm512_shuffle_i32x4(row[c], row[4 + c], 0xdd);
        const __m512i high_odd = _mm512_shuffle_i32x4(row[8 + c], row[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(low, high, 0x88);
        t[8 + c] = _mm512_shuffle_i32x4(low, high, 0xdd);
        t[4 + c] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
    }
    for (int i = 0; i < 16; ++i)
        row[i] = t[i];
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
