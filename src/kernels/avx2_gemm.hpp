#pragma once

#include <cstdint>

// Matrix products for CPUs with AVX2 and FMA, on panels whose layout is that of xsmm_linear.cpp.
namespace selm::avx2 {

/// Whether this build has the kernels (x86-64 alone) and this CPU can run them.
bool is_supported();

/// Columns that a panel has per input: four vectors.
inline constexpr std::int64_t panel_width = 32;

/**
 * @brief A product with one panel: out[r][c] = sum of x[r][k] panel[k][c] over k < depth, plus what `add` holds.
 *
 * Each sum is one chain of fused multiply-adds in order of k, from zero, whatever the other rows are. 32 columns are read and
 * written; out may be add.
 */
struct PanelTile {
    const float* panel = nullptr;              ///< [depth][32]; or
    const std::uint32_t* bf16_panel = nullptr; ///< [depth][2][8] words of two numbers, i and i + 8
    const float* x = nullptr;
    std::int64_t x_stride = 0, rows = 0, depth = 0;
    const float* add = nullptr; ///< null: nothing is added
    std::int64_t add_stride = 0;
    float* out = nullptr;
    std::int64_t out_stride = 0;
    const void* next_panel = nullptr; ///< of the same size, to be fetched into the cache meanwhile; may be null
};
void multiply(const PanelTile& tile);

} // namespace selm::avx2
