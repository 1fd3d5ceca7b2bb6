#pragma once

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "reference.hpp"
#include "selm/kernels/engine.hpp"

namespace selm {

using reference::Matrix;

/// The aten engine with the parts that it has on CUDA devices, computed on the CPU.
std::unique_ptr<Engine> make_aten_engine_with_parts();

/// f32 values (as doubles) from a normal distribution.
inline Matrix random_matrix(std::int64_t rows, std::int64_t columns, unsigned seed, double deviation = 1)
{
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal(0, deviation);
    Matrix out(rows, columns);
    for (double& value : out.values)
        value = static_cast<double>(static_cast<float>(normal(generator)));
    return out;
}

inline std::vector<std::int32_t> random_tokens(std::size_t count, std::int32_t bound, unsigned seed)
{
    std::mt19937 generator(seed);
    std::vector<std::int32_t> out(count);
    for (std::int32_t& token : out)
        token = static_cast<std::int32_t>(generator() % static_cast<unsigned>(bound));
    return out;
}

inline double largest_magnitude(const Matrix& a)
{
    double largest = 0;
    for (const double value : a.values)
        largest = std::max(largest, std::abs(value));
    return largest;
}

/// |actual - expected| <= tolerance(element); NaN fails.
inline void expect_close(const Matrix& actual, const Matrix& expected,
                         const std::function<double(std::size_t)>& tolerance, const std::string& what)
{
    ASSERT_EQ(actual.rows, expected.rows) << what;
    ASSERT_EQ(actual.columns, expected.columns) << what;
    std::size_t bad = 0, worst = 0;
    double worst_ratio = -1;
    for (std::size_t i = 0; i < expected.values.size(); ++i) {
        const double error = std::abs(actual.values[i] - expected.values[i]);
        if (!(error <= tolerance(i)))
            ++bad;
        const double ratio = std::isfinite(error) ? error / tolerance(i) : std::numeric_limits<double>::infinity();
        if (ratio > worst_ratio) {
            worst_ratio = ratio;
            worst = i;
        }
    }
    EXPECT_EQ(bad, 0u) << what << ": " << bad << " of " << expected.values.size()
                       << " elements are off; the worst, row " << worst / static_cast<std::size_t>(expected.columns)
                       << " column " << worst % static_cast<std::size_t>(expected.columns) << ", is "
                       << actual.values[worst] << " instead of " << expected.values[worst] << " (" << worst_ratio
                       << " times the tolerance)";
}

inline void expect_close(const Matrix& actual, const Matrix& expected, double tolerance, const std::string& what)
{
    expect_close(
        actual, expected, [tolerance](std::size_t) { return tolerance; }, what);
}

/// f32 sums of K products, in any order, are off by at most K u sum|a b| (u = 2^-24), in practice by less than about
/// sqrt(K) u; 32 u lies above that for the K of these tests and far below one lost product, which is about 1/K >= 6e-4.
inline constexpr double product_tolerance = 32.0 / (1 << 24);

/// actual = a b (+ added), every element within product_tolerance of the sum of its terms' magnitudes.
inline void expect_product(const Matrix& actual, const Matrix& a, const Matrix& b, const Matrix* added,
                           const std::string& what)
{
    Matrix expected = reference::product(a, b);
    Matrix scale = reference::product(reference::magnitudes(a), reference::magnitudes(b));
    if (added != nullptr) {
        for (std::size_t i = 0; i < expected.values.size(); ++i) {
            expected.values[i] += added->values[i];
            scale.values[i] += std::abs(added->values[i]);
        }
    }
    expect_close(
        actual, expected, [&](std::size_t i) { return product_tolerance * scale.values[i]; }, what);
}

inline Matrix as_row(std::span<const double> values)
{
    Matrix out(1, static_cast<std::int64_t>(values.size()));
    out.values.assign(values.begin(), values.end());
    return out;
}

inline Matrix as_row(std::span<const float> values)
{
    Matrix out(1, static_cast<std::int64_t>(values.size()));
    out.values.assign(values.begin(), values.end());
    return out;
}

/**
 * @brief Every test of the suite runs on each engine.
 *
 * Tensors made here have rows that lie apart by more than their columns when extra_stride > 0; the gaps hold NaN and
 * must still do so after the test: an engine reads and writes inside the matrix only.
 */
class EngineTest : public ::testing::TestWithParam<std::string> {
  protected:
    void SetUp() override
    {
        try {
            engine_ = GetParam() == "aten_parts" ? make_aten_engine_with_parts() : make_engine(options());
        } catch (const Error& error) {
            ASSERT_NE(GetParam(), "aten") << error.what(); // it runs everywhere
            GTEST_SKIP() << error.what(); // xsmm needs a CPU with AVX2 and FMA, aten_cuda a GPU
        }
        ASSERT_EQ(engine_->name(), options().engine);
        if (has_bf16_operands() && engine_->description().find("bf16 products") == std::string::npos)
            GTEST_SKIP() << "this CPU does not multiply bf16: " << engine_->description();
    }

    void TearDown() override
    {
        for (const Strided& s : strided_) {
            const std::vector<float> all = host_floats(s.whole);
            for (std::int64_t row = 0; row < s.whole.rows; ++row)
                for (std::int64_t column = s.columns; column < s.whole.columns; ++column)
                    ASSERT_TRUE(std::isnan(all[static_cast<std::size_t>(row * s.whole.columns + column)]))
                        << "row " << row << " column " << column << " beyond the matrix's " << s.columns
                        << " was written";
        }
    }

    static EngineOptions options()
    {
        if (GetParam() == "aten_cuda") // f32: the tolerances are those of f32
            return {.engine = "aten", .device = Device::cuda, .activation = DType::f32};
        if (has_bf16_operands())
            return {.engine = "xsmm", .products = DType::bf16};
        return {.engine = GetParam() == "aten_parts" ? "aten" : GetParam()};
    }

    static bool has_bf16_operands() { return GetParam() == "xsmm_bf16"; }
    /// What rounding an operand of a product to the engine's operands changes it by, relatively, at most.
    static double operand_error() { return has_bf16_operands() ? 1.0 / 256 : 0; }

    /// Numbers that the engine multiplies as they are: with bf16 operands they are bf16 numbers.
    static Matrix operand(Matrix x)
    {
        for (double& value : x.values)
            if (has_bf16_operands())
                value = static_cast<double>(bf16_to_float(float_to_bf16(static_cast<float>(value))));
        return x;
    }

    /// What rounding the softmax weights can do to attention's output, at most; zeros when they are not rounded.
    static Matrix rounding_of_attention(const Matrix& qkv, const AttentionShape& shape,
                                        std::span<const Segment> segments)
    {
        Matrix result(qkv.rows, shape.heads * shape.head_dim);
        if (has_bf16_operands())
            result = reference::attention_magnitudes(qkv, shape, segments, result).out;
        for (double& value : result.values)
            value *= operand_error();
        return result;
    }

    Engine& engine() { return *engine_; }

    Tensor tensor(const Matrix& values, std::int64_t extra_stride = 0)
    {
        std::vector<float> host(static_cast<std::size_t>(values.rows * (values.columns + extra_stride)),
                                std::numeric_limits<float>::quiet_NaN());
        for (std::int64_t row = 0; row < values.rows; ++row)
            for (std::int64_t column = 0; column < values.columns; ++column)
                host[static_cast<std::size_t>(row * (values.columns + extra_stride) + column)] =
                    static_cast<float>(values(row, column));
        const Tensor whole = engine_->allocate(values.rows, values.columns + extra_stride, DType::f32);
        engine_->copy_from_host(host.data(), whole);
        if (extra_stride > 0)
            strided_.push_back({whole, values.columns});
        return whole.slice_columns(0, values.columns);
    }

    /// An output: filled with NaN, so that an element left out shows.
    Tensor output(std::int64_t rows, std::int64_t columns, std::int64_t extra_stride = 0)
    {
        Matrix nan(rows, columns);
        for (double& value : nan.values)
            value = std::numeric_limits<double>::quiet_NaN();
        return tensor(nan, extra_stride);
    }

    Tensor bf16_tensor(const Matrix& values)
    {
        std::vector<std::uint16_t> host;
        for (const double value : values.values)
            host.push_back(float_to_bf16(static_cast<float>(value)));
        const Tensor out = engine_->allocate(values.rows, values.columns, DType::bf16);
        engine_->copy_from_host(host.data(), out);
        return out;
    }

    PackedWeight packed(const Matrix& w) { return engine_->pack(tensor(w), true, {}, false); }

    std::vector<float> host_floats(const Tensor& x)
    {
        std::vector<float> host(static_cast<std::size_t>(x.rows * x.columns));
        engine_->copy_to_host(x, host.data());
        return host;
    }

    Matrix values(const Tensor& x)
    {
        Matrix out(x.rows, x.columns);
        const std::vector<float> host = host_floats(x);
        out.values.assign(host.begin(), host.end());
        return out;
    }

  private:
    struct Strided {
        Tensor whole;
        std::int64_t columns;
    };
    std::unique_ptr<Engine> engine_;
    std::vector<Strided> strided_;
};

inline std::string engine_name(const ::testing::TestParamInfo<std::string>& info) { return info.param; }

} // namespace selm

#ifdef SELM_ENABLE_CUDA
#define SELM_TEST_ENGINES "aten", "xsmm", "aten_cuda"
#else
#define SELM_TEST_ENGINES "aten", "xsmm"
#endif
/// Suites that bf16 operands take part in besides.
#define SELM_INSTANTIATE_ENGINES_AND_BF16(suite)                                                                       \
    INSTANTIATE_TEST_SUITE_P(Engines, suite, ::testing::Values(SELM_TEST_ENGINES, "xsmm_bf16"), ::selm::engine_name)
/// Suites of attention: also the parts of the aten engine.
#define SELM_INSTANTIATE_ATEN_PARTS(suite)                                                                             \
    INSTANTIATE_TEST_SUITE_P(AtenParts, suite, ::testing::Values("aten_parts"), ::selm::engine_name)
#define SELM_INSTANTIATE_ENGINES(suite)                                                                                \
    INSTANTIATE_TEST_SUITE_P(Engines, suite, ::testing::Values(SELM_TEST_ENGINES), ::selm::engine_name)
