#include "relative_tiles.hpp"

#include "selm/base/error.hpp"

#if defined(__x86_64__)

#include <immintrin.h>

// GCC 12 takes the undefined vectors of its own intrinsics for variables that nobody set.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define SELM_AVX512 __attribute__((target("avx512f")))

namespace selm::xsmm {

bool can_take_gradual_tiles()
{
    return __builtin_cpu_supports("avx512f");
}

SELM_AVX512 void take_by_key(const float* from, std::int64_t stride, const std::int32_t* index, std::int32_t keys,
                             std::int32_t rows, float* to, std::int64_t to_stride)
{
    for (std::int32_t row = 0; row < rows; row += 16) {
        const auto lanes = static_cast<__mmask16>(rows - row >= 16 ? 0xffffu : (1u << (rows - row)) - 1u);
        for (std::int32_t key = 0; key < keys; ++key) {
            const std::int32_t* const first = index + (row - key);
            const __m512i places = _mm512_sub_epi32(_mm512_maskz_loadu_epi32(lanes, first), _mm512_set1_epi32(*first));
            const __m512 numbers = _mm512_loadu_ps(from + key * stride + *first);
            _mm512_mask_storeu_ps(to + key * to_stride + row, lanes, _mm512_permutexvar_ps(places, numbers));
        }
    }
}

SELM_AVX512 void add_by_query(const float* from, std::int64_t stride, const std::int32_t* index, std::int32_t keys,
                              std::int32_t rows, const float* added, float* scores, std::int64_t to_stride)
{
    const __m512i backwards = _mm512_set_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (std::int32_t key = 0; key < keys; key += 16) {
        const std::int32_t count = keys - key >= 16 ? 16 : keys - key;
        const auto lanes = static_cast<__mmask16>((1u << count) - 1u);
        const auto reversed = static_cast<__mmask16>(0xffffu << (16 - count));
        for (std::int32_t row = 0; row < rows; ++row) {
            const std::int32_t* const last = index + (row - key); // of the first key: distances fall as keys go on
            const __m512i positions =
                _mm512_permutexvar_epi32(backwards, _mm512_maskz_loadu_epi32(reversed, last - 15));
            const __m512i places = _mm512_sub_epi32(_mm512_set1_epi32(*last), positions);
            const __m512 numbers = _mm512_permutexvar_ps(places, _mm512_loadu_ps(from + row * stride - *last));
            const std::int64_t at = row * to_stride + key;
            const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, added + at), numbers);
            _mm512_mask_storeu_ps(scores + at, lanes, _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, scores + at), sum));
        }
    }
}

} // namespace selm::xsmm

#else

namespace selm::xsmm {

bool can_take_gradual_tiles()
{
    return false;
}

void take_by_key(const float*, std::int64_t, const std::int32_t*, std::int32_t, std::int32_t, float*, std::int64_t)
{
    SELM_EXPECT(can_take_gradual_tiles());
}

void add_by_query(const float*, std::int64_t, const std::int32_t*, std::int32_t, std::int32_t, const float*, float*,
                  std::int64_t)
{
    SELM_EXPECT(can_take_gradual_tiles());
}

} // namespace selm::xsmm

#endif
