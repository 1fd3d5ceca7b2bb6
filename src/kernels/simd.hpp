#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

// Eight floats side by side, as GCC's and Clang's vector extension: AVX2 code where the target has it, the same
// results in two SSE halves elsewhere. Everything is forced inline, so no vector crosses a function call (references,
// because GCC notes the ABI of vector parameters where the target lacks AVX).
#pragma GCC diagnostic ignored "-Wpsabi"

namespace selm::simd {

using Float8 = float __attribute__((vector_size(32)));
using Int8 = std::int32_t __attribute__((vector_size(32)));
using Uint8 = std::uint32_t __attribute__((vector_size(32)));

#define SELM_INLINE __attribute__((always_inline)) inline

SELM_INLINE Float8 load(const float* from)
{
    Float8 out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

SELM_INLINE void store(float* to, const Float8& value)
{
    std::memcpy(to, &value, sizeof value);
}

SELM_INLINE Float8 broadcast(float x)
{
    return Float8{x, x, x, x, x, x, x, x};
}

SELM_INLINE Float8 max(const Float8& a, const Float8& b)
{
    return a > b ? a : b;
}

SELM_INLINE Int8 lane_numbers()
{
    return Int8{0, 1, 2, 3, 4, 5, 6, 7};
}

/// Fixed pairing: lanes i and i+4, then i and i+2, then i and i+1.
SELM_INLINE float sum_lanes(const Float8& x)
{
    const Float8 a = x + __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
    const Float8 b = a + __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5);
    const Float8 c = b + __builtin_shufflevector(b, b, 1, 0, 3, 2, 5, 4, 7, 6);
    return c[0];
}

SELM_INLINE float max_lanes(const Float8& x)
{
    const Float8 a = max(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
    const Float8 b = max(a, __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5));
    const Float8 c = max(b, __builtin_shufflevector(b, b, 1, 0, 3, 2, 5, 4, 7, 6));
    return c[0];
}

/// exp of numbers that are at most 0 (as after a maximum was subtracted); 0 below -87.3; NaN stays NaN. Relative error
/// below 2e-7.
SELM_INLINE Float8 exp_nonpositive(const Float8& x)
{
    const Float8 round_magic = broadcast(12582912.0f); // 1.5 * 2^23
    const Float8 clamped = x < -87.3f ? broadcast(-87.3f) : x;
    const Float8 shifted = clamped * 1.44269504088896341f + round_magic;
    const Float8 n = shifted - round_magic;
    const Float8 r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    Float8 p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    // The low mantissa bits of `shifted` hold n: moved into the exponent of 1 they make 2^n.
    const Float8 power = (Float8)(((Uint8)shifted << 23) + 0x3f800000u);
    const Float8 y = p * power;
    return x < -87.3f ? broadcast(0.0f) : y;
}

SELM_INLINE void transpose_8x8(const float* from, std::int64_t from_stride, float* to, std::int64_t to_stride)
{
    Float8 r[8], s[8];
    for (int i = 0; i < 8; ++i)
        r[i] = load(from + i * from_stride);
    for (int i = 0; i < 8; i += 2) {
        s[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        s[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = __builtin_shufflevector(s[i], s[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        r[i + 1] = __builtin_shufflevector(s[i], s[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        r[i + 2] = __builtin_shufflevector(s[i + 1], s[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
        r[i + 3] = __builtin_shufflevector(s[i + 1], s[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int i = 0; i < 4; ++i) {
        store(to + i * to_stride, __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
        store(to + (i + 4) * to_stride, __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
    }
}

/// to[column][row] = from[row][column].
inline void transpose(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns, float* to,
                      std::int64_t to_stride)
{
    const std::int64_t whole_rows = rows - rows % 8, whole_columns = columns - columns % 8;
    for (std::int64_t row = 0; row < whole_rows; row += 8)
        for (std::int64_t column = 0; column < whole_columns; column += 8)
            transpose_8x8(from + row * from_stride + column, from_stride, to + column * to_stride + row, to_stride);
    for (std::int64_t row = 0; row < rows; ++row)
        for (std::int64_t column = row < whole_rows ? whole_columns : 0; column < columns; ++column)
            to[column * to_stride + row] = from[row * from_stride + column];
}

} // namespace selm::simd
