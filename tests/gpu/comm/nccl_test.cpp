#include <bit>
#include <cmath>

#include <gtest/gtest.h>

#include "device_backend.hpp"
#include "device_buffers.hpp"
#include "mpi_test.hpp"
#include "selm/base/error.hpp"
#include "selm/base/rng.hpp"
#include "selm/comm/device_communicator.hpp"
#include "selm/kernels/device_kernels.hpp"

// DeviceCommunicator over NCCL on real GPUs, one per rank: 1 rank on one GPU; more where there are more.
namespace selm {
namespace {

using test::on_host;
using test::own_rank;
using test::rank_count;
using Floats = std::vector<float>;
using Halves = std::vector<std::uint16_t>;

Communicator& world()
{
    return test::test_world();
}

Error error_of(const std::function<void()>& body)
{
    try {
        body();
    } catch (const Error& error) {
        return error;
    }
    return {ExitCode::done, "no error"};
}

void sum_on_device(const void* parts, DeviceElement element, std::int64_t number_of_parts, std::int64_t count, float* sum,
                   void* stream)
{
    ordered_sum({.device = Device::cuda, .handle = stream}, parts, element == DeviceElement::bf16 ? DType::bf16 : DType::f32,
                number_of_parts, count, sum);
}

template<typename T>
DeviceBuffer on_device(const std::vector<T>& values)
{
    return test::copy_to(Device::cuda, values);
}

/// Skips on all ranks unless each has a GPU of its own.
class Nccl : public ::testing::Test {
  protected:
    void SetUp() override
    {
        const bool usable = device_problem(Device::cuda).empty();
        if (all_reduce_value(world(), std::int64_t{usable}, ReduceOp::min, "usable devices") == 0) {
            GTEST_SKIP() << (usable ? "another rank: no CUDA device is visible" : device_problem(Device::cuda));
        }
        const auto node = world().split_node("test");
        devices_ = comm::make_nccl_backend()->visible_devices();
        const bool enough = devices_ >= node->size();
        enough_devices_ = all_reduce_value(world(), std::int64_t{enough}, ReduceOp::min, "enough devices") == 1;
    }

    std::unique_ptr<DeviceCommunicator> make(std::size_t scratch_bytes = 1 << 20, double timeout_s = 60)
    {
        return make_device_communicator(world(), {.timeout_s = timeout_s, .scratch_bytes = scratch_bytes});
    }

    int devices_ = 0;
    bool enough_devices_ = false;
};

#define NEEDS_A_GPU_PER_RANK                                                                                           \
    if (!enough_devices_)                                                                                              \
    GTEST_SKIP() << world().size() << " ranks need as many GPUs, there are " << devices_

float contribution(std::size_t rank, std::size_t i)
{
    RandomStream stream(9, 1, rank, i);
    return static_cast<float>(stream.next_normal() * std::pow(10.0, static_cast<double>(stream.next_below(9))));
}

std::vector<std::size_t> offsets_of(std::size_t unit, bool equal)
{
    std::vector<std::size_t> offsets{5};
    for (std::size_t r = 0; r < rank_count(); ++r)
        offsets.push_back(offsets.back() + (equal ? unit : (r * 3 + 1) % 4 * unit));
    return offsets;
}

TEST_F(Nccl, sums_in_rank_order_as_the_host_does)
{
    NEEDS_A_GPU_PER_RANK;
    for (const std::size_t scratch : {std::size_t{4096}, std::size_t{1} << 24}) {
        const auto device = make(scratch);
        for (const bool equal : {true, false}) {
            const auto offsets = offsets_of(10007, equal);
            Floats full(offsets.back());
            Halves halves(full.size());
            for (std::size_t i = 0; i < full.size(); ++i) {
                full[i] = contribution(own_rank(), i);
                halves[i] = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(full[i]) >> 16);
            }
            const std::size_t length = offsets[own_rank() + 1] - offsets[own_rank()];
            Floats expected(length), expected_bf16(length);
            world().reduce_scatter_sum(full, offsets, expected, "host");
            world().start_reduce_scatter_sum_bf16(halves, offsets, expected_bf16, "host")->wait();
            const DeviceBuffer f32 = on_device(full), bf16 = on_device(halves);
            DeviceBuffer shard = on_device(Floats(length)), shard_bf16 = on_device(Floats(length));
            device->reduce_scatter_sum(DevicePurpose::gradients, f32.data(), DeviceElement::f32, offsets, shard.as<float>(),
                                       sum_on_device, "f32");
            device->reduce_scatter_sum(DevicePurpose::gradients, bf16.data(), DeviceElement::bf16, offsets,
                                       shard_bf16.as<float>(), sum_on_device, "bf16");
            device->wait(DevicePurpose::gradients);
            EXPECT_EQ(on_host<float>(shard), expected);
            EXPECT_EQ(on_host<float>(shard_bf16), expected_bf16);
        }
    }
}

TEST_F(Nccl, library_sums)
{
    NEEDS_A_GPU_PER_RANK;
    const auto device = make();
    Floats full(1000 * rank_count());
    for (std::size_t i = 0; i < full.size(); ++i)
        full[i] = static_cast<float>(i % 100 + own_rank()); // sums of small whole numbers are exact in any order
    const DeviceBuffer data = on_device(full);
    DeviceBuffer shard(Device::cuda, 4000);
    device->reduce_scatter_sum_unordered(DevicePurpose::gradients, data.data(), shard.data(), 1000, DeviceElement::f32, "sum");
    device->all_reduce_sum_unordered(DevicePurpose::gradients, data.data(), full.size(), DeviceElement::f32, "sum");
    device->wait(DevicePurpose::gradients);
    const Floats got = on_host<float>(data), own = on_host<float>(shard);
    for (std::size_t i = 0; i < got.size(); ++i)
        ASSERT_EQ(got[i], static_cast<float>(i % 100 * rank_count() + rank_count() * (rank_count() - 1) / 2)) << i;
    for (std::size_t i = 0; i < own.size(); ++i)
        ASSERT_EQ(own[i], got[own_rank() * 1000 + i]) << i;
}

TEST_F(Nccl, gathers_shards)
{
    NEEDS_A_GPU_PER_RANK;
    const auto device = make();
    for (const bool equal : {true, false}) {
        const auto offsets = offsets_of(1001, equal);
        Halves expected(offsets.back());
        for (std::size_t i = 0; i < expected.size(); ++i)
            expected[i] = static_cast<std::uint16_t>(i < offsets[0] ? 7 : i);
        const auto begin = static_cast<std::ptrdiff_t>(offsets[own_rank()]), end = static_cast<std::ptrdiff_t>(offsets[own_rank() + 1]);
        const DeviceBuffer shard = on_device(Halves(expected.begin() + begin, expected.begin() + end));
        DeviceBuffer full = on_device(Halves(expected.size(), 7));
        device->all_gather_shards(DevicePurpose::parameters, shard.data(), offsets, full.data(), DeviceElement::bf16, "weights");
        device->wait(DevicePurpose::parameters);
        EXPECT_EQ(on_host<std::uint16_t>(full), expected) << "equal " << equal;
    }
}

// Computation before and after on the default stream, through events alone.
TEST_F(Nccl, orders_with_computation)
{
    NEEDS_A_GPU_PER_RANK;
    const auto device = make();
    constexpr std::int64_t count = 10'000'000;
    const DeviceBuffer halves = on_device(Halves(count, 0x3f80)); // 1.0
    DeviceBuffer wide(Device::cuda, count * 4), back(Device::cuda, count * 2);
    const ComputeStream compute{.device = Device::cuda};
    convert_bf16_to_f32(compute, halves.as<std::uint16_t>(), wide.as<float>(), count);
    device->wait_for_compute(DevicePurpose::gradients, nullptr);
    device->all_reduce_sum_unordered(DevicePurpose::gradients, wide.data(), count, DeviceElement::f32, "sum");
    device->compute_waits_for(nullptr, DevicePurpose::gradients);
    convert_f32_to_bf16(compute, wide.as<float>(), back.as<std::uint16_t>(), count);
    const Halves got = on_host<std::uint16_t>(back);
    const auto expected = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(static_cast<float>(rank_count())) >> 16);
    EXPECT_EQ(got, Halves(count, expected));
}

TEST_F(Nccl, exchanges_and_barriers)
{
    NEEDS_A_GPU_PER_RANK;
    const auto device = make();
    const int next = (world().rank() + 1) % world().size(), before = (world().rank() + world().size() - 1) % world().size();
    const DeviceBuffer sent = on_device(Floats(1000, static_cast<float>(world().rank())));
    DeviceBuffer received = on_device(Floats(1000, static_cast<float>(before)));
    std::vector<DeviceCommunicator::Outgoing> outgoing;
    std::vector<DeviceCommunicator::Incoming> incoming;
    if (world().size() > 1) {
        received = on_device(Floats(1000, -1));
        outgoing.push_back({next, sent.data(), 4000});
        incoming.push_back({before, received.data(), 4000});
    }
    device->exchange(DevicePurpose::gradients, outgoing, incoming, "ring");
    device->barrier(DevicePurpose::gradients, "end");
    EXPECT_EQ(on_host<float>(received), Floats(1000, static_cast<float>(before)));
}

// bf16, 4.3 GB: the last elements lie beyond 2^31.
TEST_F(Nccl, counts_beyond_2_31)
{
    NEEDS_A_GPU_PER_RANK;
    const std::size_t count = (std::size_t{1} << 31) + 8;
    const auto device = make();
    DeviceBuffer data;
    const bool room = error_of([&] { data = DeviceBuffer(Device::cuda, count * 2); }).code() == ExitCode::done;
    if (all_reduce_value(world(), std::int64_t{room}, ReduceOp::min, "room") == 0)
        GTEST_SKIP() << "needs 4.3 GB of GPU memory";
    std::vector<std::uint16_t> host(count, static_cast<std::uint16_t>(world().rank() + 1));
    data.copy_from_host(host.data(), count * 2);
    device->broadcast(DevicePurpose::parameters, data.data(), count, DeviceElement::bf16, world().size() - 1, "weights");
    device->wait(DevicePurpose::parameters);
    data.copy_to_host(host.data(), count * 2);
    for (const std::size_t i : {std::size_t{0}, count / 2, count - 1})
        EXPECT_EQ(host[i], static_cast<std::uint16_t>(world().size())) << i;
}

TEST_F(Nccl, a_rank_that_does_not_come_ends_in_a_time_out)
{
    NEEDS_A_GPU_PER_RANK;
    if (world().size() == 1)
        GTEST_SKIP() << "needs two ranks";
    const DeviceBuffer data = on_device(Floats(100, 1));
    {
        const auto device = make(1 << 20, 3);
        device->barrier(DevicePurpose::gradients, "all here");
        const Error error = error_of([&] {
            if (world().is_root())
                throw internal_error("rank 0 does something else");
            device->all_reduce_sum_unordered(DevicePurpose::gradients, data.data(), 100, DeviceElement::f32, "gradient norm");
            device->wait(DevicePurpose::gradients);
        });
        if (!world().is_root()) {
            EXPECT_NE(std::string(error.what()).find("gradient norm: not done after 3 s"), std::string::npos) << error.what();
        }
        world().barrier("all have given up");
    } // rank 0 closes, which nobody answers: it warns after 3 s
    const auto again = make();
    EXPECT_NO_THROW(again->barrier(DevicePurpose::gradients, "a fresh communicator works"));
}

TEST_F(Nccl, two_ranks_on_one_gpu_are_refused)
{
    if (enough_devices_)
        GTEST_SKIP() << "there is a GPU for every rank";
    const Error error = error_of([&] { make(); });
    EXPECT_EQ(error.code(), ExitCode::configuration);
    EXPECT_NE(std::string(error.what()).find("would share the GPU"), std::string::npos) << error.what();
}

} // namespace
} // namespace selm
