#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace selm::xsmm {

/**
 * @brief A small matrix product as LIBXSMM sees it (column-major): C(m x n) = or += A(m x k) B(k x n).
 *
 * Read row-major: n rows of C, each of m columns (row stride ldc), are the n rows of B (k long, row stride ldb) times
 * the k rows of A (m long, row stride lda).
 */
struct GemmShape {
    std::int32_t m = 0, n = 0, k = 0;
    std::int32_t lda = 0, ldb = 0, ldc = 0;
    bool accumulate = false;
    /// A and B are bf16, C is f32, k is even; A's rows 2i and 2i + 1 lie interleaved: [k/2][lda][2].
    bool bf16 = false;

    bool operator==(const GemmShape&) const = default;
};

/// Compiled by LIBXSMM for its shape, or a plain loop where LIBXSMM has no code for it.
class GemmKernel {
  public:
    using Compiled = void (*)(const void* a, const void* b, float* c, ...);

    GemmKernel() = default;
    /// @param row_by_row compiled has one row, and is called for each of the shape's.
    GemmKernel(Compiled compiled, const GemmShape& shape, bool row_by_row = false)
        : compiled_(compiled), shape_(shape), row_by_row_(row_by_row)
    {
    }

    /// @param a, b f32, or bf16 where the shape says so.
    void operator()(const void* a, const void* b, float* c) const
    {
        if (compiled_ != nullptr && !row_by_row_) [[likely]]
            compiled_(a, b, c);
        else if (row_by_row_)
            run_row_by_row(a, b, c);
        else
            run_plain_loop(a, b, c);
    }

    const GemmShape& shape() const { return shape_; }
    bool is_compiled() const { return compiled_ != nullptr; }
    bool is_row_by_row() const { return row_by_row_; }
    /// Every output element is one chain of fused multiply-adds in order of k, as in the compiled f32 kernels that do not go
    /// row by row.
    void run_plain_loop(const void* a, const void* b, float* c) const;

  private:
    void run_row_by_row(const void* a, const void* b, float* c) const;

    Compiled compiled_ = nullptr;
    GemmShape shape_;
    bool row_by_row_ = false;
};

/// Finds or compiles kernels; a lookup takes some ten nanoseconds.
class GemmKernels {
  public:
    GemmKernels();
    GemmKernel find(const GemmShape& shape);

    /// Width of the panels that weights are packed in: two vectors of the widest kind, times two.
    std::int32_t panel_width() const { return panel_width_; }
    /// LIBXSMM's name of the instruction set in use, for example "hsw" (AVX2) or "cpx" (AVX-512 with bf16).
    const std::string& target() const { return target_; }
    /// Whether the compiled kernels have 512-bit vectors.
    bool has_avx512() const { return panel_width_ == 64; }
    /// Whether shapes with bf16 are compiled to instructions that multiply bf16 numbers.
    bool has_bf16() const { return has_bf16_; }
    /// Shapes for which a plain loop runs instead of compiled code.
    std::int64_t plain_loops() const { return plain_loops_; }
    /// Measured once at construction: are the bits of a row of C independent of how many rows the call has?
    bool is_row_invariant() const { return is_row_invariant_; }

  private:
    bool measure_row_invariance(bool bf16);
    void grow();

    std::vector<GemmKernel> table_; ///< open addressing; a free place has m = 0
    std::size_t used_ = 0;
    std::int32_t panel_width_ = 32;
    std::string target_;
    std::int64_t plain_loops_ = 0;
    bool has_bf16_ = false, is_row_invariant_ = false;
};

} // namespace selm::xsmm
