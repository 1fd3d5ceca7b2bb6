#include "xsmm_gemm.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include <libxsmm.h>

#include "selm/base/error.hpp"
#include "selm/base/log.hpp"

namespace selm::xsmm {
namespace {

std::size_t hash(const GemmShape& shape)
{
    std::uint64_t value = shape.accumulate ? 0x9e3779b97f4a7c15u : 0u;
    for (const std::int32_t field : {shape.m, shape.n, shape.k, shape.lda, shape.ldb, shape.ldc})
        value = (value ^ static_cast<std::uint32_t>(field)) * 0xff51afd7ed558ccdu + (value >> 29);
    return static_cast<std::size_t>(value ^ (value >> 32));
}

GemmKernel::Compiled compile(const GemmShape& shape)
{
    const float alpha = 1, beta = shape.accumulate ? 1.0f : 0.0f;
    return libxsmm_smmdispatch(shape.m, shape.n, shape.k, &shape.lda, &shape.ldb, &shape.ldc, &alpha, &beta, nullptr,
                               nullptr);
}

} // namespace

void GemmKernel::run_plain_loop(const float* a, const float* b, float* c) const
{
    for (std::int32_t row = 0; row < shape_.n; ++row) {
        float* out = c + static_cast<std::int64_t>(row) * shape_.ldc;
        const float* left = b + static_cast<std::int64_t>(row) * shape_.ldb;
        if (!shape_.accumulate)
            std::fill(out, out + shape_.m, 0.0f);
        for (std::int32_t k = 0; k < shape_.k; ++k) {
            const float* right = a + static_cast<std::int64_t>(k) * shape_.lda;
            for (std::int32_t column = 0; column < shape_.m; ++column)
                out[column] = std::fma(right[column], left[k], out[column]);
        }
    }
}

GemmKernels::GemmKernels() : table_(1024)
{
    libxsmm_init();
    target_ = libxsmm_get_target_arch();
    panel_width_ = libxsmm_get_target_archid() >= LIBXSMM_X86_AVX512 ? 64 : 32;
    is_row_invariant_ = measure_row_invariance();
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
    if (2 * ++used_ > table_.size()) {
        grow();
        --used_;
        return find(shape);
    }
    const GemmKernel::Compiled compiled = compile(shape);
    if (compiled == nullptr && plain_loops_++ == 0)
        SELM_LOG_LOCAL(warning, "LIBXSMM (" << target_ << ") has no kernel for the product m=" << shape.m
                                            << " n=" << shape.n << " k=" << shape.k
                                            << ": a plain loop computes it, and others like it, more slowly");
    table_[place] = GemmKernel(compiled, shape);
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

bool GemmKernels::measure_row_invariance()
{
    constexpr std::int32_t k = 97, most_rows = 17;
    const std::int32_t m = panel_width_;
    std::vector<float> a(static_cast<std::size_t>(m) * k), b(most_rows * k), one(static_cast<std::size_t>(m));
    std::uint32_t state = 1;
    for (std::vector<float>* values : {&a, &b})
        for (float& value : *values)
            value = static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / 8388608.0f - 1.0f;
    std::vector<float> all(static_cast<std::size_t>(m) * most_rows);
    for (const std::int32_t rows : {2, 3, 4, 5, 6, 7, 8, 12, 16, most_rows}) {
        const GemmShape shape{.m = m, .n = rows, .k = k, .lda = m, .ldb = k, .ldc = m};
        find(shape)(a.data(), b.data(), all.data());
        for (std::int32_t row = 0; row < rows; ++row) {
            GemmShape single = shape;
            single.n = 1;
            find(single)(a.data(), b.data() + row * k, one.data());
            if (std::memcmp(one.data(), all.data() + row * m, one.size() * sizeof(float)) != 0)
                return false;
        }
    }
    return true;
}

} // namespace selm::xsmm
