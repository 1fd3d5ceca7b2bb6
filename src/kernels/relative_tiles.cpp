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
#define SELM_AVX512_INLINE __attribute__((target("avx512f"), always_inline)) inline

namespace selm::xsmm {
namespace {

SELM_AVX512_INLINE __mmask16 first_of_16(std::int32_t count)
{
    return static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1u);
}

/// Of the keys from `last` on, whose distances fall: their relative positions below the first one's.
SELM_AVX512_INLINE __m512i places_of_keys(const std::int32_t* last, std::int32_t count)
{
    const __m512i backwards = _mm512_set_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const auto reversed = static_cast<__mmask16>(0xffffu << (16 - count));
    return _mm512_sub_epi32(_mm512_set1_epi32(*last),
                            _mm512_permutexvar_epi32(backwards, _mm512_maskz_loadu_epi32(reversed, last - 15)));
}

SELM_AVX512_INLINE __m512i places_of_rows(const std::int32_t* first, __mmask16 lanes)
{
    return _mm512_sub_epi32(_mm512_maskz_loadu_epi32(lanes, first), _mm512_set1_epi32(*first));
}

template<int lanes>
SELM_AVX512_INLINE __m512 moved_up(__m512 x)
{
    return _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(x), _mm512_setzero_si512(), 16 - lanes));
}

/// to[places] += numbers, places rising by 0 or 1 from 0: sums up to the end of each run, less those up to the run before.
SELM_AVX512_INLINE void sum_runs(__m512 numbers, __m512i places, __mmask16 lanes, float* to)
{
    const __m512i none = _mm512_set1_epi32(-1);
    const __m512i valid = _mm512_mask_mov_epi32(none, lanes, places);
    const __mmask16 ends = _mm512_mask_cmpneq_epi32_mask(lanes, valid, _mm512_alignr_epi32(none, valid, 1));
    if (ends == 0xffffu) {
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), numbers));
        return;
    }
    __m512 sums = _mm512_add_ps(numbers, moved_up<1>(numbers));
    sums = _mm512_add_ps(sums, moved_up<2>(sums));
    sums = _mm512_add_ps(sums, moved_up<4>(sums));
    sums = _mm512_add_ps(sums, moved_up<8>(sums));
    sums = _mm512_maskz_compress_ps(ends, sums);
    const __m512 runs = _mm512_sub_ps(sums, moved_up<1>(sums));
    const __mmask16 count = first_of_16(__builtin_popcount(ends));
    _mm512_mask_storeu_ps(to, count, _mm512_add_ps(_mm512_maskz_loadu_ps(count, to), runs));
}

} // namespace

bool can_take_gradual_tiles()
{
    return __builtin_cpu_supports("avx512f");
}

SELM_AVX512 void take_by_key(const float* from, std::int64_t stride, const std::int32_t* index, std::int32_t keys,
                             std::int32_t rows, float* to, std::int64_t to_stride)
{
    for (std::int32_t row = 0; row < rows; row += 16) {
        const __mmask16 lanes = first_of_16(rows - row);
        for (std::int32_t key = 0; key < keys; ++key) {
            const std::int32_t* const first = index + (row - key);
            const __m512 numbers = _mm512_loadu_ps(from + key * stride + *first);
            _mm512_mask_storeu_ps(to + key * to_stride + row, lanes,
                                  _mm512_permutexvar_ps(places_of_rows(first, lanes), numbers));
        }
    }
}

SELM_AVX512 void add_by_query(const float* from, std::int64_t stride, const std::int32_t* index, std::int32_t keys,
                              std::int32_t rows, const float* added, float* scores, std::int64_t to_stride)
{
    for (std::int32_t key = 0; key < keys; key += 16) {
        const std::int32_t count = keys - key >= 16 ? 16 : keys - key;
        const __mmask16 lanes = first_of_16(count);
        for (std::int32_t row = 0; row < rows; ++row) {
            const std::int32_t* const last = index + (row - key);
            const __m512 numbers =
                _mm512_permutexvar_ps(places_of_keys(last, count), _mm512_loadu_ps(from + row * stride - *last));
            const std::int64_t at = row * to_stride + key;
            const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, added + at), numbers);
            _mm512_mask_storeu_ps(scores + at, lanes, _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, scores + at), sum));
        }
    }
}

SELM_AVX512 void sum_by_key(const float* from, std::int64_t from_stride, const std::int32_t* index, std::int32_t keys,
                            std::int32_t rows, float* to, std::int64_t stride)
{
    for (std::int32_t row = 0; row < rows; row += 16) {
        const __mmask16 lanes = first_of_16(rows - row);
        for (std::int32_t key = 0; key < keys; ++key) {
            const std::int32_t* const first = index + (row - key);
            sum_runs(_mm512_maskz_loadu_ps(lanes, from + key * from_stride + row), places_of_rows(first, lanes), lanes,
                     to + key * stride + *first);
        }
    }
}

SELM_AVX512 void sum_by_query(const float* from, std::int64_t from_stride, const std::int32_t* index, std::int32_t keys,
                              std::int32_t rows, float* to, std::int64_t stride)
{
    for (std::int32_t key = 0; key < keys; key += 16) {
        const std::int32_t count = keys - key >= 16 ? 16 : keys - key;
        const __mmask16 lanes = first_of_16(count);
        for (std::int32_t row = 0; row < rows; ++row) {
            const std::int32_t* const last = index + (row - key);
            sum_runs(_mm512_maskz_loadu_ps(lanes, from + row * from_stride + key), places_of_keys(last, count), lanes,
                     to + row * stride - *last);
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

void sum_by_key(const float*, std::int64_t, const std::int32_t*, std::int32_t, std::int32_t, float*, std::int64_t)
{
    SELM_EXPECT(can_take_gradual_tiles());
}

void sum_by_query(const float*, std::int64_t, const std::int32_t*, std::int32_t, std::int32_t, float*, std::int64_t)
{
    SELM_EXPECT(can_take_gradual_tiles());
}

} // namespace selm::xsmm

#endif
