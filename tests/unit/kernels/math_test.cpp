#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "elementwise.hpp"
#include "simd.hpp"

namespace selm {
namespace {

double relative_error(float actual, double expected)
{
    return std::abs(static_cast<double>(actual) - expected) / expected;
}

TEST(MathTest, bounded_exp_is_accurate)
{
    for (double x = -87.3; x <= 88; x += 0.00137) {
        const auto argument = static_cast<float>(x);
        ASSERT_LT(relative_error(elementwise::bounded_exp(argument), std::exp(static_cast<double>(argument))), 2e-7) << x;
    }
    constexpr float infinity = std::numeric_limits<float>::infinity();
    EXPECT_EQ(elementwise::bounded_exp(0.0f), 1.0f);
    EXPECT_EQ(elementwise::bounded_exp(-0.0f), 1.0f);
    for (const float x : {-87.7f, -89.0f, -1000.0f, -std::numeric_limits<float>::max(), -infinity})
        EXPECT_EQ(elementwise::bounded_exp(x), 0.0f) << x;
    for (const float x : {88.1f, 1000.0f, std::numeric_limits<float>::max(), infinity})
        EXPECT_EQ(elementwise::bounded_exp(x), elementwise::bounded_exp(88.0f)) << x;
}

TEST(MathTest, exp_of_eight_is_accurate)
{
    for (double x = -87; x <= 0; x += 0.00137) {
        float values[8];
        for (int lane = 0; lane < 8; ++lane)
            values[lane] = std::min(0.0f, static_cast<float>(x + lane * 0.0001));
        float results[8];
        simd::store(results, simd::exp_nonpositive(simd::load(values)));
        for (int lane = 0; lane < 8; ++lane)
            ASSERT_LT(relative_error(results[lane], std::exp(static_cast<double>(values[lane]))), 2e-7) << values[lane];
    }
    constexpr float infinity = std::numeric_limits<float>::infinity();
    const float special[8] = {0,     -infinity, -88,    -1e30f, std::numeric_limits<float>::quiet_NaN(),
                              -0.0f, -87.3f,    -87.31f};
    float results[8];
    simd::store(results, simd::exp_nonpositive(simd::load(special)));
    EXPECT_EQ(results[0], 1.0f);
    EXPECT_EQ(results[1], 0.0f);
    EXPECT_EQ(results[2], 0.0f);
    EXPECT_EQ(results[3], 0.0f);
    EXPECT_TRUE(std::isnan(results[4])) << "a NaN score must show in the result";
    EXPECT_EQ(results[5], 1.0f);
    EXPECT_GT(results[6], 0.0f);
    EXPECT_EQ(results[7], 0.0f);
}

TEST(MathTest, lanes_are_summed_and_compared)
{
    const float values[8] = {1, 2, 4, 8, 16, 32, 64, 128}, mixed[8] = {-3, -1, -9, -2, -7, -1.5f, -4, -8};
    EXPECT_EQ(simd::sum_lanes(simd::load(values)), 255.0f);
    EXPECT_EQ(simd::max_lanes(simd::load(values)), 128.0f);
    EXPECT_EQ(simd::max_lanes(simd::load(mixed)), -1.0f);
}

TEST(MathTest, transposes_any_shape)
{
    for (const std::int64_t rows : {1, 7, 8, 9, 24, 65})
        for (const std::int64_t columns : {1, 5, 8, 17, 64}) {
            const std::int64_t from_stride = columns + 3, to_stride = rows + 2;
            std::vector<float> from(static_cast<std::size_t>(rows * from_stride));
            for (std::size_t i = 0; i < from.size(); ++i)
                from[i] = static_cast<float>(i);
            std::vector<float> to(static_cast<std::size_t>(columns * to_stride), -1);
            simd::transpose(from.data(), from_stride, rows, columns, to.data(), to_stride);
            for (std::int64_t column = 0; column < columns; ++column)
                for (std::int64_t row = 0; row < to_stride; ++row)
                    ASSERT_EQ(to[static_cast<std::size_t>(column * to_stride + row)],
                              row < rows ? from[static_cast<std::size_t>(row * from_stride + column)] : -1.0f);
        }
}

// Every bf16 number, the two midpoints beside it, and their neighbours: the definition of "nearest, ties to even".
TEST(MathTest, bf16_rounds_to_nearest_even)
{
    for (std::uint32_t high = 0; high < 0x10000; ++high) {
        const float exact = std::bit_cast<float>(high << 16);
        if (std::isnan(exact)) {
            ASSERT_TRUE(std::isnan(bf16_to_float(float_to_bf16(exact))));
            ASSERT_TRUE(std::isnan(bf16_to_float(float_to_bf16(std::bit_cast<float>((high << 16) | 1u)))));
            continue;
        }
        ASSERT_EQ(float_to_bf16(exact), high);
        ASSERT_EQ(std::bit_cast<std::uint32_t>(bf16_to_float(static_cast<std::uint16_t>(high))), high << 16);
        if (std::isinf(exact))
            continue;
        const std::uint32_t middle = (high << 16) | 0x8000u;
        ASSERT_EQ(float_to_bf16(std::bit_cast<float>(middle)), high + (high & 1u));
        ASSERT_EQ(float_to_bf16(std::bit_cast<float>(middle - 1)), high);
        ASSERT_EQ(float_to_bf16(std::bit_cast<float>(middle + 1)), high + 1);
    }
    std::vector<float> values = {1.0f, 1.00390625f, -3.14159274f};
    round_to_bf16(values);
    EXPECT_EQ(values, (std::vector<float>{1.0f, 1.0f, -3.140625f}));
}

} // namespace
} // namespace selm
