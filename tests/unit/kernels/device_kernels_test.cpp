#include "selm/kernels/device_kernels.hpp"

#include <bit>
#include <limits>

#include "device_buffers.hpp"
#include "engine_test_support.hpp"

namespace selm {
namespace {

using test::on_host;
using Floats = std::vector<float>;
using Halves = std::vector<std::uint16_t>;

Floats random_floats(std::size_t count, unsigned seed, double deviation)
{
    const Matrix m = random_matrix(1, static_cast<std::int64_t>(count), seed, deviation);
    return Floats(m.values.begin(), m.values.end());
}

std::int64_t count_of(std::size_t size)
{
    return static_cast<std::int64_t>(size);
}

/// Sizes around a vector, a warp, a block of threads, a block of sums; the last is longer than one pass of the largest grid.
constexpr std::size_t sizes[] = {0, 1, 7, 33, 255, 256, 4095, 4096, 4097, 100003, 1200001};

/// The kernels against plain loops, on the CPU and (label gpu) on a CUDA device.
class DeviceKernels : public ::testing::TestWithParam<std::string> {
  protected:
    void SetUp() override
    {
        stream_.device = GetParam() == "cuda" ? Device::cuda : Device::cpu;
        const std::string problem = device_problem(stream_.device);
        if (!problem.empty())
            GTEST_SKIP() << problem;
    }

    template<typename T>
    DeviceBuffer on_device(const std::vector<T>& values)
    {
        return test::copy_to(stream_.device, values);
    }

    double sum(const Floats& values)
    {
        const DeviceBuffer x = on_device(values);
        const auto count = count_of(values.size());
        DeviceBuffer scratch(stream_.device, static_cast<std::size_t>(sum_of_squares_scratch(count)) * sizeof(double));
        DeviceBuffer result(stream_.device, sizeof(double));
        sum_of_squares(stream_, x.as<float>(), count, scratch.as<double>(), result.as<double>());
        return on_host<double>(result).at(0);
    }

    ComputeStream stream_;
};

struct AdamWState {
    DeviceBuffer master, exp_avg, exp_avg_sq, compute;
};

AdamWOptions adamw_options()
{
    AdamWOptions options;
    options.learning_rate = 1e-3;
    options.weight_decay = 0.1;
    options.gradient_scale = 0.5;
    return options;
}

TEST_P(DeviceKernels, adamw_as_defined)
{
    for (const std::size_t size : sizes) {
        const Floats initial = random_floats(size, 1, 0.02);
        for (const DType dtype : {DType::f32, DType::bf16}) {
            AdamWOptions options = adamw_options();
            AdamWState state{on_device(initial), on_device(Floats(size)), on_device(Floats(size)),
                             DeviceBuffer(stream_.device, size * size_of(dtype))};
            std::vector<double> master(initial.begin(), initial.end()), exp_avg(size), exp_avg_sq(size);
            for (options.step_count = 1; options.step_count <= 3; ++options.step_count) {
                const Floats gradient = random_floats(size, static_cast<unsigned>(options.step_count) + 1, 1);
                const DeviceBuffer g = on_device(gradient);
                adamw_step(stream_, options, g.as<float>(), state.master.as<float>(), state.exp_avg.as<float>(),
                           state.exp_avg_sq.as<float>(), state.compute.data(), dtype, count_of(size));
                for (std::size_t i = 0; i < size; ++i)
                    reference::adamw(options, double{gradient[i]}, master[i], exp_avg[i], exp_avg_sq[i]);
            }
            const Floats got = on_host<float>(state.master), got_avg = on_host<float>(state.exp_avg);
            const Floats got_sq = on_host<float>(state.exp_avg_sq);
            for (std::size_t i = 0; i < size; ++i) { // tolerances: optimizer_test.cpp
                ASSERT_NEAR(got[i], master[i], 3e-7 * std::abs(master[i]) + 2e-6 * options.learning_rate) << size << " " << i;
                ASSERT_NEAR(got_avg[i], exp_avg[i], 1e-6) << size << " " << i;
                ASSERT_NEAR(got_sq[i], exp_avg_sq[i], 6e-7 * exp_avg_sq[i]) << size << " " << i;
            }
            if (dtype == DType::f32) {
                EXPECT_EQ(on_host<float>(state.compute), got) << size;
                continue;
            }
            const Halves compute = on_host<std::uint16_t>(state.compute);
            for (std::size_t i = 0; i < size; ++i)
                ASSERT_EQ(compute[i], float_to_bf16(got[i])) << size << " " << i;
        }
    }
}

TEST_P(DeviceKernels, adamw_rounds_f32_compute_weights_when_asked)
{
    AdamWOptions options = adamw_options();
    options.round_bf16 = true;
    const Floats initial = random_floats(5000, 1, 0.02);
    AdamWState state{on_device(initial), on_device(Floats(5000)), on_device(Floats(5000)), on_device(Floats(5000))};
    const DeviceBuffer gradient = on_device(random_floats(5000, 2, 1));
    adamw_step(stream_, options, gradient.as<float>(), state.master.as<float>(), state.exp_avg.as<float>(),
               state.exp_avg_sq.as<float>(), state.compute.data(), DType::f32, 5000);
    const Floats master = on_host<float>(state.master), compute = on_host<float>(state.compute);
    ASSERT_NE(master, initial);
    for (std::size_t i = 0; i < master.size(); ++i)
        ASSERT_EQ(compute[i], bf16_to_float(float_to_bf16(master[i]))) << i;
}

// ZeRO cuts the parameters anywhere: an element's bits do not depend on where it stands.
TEST_P(DeviceKernels, adamw_bits_do_not_depend_on_the_shard)
{
    const AdamWOptions options = adamw_options();
    const Floats initial = random_floats(9001, 1, 0.02), gradient = random_floats(9001, 2, 1);
    const auto stepped = [&](std::size_t begin, std::size_t end) {
        const auto cut = [&](const Floats& x) {
            return Floats(x.begin() + count_of(begin), x.begin() + count_of(end));
        };
        const std::size_t size = end - begin;
        AdamWState state{on_device(cut(initial)), on_device(Floats(size)), on_device(Floats(size)), on_device(Floats(size))};
        const DeviceBuffer g = on_device(cut(gradient));
        adamw_step(stream_, options, g.as<float>(), state.master.as<float>(), state.exp_avg.as<float>(),
                   state.exp_avg_sq.as<float>(), state.compute.data(), DType::f32, count_of(size));
        return on_host<float>(state.master);
    };
    const Floats whole = stepped(0, 9001);
    for (const std::size_t at : {std::size_t{1}, std::size_t{257}, std::size_t{4100}}) {
        Floats parts = stepped(0, at);
        const Floats right = stepped(at, 9001);
        parts.insert(parts.end(), right.begin(), right.end());
        EXPECT_EQ(parts, whole) << "cut at " << at;
    }
}

TEST_P(DeviceKernels, squares_are_summed_in_one_order_everywhere)
{
    for (const std::size_t size : sizes) {
        const Floats x = random_floats(size, 3, 1);
        double expected = 0;
        for (const float value : x)
            expected += double{value} * double{value};
        const double got = sum(x);
        EXPECT_NEAR(got, expected, 1e-11 * expected) << size;
        // bitwise: the norm, and with it the clipped update, must not depend on where it was computed
        EXPECT_EQ(std::bit_cast<std::uint64_t>(got), std::bit_cast<std::uint64_t>(sum_of_squares(x))) << size;
    }
}

TEST_P(DeviceKernels, non_finite_squares_show)
{
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        for (const std::size_t at : {std::size_t{0}, std::size_t{4096}, std::size_t{4999}}) {
            Floats x(5000, 1.0f);
            x[at] = bad;
            EXPECT_FALSE(std::isfinite(sum(x))) << at;
        }
    }
}

TEST_P(DeviceKernels, every_bf16_value_survives_both_conversions)
{
    Halves all(0x10000);
    for (std::size_t i = 0; i < all.size(); ++i)
        all[i] = static_cast<std::uint16_t>(i);
    const DeviceBuffer from = on_device(all);
    DeviceBuffer wide(stream_.device, all.size() * sizeof(float)), back(stream_.device, all.size() * sizeof(std::uint16_t));
    convert_bf16_to_f32(stream_, from.as<std::uint16_t>(), wide.as<float>(), count_of(all.size()));
    convert_f32_to_bf16(stream_, wide.as<float>(), back.as<std::uint16_t>(), count_of(all.size()));
    const Floats values = on_host<float>(wide);
    const Halves again = on_host<std::uint16_t>(back);
    for (std::size_t i = 0; i < all.size(); ++i) {
        ASSERT_EQ(std::bit_cast<std::uint32_t>(values[i]), static_cast<std::uint32_t>(i) << 16);
        if (std::isnan(values[i]))
            ASSERT_TRUE(std::isnan(bf16_to_float(again[i])));
        else
            ASSERT_EQ(again[i], all[i]);
    }
}

TEST_P(DeviceKernels, bf16_rounds_to_nearest_even)
{
    const Floats x{1 + 1.0f / 256, 1 + 3.0f / 256, 1 + 1.0f / 256 + 1e-6f, -1 - 3.0f / 256, 3.4e38f, -0.0f,
                   std::bit_cast<float>(0x7f800001u)};
    const Floats expected{1, 1 + 2.0f / 128, 1 + 1.0f / 128, -1 - 2.0f / 128, std::numeric_limits<float>::infinity(), -0.0f};
    const DeviceBuffer from = on_device(x);
    DeviceBuffer to(stream_.device, x.size() * sizeof(std::uint16_t));
    convert_f32_to_bf16(stream_, from.as<float>(), to.as<std::uint16_t>(), count_of(x.size()));
    const Halves got = on_host<std::uint16_t>(to);
    for (std::size_t i = 0; i < expected.size(); ++i)
        EXPECT_EQ(bf16_to_float(got[i]), expected[i]) << i;
    EXPECT_TRUE(std::signbit(bf16_to_float(got[5])));
    EXPECT_TRUE(std::isnan(bf16_to_float(got[6]))) << "a NaN whose payload is cut off";
}

/// Numbers whose sum depends on its order.
Floats uneven_floats(std::size_t count, unsigned seed)
{
    Floats x = random_floats(count, seed, 1);
    for (std::size_t i = 0; i < count; ++i)
        x[i] *= std::pow(10.0f, static_cast<float>((i * 7 + seed * 5) % 9));
    return x;
}

TEST_P(DeviceKernels, parts_are_summed_in_their_order)
{
    std::size_t order_mattered = 0;
    for (const std::size_t size : sizes) {
        for (const std::size_t parts : {std::size_t{1}, std::size_t{2}, std::size_t{5}}) {
            for (const DType dtype : {DType::f32, DType::bf16}) {
                Floats all;
                Halves all_bf16;
                for (std::size_t part = 0; part < parts; ++part)
                    for (const float value : uneven_floats(size, static_cast<unsigned>(part) + 1)) {
                        all_bf16.push_back(float_to_bf16(value));
                        all.push_back(dtype == DType::bf16 ? bf16_to_float(all_bf16.back()) : value);
                    }
                const DeviceBuffer from = dtype == DType::bf16 ? on_device(all_bf16) : on_device(all);
                DeviceBuffer to(stream_.device, size * sizeof(float));
                ordered_sum(stream_, from.data(), dtype, count_of(parts), count_of(size), to.as<float>());
                const Floats got = on_host<float>(to);
                for (std::size_t i = 0; i < size; ++i) {
                    float forward = all[i], backward = all[(parts - 1) * size + i];
                    for (std::size_t part = 1; part < parts; ++part) {
                        forward += all[part * size + i];
                        backward += all[(parts - 1 - part) * size + i];
                    }
                    ASSERT_EQ(got[i], forward) << size << " elements, " << parts << " parts, element " << i;
                    order_mattered += forward != backward;
                }
            }
        }
    }
    EXPECT_GT(order_mattered, 1000u) << "the numbers must tell one order from another";
}

#ifdef SELM_ENABLE_CUDA
INSTANTIATE_TEST_SUITE_P(Devices, DeviceKernels, ::testing::Values("cpu", "cuda"), ::selm::engine_name);
#else
INSTANTIATE_TEST_SUITE_P(Devices, DeviceKernels, ::testing::Values("cpu"), ::selm::engine_name);

TEST(DeviceKernelsTest, a_build_without_cuda_says_so)
{
    float value = 1;
    std::uint16_t half = 0;
    try {
        convert_f32_to_bf16({.device = Device::cuda}, &value, &half, 1);
        FAIL() << "CUDA work in a build without CUDA";
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::configuration);
        EXPECT_NE(std::string(error.what()).find("no CUDA"), std::string::npos) << error.what();
    }
    EXPECT_NE(device_problem(Device::cuda).find("no CUDA"), std::string::npos);
}
#endif

} // namespace
} // namespace selm
