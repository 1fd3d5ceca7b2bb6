#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "xsmm_gemm.hpp"

namespace selm::xsmm {
namespace {

std::vector<float> random_floats(std::size_t count, unsigned seed)
{
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<float> out(count);
    for (float& value : out)
        value = normal(generator);
    return out;
}

std::vector<GemmShape> shapes_to_test()
{
    std::vector<GemmShape> out;
    for (const std::int32_t m : {1, 3, 6, 16, 31, 32, 64, 80})
        for (const std::int32_t n : {1, 2, 5, 13, 64})
            for (const std::int32_t k : {1, 7, 64, 577})
                for (const bool accumulate : {false, true})
                    if (m * n * k < 200000) // the plain loop is slow where the compiler has no FMA instruction
                        out.push_back({m, n, k, m + 3, k + 5, m + 1, accumulate});
    return out;
}

// The fallback and the compiled code are interchangeable: the same chain of fused multiply-adds, bit for bit, unless LIBXSMM
// splits the sums of narrow shapes.
TEST(XsmmGemmTest, compiled_kernels_have_the_bits_of_the_plain_loop)
{
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("fma"))
        GTEST_SKIP() << "the compiled kernels of a CPU without FMA round after each product";
#endif
    GemmKernels kernels;
    for (const GemmShape& s : shapes_to_test()) {
        const std::vector<float> a = random_floats(static_cast<std::size_t>(s.lda * s.k), 1);
        const std::vector<float> b = random_floats(static_cast<std::size_t>(s.ldb * s.n), 2);
        const std::vector<float> before = random_floats(static_cast<std::size_t>(s.ldc * s.n), 3);
        std::vector<float> compiled = before, plain = before;
        const GemmKernel kernel = kernels.find(s);
        kernel(a.data(), b.data(), compiled.data());
        kernel.run_plain_loop(a.data(), b.data(), plain.data());
        if (kernel.is_row_by_row()) {
            for (std::size_t i = 0; i < plain.size(); ++i)
                ASSERT_NEAR(compiled[i], plain[i], 1e-4) << "m " << s.m << " n " << s.n << " k " << s.k; // f32, sums of tens
            continue;
        }
        ASSERT_EQ(std::memcmp(compiled.data(), plain.data(), plain.size() * sizeof(float)), 0)
            << "m " << s.m << " n " << s.n << " k " << s.k << " accumulate " << s.accumulate << " on "
            << kernels.target();
    }
}

TEST(XsmmGemmTest, plain_loop_equals_a_sum_in_double)
{
    const GemmShape s{.m = 5, .n = 3, .k = 17, .lda = 6, .ldb = 18, .ldc = 7, .accumulate = true};
    const std::vector<float> a = random_floats(6 * 17, 1), b = random_floats(18 * 3, 2),
                             before = random_floats(7 * 3, 3);
    std::vector<float> c = before;
    GemmKernel(nullptr, s)(a.data(), b.data(), c.data());
    for (std::size_t row = 0; row < 3; ++row) {
        for (std::size_t column = 0; column < 5; ++column) {
            double expected = static_cast<double>(before[row * 7 + column]);
            for (std::size_t k = 0; k < 17; ++k)
                expected += static_cast<double>(a[k * 6 + column]) * static_cast<double>(b[row * 18 + k]);
            EXPECT_NEAR(static_cast<double>(c[row * 7 + column]), expected, 1e-5); // 17 roundings of numbers below 32
        }
        EXPECT_EQ(c[row * 7 + 5], before[row * 7 + 5]) << "columns beyond m are left alone";
    }
}

TEST(XsmmGemmTest, finds_the_right_kernel_among_many)
{
    GemmKernels kernels;
    const auto shape_of = [](std::int32_t i) {
        return GemmShape{
            .m = 1 + i % 8, .n = 1 + i / 8 % 16, .k = 2 + i / 128, .lda = 8, .ldb = 40, .ldc = 9, .accumulate = false};
    };
    constexpr std::int32_t count = 1500; // the table starts with 1024 places, so it grows
    for (const int pass : {1, 2})
        for (std::int32_t i = 0; i < count; ++i)
            ASSERT_EQ(kernels.find(shape_of(i)).shape(), shape_of(i)) << "pass " << pass;
}

} // namespace
} // namespace selm::xsmm
