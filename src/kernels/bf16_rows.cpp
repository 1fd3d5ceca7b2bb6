#include "bf16_rows.hpp"

#include "bf16_simd.hpp"
#include "selm/base/error.hpp"

#if defined(__x86_64__)

namespace selm::xsmm {

bool cpu_has_bf16()
{
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16");
}

SELM_BF16 void pair_columns(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns,
                            float* to, std::int64_t to_stride)
{
    for (std::int64_t row = 0; row < rows; ++row, from += from_stride, to += to_stride) {
        std::int64_t column = 0;
        for (; column + 32 <= columns; column += 32)
            _mm512_storeu_si512(to + column / 2, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + column + 16),
                                                                            _mm512_loadu_ps(from + column)));
        for (; column < columns; column += 16) {
            const __m512 values = _mm512_maskz_loadu_ps(first_lanes(columns - column), from + column);
            const __m256i numbers = (__m256i)_mm512_cvtneps_pbh(values);
            _mm256_mask_storeu_epi32(to + column / 2,
                                     static_cast<__mmask8>(first_lanes(pairs_of(columns - column)) & 0xffu), numbers);
        }
    }
}

SELM_BF16 void pair_rows(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns, float* to,
                         std::int64_t to_stride)
{
    for (std::int64_t row = 0; row < rows; row += 2, from += 2 * from_stride, to += to_stride) {
        const bool has_second = row + 1 < rows;
        for (std::int64_t column = 0; column < columns; column += 16) {
            const __mmask16 lanes = first_lanes(columns - column);
            const __m512 first = _mm512_maskz_loadu_ps(lanes, from + column);
            const __m512 second =
                has_second ? _mm512_maskz_loadu_ps(lanes, from + from_stride + column) : _mm512_setzero_ps();
            _mm512_mask_storeu_epi32(to + column, lanes, paired(first, second));
        }
    }
}

SELM_BF16 void pair_rows_transposed(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns,
                                    float* to, std::int64_t to_stride)
{
    for (std::int64_t row = 0; row < rows; row += 32) {
        const __mmask16 pairs = first_lanes(pairs_of(rows - row));
        for (std::int64_t column = 0; column < columns; column += 16) {
            const __mmask16 lanes = first_lanes(columns - column);
            __m512i block[16];
            for (int pair = 0; pair < 16; ++pair) {
                const std::int64_t first = row + 2 * pair;
                const float* const values = from + first * from_stride + column;
                block[pair] = first >= rows ? _mm512_setzero_si512()
                                            : paired(_mm512_maskz_loadu_ps(lanes, values),
                                                     first + 1 < rows ? _mm512_maskz_loadu_ps(lanes, values + from_stride)
                                                                      : _mm512_setzero_ps());
            }
            transpose_16x16(block);
            const int count = static_cast<int>(columns - column < 16 ? columns - column : 16);
            for (int i = 0; i < count; ++i)
                _mm512_mask_storeu_epi32(to + (column + i) * to_stride + row / 2, pairs, block[i]);
        }
    }
}

} // namespace selm::xsmm

#else

namespace selm::xsmm {

bool cpu_has_bf16()
{
    return false;
}

void pair_columns(const float*, std::int64_t, std::int64_t, std::int64_t, float*, std::int64_t)
{
    SELM_EXPECT(cpu_has_bf16());
}

void pair_rows(const float*, std::int64_t, std::int64_t, std::int64_t, float*, std::int64_t)
{
    SELM_EXPECT(cpu_has_bf16());
}

void pair_rows_transposed(const float*, std::int64_t, std::int64_t, std::int64_t, float*, std::int64_t)
{
    SELM_EXPECT(cpu_has_bf16());
}

} // namespace selm::xsmm

#endif
