#include "xsmm_gemm.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include <libxsmm.h>

#include "bf16_rows.hpp"
#include "selm/base/error.hpp"
#include "selm/base/log.hpp"
#include "selm/kernels/engine.hpp"

namespace selm::xsmm {
namespace {

std::size_t hash(const GemmShape& shape)
{
    std::uint64_t value = (shape.accumulate ? 0x9e3779b97f4a7c15u : 0u) + (shape.bf16 ? 0x94d049bb133111ebu : 0u);
    for (const std::int32_t field : {shape.m, shape.n, shape.k, shape.lda, shape.ldb, shape.ldc})
        value = (value ^ static_cast<std::uint32_t>(field)) * 0xff51afd7ed558ccdu + (value >> 29);
    return static_cast<std::size_t>(value ^ (value >> 32));
}

GemmKernel::Compiled compile(const GemmShape& shape)
{
    const float alpha = 1, beta = shape.accumulate ? 1.0f : 0.0f;
    if (!shape.bf16)
        return reinterpret_cast<GemmKernel::Compiled>(libxsmm_smmdispatch(
            shape.m, shape.n, shape.k, &shape.lda, &shape.ldb, &shape.ldc, &alpha, &beta, nullptr, nullptr));
    const int interleaved = LIBXSMM_GEMM_FLAG_VNNI_A;
    return reinterpret_cast<GemmKernel::Compiled>(libxsmm_bsmmdispatch(
        shape.m, shape.n, shape.k, &shape.lda, &shape.ldb, &shape.ldc, &alpha, &beta, &interleaved, nullptr));
}

/// Element i of f32 or bf16 numbers.
float element(const void* from, std::int64_t i, bool bf16)
{
    if (!bf16)
        return static_cast<const float*>(from)[i];
    std::uint16_t bits = 0;
    std::memcpy(&bits, static_cast<const char*>(from) + 2 * i, sizeof bits);
    return bf16_to_float(bits);
}

} // namespace

void GemmKernel::run_row_by_row(const void* a, const void* b, float* c) const
{
    const std::int64_t row_bytes = shape_.ldb * (shape_.bf16 ? 2 : 4);
    for (std::int64_t row = 0; row < shape_.n; ++row)
        compiled_(a, static_cast<const char*>(b) + row * row_bytes, c + row * shape_.ldc);
}

void GemmKernel::run_plain_loop(const void* a, const void* b, float* c) const
{
    const std::int64_t lda = shape_.lda, ldb = shape_.ldb, pair = shape_.bf16 ? 2 : 1;
    for (std::int64_t row = 0; row < shape_.n; ++row) {
        float* out = c + row * shape_.ldc;
        if (!shape_.accumulate)
            std::fill(out, out + shape_.m, 0.0f);
        for (std::int64_t k = 0; k < shape_.k; ++k) {
            const float left = element(b, row * ldb + k, shape_.bf16);
            for (std::int64_t column = 0; column < shape_.m; ++column)
                out[column] =
                    std::fma(element(a, (k / pair * lda + column) * pair + k % pair, shape_.bf16), left, out[column]);
        }
    }
}

GemmKernels::GemmKernels() : table_(1024)
{
    libxsmm_init();
    target_ = libxsmm_get_target_arch();
    panel_width_ = libxsmm_get_target_archid() >= LIBXSMM_X86_AVX512 ? 64 : 32;
    has_bf16_ = libxsmm_get_target_archid() >= LIBXSMM_X86_AVX512_CPX && cpu_has_bf16();
    is_row_invariant_ = measure_row_invariance(false) && (!has_bf16_ || measure_row_invariance(true));
}

GemmKernel GemmKernels::find(const GemmShape& shape)
{
    std::size_t place = hash(shape) & (table_.size() - 1);
    while (table_[place].shape().m != 0) {
        if (table_[place].shape() == shape)
            return table_[place];
        place = (place + 1) & (table_.size() - 1);
    }
    SELM_EXPECT(shape.m > 0 && shape.n > 0 && shape.k > 0);
    SELM_EXPECT(shape.lda >= shape.m && shape.ldb >= shape.k && shape.ldc >= shape.m);
    SELM_EXPECT(!shape.bf16 || shape.k % 2 == 0);
    if (2 * ++used_ > table_.size()) {
        grow();
        --used_;
        return find(shape);
    }
    // LIBXSMM's AVX-512 code for a single vector of columns, or for such a rest, splits the sums in a way that depends on
    // the number of rows: rows would not keep their bits.
    const std::int32_t rest = shape.m % 64;
    const bool row_by_row = has_avx512() && rest >= 1 && rest <= 16;
    GemmShape compiled_shape = shape;
    if (row_by_row)
        compiled_shape.n = 1;
    const GemmKernel::Compiled compiled = compile(compiled_shape);
    if (compiled == nullptr && plain_loops_++ == 0)
        SELM_LOG_LOCAL(warning, "LIBXSMM (" << target_ << ") has no kernel for the product m=" << shape.m
                                            << " n=" << shape.n << " k=" << shape.k
                                            << (shape.bf16 ? " in bf16" : "") << ": a plain loop computes it, and others like it, more slowly");
    table_[place] = GemmKernel(compiled, shape, row_by_row && compiled != nullptr);
    return table_[place];
}

void GemmKernels::grow()
{
    std::vector<GemmKernel> old(2 * table_.size());
    old.swap(table_);
    for (const GemmKernel& kernel : old) {
        if (kernel.shape().m == 0)
            continue;
        std::size_t place = hash(kernel.shape()) & (table_.size() - 1);
        while (table_[place].shape().m != 0)
            place = (place + 1) & (table_.size() - 1);
        table_[place] = kernel;
    }
}

bool GemmKernels::measure_row_invariance(bool bf16)
{
    constexpr std::int32_t k = 98, most_rows = 17;
    const std::int32_t m = panel_width_;
    std::vector<float> a(static_cast<std::size_t>(m) * k), b(most_rows * k), one(static_cast<std::size_t>(m));
    std::uint32_t state = 1;
    for (std::vector<float>* values : {&a, &b})
        for (float& value : *values)
            value = static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / 8388608.0f - 1.0f;
    std::vector<std::uint16_t> a_bf16(a.size()), b_bf16(b.size());
    std::transform(a.begin(), a.end(), a_bf16.begin(), float_to_bf16);
    std::transform(b.begin(), b.end(), b_bf16.begin(), float_to_bf16);
    const void* const a_data = bf16 ? static_cast<const void*>(a_bf16.data()) : a.data();
    const auto b_row = [&](std::int32_t row) {
        return bf16 ? static_cast<const void*>(b_bf16.data() + row * k) : b.data() + row * k;
    };
    std::vector<float> all(static_cast<std::size_t>(m) * most_rows);
    for (const std::int32_t rows : {2, 3, 4, 5, 6, 7, 8, 12, 16, most_rows}) {
        const GemmShape shape{
            .m = m, .n = rows, .k = k, .lda = m, .ldb = k, .ldc = m, .accumulate = false, .bf16 = bf16};
        find(shape)(a_data, b_row(0), all.data());
        for (std::int32_t row = 0; row < rows; ++row) {
            GemmShape single = shape;
            single.n = 1;
            find(single)(a_data, b_row(row), one.data());
            if (std::memcmp(one.data(), all.data() + row * m, one.size() * sizeof(float)) != 0)
                return false;
        }
    }
    return true;
}

} // namespace selm::xsmm
