#include "avx2_gemm.hpp"

#if defined(__x86_64__)

#include <algorithm>

#include <immintrin.h>

// Compiled for AVX2 and FMA whatever the build's target is: every function says so, and is called after is_supported().
#define SELM_AVX2 __attribute__((target("avx2,fma")))
#define SELM_AVX2_INLINE __attribute__((target("avx2,fma"), always_inline)) inline

namespace selm::avx2 {
namespace {

SELM_AVX2_INLINE void fetch(const void* from)
{
    _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T0);
}

/// The part of a tile that one call of multiply_rows computes, and the memory that it fetches meanwhile.
struct Part {
    std::int64_t row = 0, column = 0;
    const char* fetch = nullptr;
    std::int64_t fetch_step = 0; ///< bytes per input
};

/**
 * Rows x Vectors sums in registers: 6 x 2 or 3 x 4 leave room for vectors of the panel and a number of x. Twelve sums keep
 * both multipliers busy (each takes a vector per cycle and four cycles for it), with six broadcasts and two loads.
 */
template <int Rows, int Vectors, bool IsBf16>
SELM_AVX2_INLINE void multiply_rows(const PanelTile& t, const Part& part)
{
    __m256 sums[Rows][Vectors];
    const std::int64_t stride = t.x_stride, depth = t.depth;
    const float* x = t.x + part.row * stride;
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v)
            sums[r][v] = _mm256_setzero_ps();
    constexpr std::int64_t panel_bytes = panel_width * (IsBf16 ? 2 : 4);
    const char* panel = IsBf16 ? reinterpret_cast<const char*>(t.bf16_panel + part.column / 2)
                               : reinterpret_cast<const char*>(t.panel + part.column);
    const char* ahead = part.fetch;
    const std::int64_t fetch_step = part.fetch_step;
    for (std::int64_t k = 0; k < depth; ++k, panel += panel_bytes, ahead += fetch_step, ++x) {
        fetch(ahead);
        if constexpr (Vectors == 4 && !IsBf16)
            fetch(ahead + 64);
        __m256 a[Rows];
        if constexpr (Vectors == 4) {
#pragma GCC unroll 6
            for (int r = 0; r < Rows; ++r)
                a[r] = _mm256_broadcast_ss(x + r * stride);
        }
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v += 2) {
            __m256 b[2];
            if constexpr (IsBf16) {
                const __m256i pair = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 16 * v));
                b[0] = _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
                b[1] = _mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
            } else {
                b[0] = _mm256_loadu_ps(reinterpret_cast<const float*>(panel) + 8 * v);
                b[1] = _mm256_loadu_ps(reinterpret_cast<const float*>(panel) + 8 * v + 8);
            }
#pragma GCC unroll 6
            for (int r = 0; r < Rows; ++r) {
                if constexpr (Vectors == 2)
                    a[r] = _mm256_broadcast_ss(x + r * stride);
                sums[r][v] = _mm256_fmadd_ps(a[r], b[0], sums[r][v]);
                sums[r][v + 1] = _mm256_fmadd_ps(a[r], b[1], sums[r][v + 1]);
            }
        }
    }
    float* const out = t.out + part.row * t.out_stride + part.column;
    const std::int64_t out_stride = t.out_stride;
    if (t.add != nullptr) {
        const float* const add = t.add + part.row * t.add_stride + part.column;
        const std::int64_t add_stride = t.add_stride;
#pragma GCC unroll 6
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v)
                sums[r][v] = _mm256_add_ps(sums[r][v], _mm256_loadu_ps(add + r * add_stride + 8 * v));
    }
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v)
            _mm256_storeu_ps(out + r * out_stride + 8 * v, sums[r][v]);
}

/// Fetching the next panel is shared out evenly over the rows: all at once would keep the first group waiting.
template <int Rows, bool IsBf16>
SELM_AVX2 void multiply_group(const PanelTile& t, std::int64_t row)
{
    constexpr std::int64_t panel_bytes = panel_width * (IsBf16 ? 2 : 4), parts = Rows <= 3 ? 1 : 2;
    Part part{.row = row, .column = 0, .fetch = reinterpret_cast<const char*>(t.x), .fetch_step = 0};
    if (t.next_panel != nullptr) {
        part.fetch = static_cast<const char*>(t.next_panel) + row * t.depth * panel_bytes / t.rows;
        part.fetch_step = (Rows * panel_bytes + t.rows * parts - 1) / (t.rows * parts);
    }
    // The next group's rows are far apart, where no hardware fetches ahead.
    const std::int64_t end = std::min<std::int64_t>(row + 12, t.rows);
    for (std::int64_t next = row + 6; next < end; ++next)
        for (std::int64_t k = 0; k < t.depth; k += 16)
            fetch(t.x + next * t.x_stride + k);
    if constexpr (parts == 1) {
        multiply_rows<Rows, 4, IsBf16>(t, part);
    } else {
        multiply_rows<Rows, 2, IsBf16>(t, part);
        part.column = 16;
        part.fetch += t.depth * part.fetch_step;
        multiply_rows<Rows, 2, IsBf16>(t, part);
    }
}

/// Rows of the next group: sixes and fives where possible, then twos and threes; four rows make too few sums for one column
/// half and too many for both.
std::int64_t group_rows(std::int64_t left)
{
    static constexpr std::int64_t few[] = {0, 1, 2, 3, 2, 5, 6, 5, 6, 6, 5, 6, 6, 6, 6};
    if (left < 15)
        return few[left];
    const std::int64_t groups = (left + 5) / 6;
    return (left + groups - 1) / groups;
}

template <bool IsBf16>
void multiply_groups(const PanelTile& t)
{
    for (std::int64_t row = 0; row < t.rows;) {
        const std::int64_t rows = group_rows(t.rows - row);
        switch (rows) {
        case 1: multiply_group<1, IsBf16>(t, row); break;
        case 2: multiply_group<2, IsBf16>(t, row); break;
        case 3: multiply_group<3, IsBf16>(t, row); break;
        case 5: multiply_group<5, IsBf16>(t, row); break;
        default: multiply_group<6, IsBf16>(t, row); break;
        }
        row += rows;
    }
}

} // namespace

bool is_supported()
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

void multiply(const PanelTile& tile)
{
    if (tile.bf16_panel != nullptr)
        multiply_groups<true>(tile);
    else
        multiply_groups<false>(tile);
}

} // namespace selm::avx2

#else

#include "selm/base/error.hpp"

namespace selm::avx2 {

bool is_supported()
{
    return false;
}

void multiply(const PanelTile&)
{
    SELM_EXPECT(false); // is_supported() is
}

} // namespace selm::avx2

#endif
