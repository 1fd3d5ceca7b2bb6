#include "selm/kernels/offload.hpp"

#include <algorithm>

#include "device_buffers.hpp"
#include "engine_test_support.hpp"

namespace selm {
namespace {

using test::on_host;
using Floats = std::vector<float>;

Floats random_floats(std::size_t count, unsigned seed, double deviation)
{
    const Matrix m = random_matrix(1, static_cast<std::int64_t>(count), seed, deviation);
    return Floats(m.values.begin(), m.values.end());
}

constexpr std::int64_t chunk = 1000;
constexpr std::size_t sizes[] = {0, 1, 999, 1000, 1001, 2000, 5003};

/// On the CPU, and (label gpu) between a CUDA device and the host.
class Offload : public ::testing::TestWithParam<std::string> {
  protected:
    void SetUp() override
    {
        device_ = GetParam() == "cuda" ? Device::cuda : Device::cpu;
        const std::string problem = device_problem(device_);
        if (!problem.empty())
            GTEST_SKIP() << problem;
    }

    DeviceBuffer on_device(const Floats& values)
    {
        return test::copy_to(device_, values);
    }

    Device device_ = Device::cpu;
};

struct HostState {
    Floats master, exp_avg, exp_avg_sq;
    explicit HostState(Floats initial) : master(std::move(initial)), exp_avg(master.size()), exp_avg_sq(master.size()) {}
    void step(const AdamWOptions& options, std::int64_t begin, std::span<const float> gradient, void* compute, DType dtype)
    {
        const auto at = [&](Floats& x) { return x.data() + begin; };
        adamw_step({}, options, gradient.data(), at(master), at(exp_avg), at(exp_avg_sq), compute, dtype,
                   static_cast<std::int64_t>(gradient.size()));
    }
};

// Two steps in a row, so that buffers are used again; in chunks as in one piece, bit for bit.
TEST_P(Offload, adamw_in_chunks_is_adamw)
{
    OffloadPipeline pipeline(device_, chunk);
    EXPECT_EQ(pipeline.pinned_bytes(), 16u * chunk);
    for (const std::size_t size : sizes) {
        for (const DType dtype : {DType::f32, DType::bf16}) {
            AdamWOptions options;
            options.learning_rate = 1e-3;
            HostState whole(random_floats(size, 1, 0.02)), chunked(whole.master);
            DeviceBuffer compute(device_, size * size_of(dtype));
            std::vector<std::byte> expected(compute.bytes());
            for (options.step_count = 1; options.step_count <= 2; ++options.step_count) {
                const Floats gradient = random_floats(size, static_cast<unsigned>(options.step_count) + 1, 1);
                whole.step(options, 0, gradient, expected.data(), dtype);
                const DeviceBuffer g = on_device(gradient);
                std::vector<std::int64_t> begins;
                pipeline.run(g.as<float>(), compute.data(), dtype, static_cast<std::int64_t>(size), nullptr,
                             [&](std::int64_t begin, std::span<const float> part, std::span<std::byte> out) {
                                 begins.push_back(begin);
                                 ASSERT_EQ(out.size(), part.size() * size_of(dtype));
                                 chunked.step(options, begin, part, out.data(), dtype);
                             });
                EXPECT_EQ(on_host<std::byte>(compute), expected) << size << " elements, step " << options.step_count;
                EXPECT_EQ(chunked.master, whole.master);
                EXPECT_EQ(chunked.exp_avg_sq, whole.exp_avg_sq);
                ASSERT_EQ(begins.size(), (size + chunk - 1) / chunk);
                for (std::size_t i = 0; i < begins.size(); ++i)
                    EXPECT_EQ(begins[i], static_cast<std::int64_t>(i) * chunk);
            }
        }
    }
}

// What is queued before run() on the compute stream is its input, what is queued after it reads its output.
TEST_P(Offload, run_is_ordered_with_the_compute_stream)
{
    constexpr std::int64_t size = 300 * chunk;
    std::vector<std::uint16_t> halves(static_cast<std::size_t>(size));
    for (std::size_t i = 0; i < halves.size(); ++i)
        halves[i] = float_to_bf16(static_cast<float>(i % 200));
    DeviceBuffer from(device_, halves.size() * 2), gradient(device_, halves.size() * 4), weights(device_, halves.size() * 2),
        read(device_, halves.size() * 4);
    from.copy_from_host(halves.data(), from.bytes());
    const ComputeStream stream{.device = device_};
    OffloadPipeline pipeline(device_, chunk);
    convert_bf16_to_f32(stream, from.as<std::uint16_t>(), gradient.as<float>(), size);
    pipeline.run(gradient.as<float>(), weights.data(), DType::bf16, size, nullptr,
                 [](std::int64_t, std::span<const float> part, std::span<std::byte> out) {
                     auto* const to = reinterpret_cast<std::uint16_t*>(out.data());
                     for (std::size_t i = 0; i < part.size(); ++i)
                         to[i] = float_to_bf16(part[i] + 1);
                 });
    convert_bf16_to_f32(stream, weights.as<std::uint16_t>(), read.as<float>(), size);
    const Floats got = on_host<float>(read);
    for (std::size_t i = 0; i < got.size(); ++i)
        ASSERT_EQ(got[i], static_cast<float>(i % 200 + 1)) << i;
}

TEST_P(Offload, a_step_that_throws_leaves_a_usable_pipeline)
{
    OffloadPipeline pipeline(device_, chunk);
    const DeviceBuffer gradient = on_device(Floats(3500, 2.0f));
    DeviceBuffer compute = on_device(Floats(3500, -1.0f));
    const auto doubled = [](std::int64_t, std::span<const float> part, std::span<std::byte> out) {
        for (std::size_t i = 0; i < part.size(); ++i)
            reinterpret_cast<float*>(out.data())[i] = 2 * part[i];
    };
    const auto failing = [&](std::int64_t begin, std::span<const float> part, std::span<std::byte> out) {
        if (begin == 2 * chunk)
            throw data_error("not finite");
        doubled(begin, part, out);
    };
    EXPECT_THROW(pipeline.run(gradient.as<float>(), compute.data(), DType::f32, 3500, nullptr, failing), Error);
    Floats expected(3500, -1.0f);
    std::fill_n(expected.begin(), 2 * chunk, 4.0f);
    EXPECT_EQ(on_host<float>(compute), expected) << "chunks after the failing one must not be touched";
    pipeline.run(gradient.as<float>(), compute.data(), DType::f32, 3500, nullptr, doubled);
    EXPECT_EQ(on_host<float>(compute), Floats(3500, 4.0f));
}

TEST_P(Offload, any_number_of_bytes_goes_up_and_comes_down)
{
    OffloadPipeline pipeline(device_, 16); // pieces of 64 bytes
    for (const std::size_t bytes : {0u, 1u, 63u, 64u, 65u, 128u, 1003u}) {
        std::vector<std::byte> from(bytes), to(bytes);
        for (std::size_t i = 0; i < bytes; ++i)
            from[i] = static_cast<std::byte>(i * 7 + bytes);
        DeviceBuffer device(device_, bytes);
        pipeline.upload(from.data(), device.data(), bytes, nullptr);
        EXPECT_EQ(on_host<std::byte>(device), from) << bytes;
        pipeline.download(device.data(), to.data(), bytes, nullptr);
        EXPECT_EQ(to, from) << bytes;
    }
}

#ifdef SELM_ENABLE_CUDA
INSTANTIATE_TEST_SUITE_P(Devices, Offload, ::testing::Values("cpu", "cuda"), ::selm::engine_name);
#else
INSTANTIATE_TEST_SUITE_P(Devices, Offload, ::testing::Values("cpu"), ::selm::engine_name);
#endif

} // namespace
} // namespace selm
