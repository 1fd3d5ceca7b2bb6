#include "selm/comm/device_communicator.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>

#include <gtest/gtest.h>

#include "device_backend.hpp"
#include "mpi_test.hpp"
#include "selm/base/error.hpp"
#include "selm/base/rng.hpp"

// DeviceCommunicator on a back end of host memory that moves data by MPI, behaves as slowly and fails as told.
namespace selm {
namespace {

using test::own_rank;
using test::rank_count;
using comm::DeviceBackend;
using comm::DevicePlace;
using Floats = std::vector<float>;
using Halves = std::vector<std::uint16_t>;

Communicator& world()
{
    return test::test_world();
}

struct Script {
    int visible_devices = 1;
    std::string bus_of_first_device = cat("bus", world().rank()); ///< device i: this with "+i"
    int polls_in_progress = 2;      ///< after every call that starts something; negative: for ever
    bool stalled = false;           ///< no event is ever done
    std::string error;              ///< state() fails with it
    std::vector<std::string> calls; ///< in order
    int count(const std::string& call) const { return static_cast<int>(std::count(calls.begin(), calls.end(), call)); }
};

class FakeBackend final : public DeviceBackend {
  public:
    explicit FakeBackend(Script& script) : script_(script) {}
    ~FakeBackend() override
    {
        EXPECT_EQ(events_, 0) << "every event must be destroyed";
        EXPECT_TRUE(memory_.empty()) << "all memory must be freed";
    }

    std::string version() const override { return "fake 1.2.3"; }
    int visible_devices() override
    {
        if (script_.visible_devices == 0)
            throw config_error("no device is visible");
        return script_.visible_devices;
    }
    DevicePlace use_device(int index) override
    {
        return {"host", "machine", cat(script_.bus_of_first_device, "+", index), "model"};
    }
    std::vector<std::byte> unique_id() override
    {
        script_.calls.push_back("unique_id");
        return std::vector<std::byte>(17, std::byte{42});
    }
    void start_connect(DevicePurpose purpose, const std::vector<std::byte>& id, int rank, int size) override
    {
        EXPECT_EQ(id, std::vector<std::byte>(17, std::byte{42})) << "the id of rank 0 must reach all ranks";
        EXPECT_EQ(rank, world().rank());
        EXPECT_EQ(size, world().size());
        started("connect", purpose);
    }
    State state(DevicePurpose purpose) override
    {
        if (!script_.error.empty())
            return {Progress::failed, script_.error};
        int& polls = polls_left_[index(purpose)];
        if (polls == 0)
            return {Progress::ready, {}};
        polls -= polls > 0;
        return {Progress::in_progress, {}};
    }
    void start_close(DevicePurpose purpose) override { started("close", purpose); }
    void finish_close(DevicePurpose purpose) override
    {
        EXPECT_EQ(polls_left_[index(purpose)], 0) << "destroyed before it was finalised";
        script_.calls.push_back("finish_close");
    }
    void abort(DevicePurpose) noexcept override { script_.calls.push_back("abort"); }

    void* stream(DevicePurpose purpose) override { return &streams_[index(purpose)]; }
    void* create_event() override
    {
        ++events_;
        return new int(0);
    }
    void destroy_event(void* event) noexcept override
    {
        --events_;
        delete static_cast<int*>(event);
    }
    void record(void*, void* stream) override
    {
        for (const DevicePurpose purpose : {DevicePurpose::gradients, DevicePurpose::parameters})
            if (stream == this->stream(purpose)) {
                EXPECT_EQ(polls_left_[index(purpose)], 0) << "recorded before the operation was on the stream";
            }
    }
    bool is_done(void*) override { return !script_.stalled; }
    void stream_waits(void* stream, void*) override
    {
        script_.calls.push_back(stream == &streams_[0] ? "gradients wait" : stream == &streams_[1] ? "parameters wait" : "wait");
    }
    void* allocate(std::size_t bytes) override
    {
        void* const memory = std::malloc(bytes);
        memory_[memory] = bytes;
        return memory;
    }
    void free(void* memory) noexcept override
    {
        memory_.erase(memory);
        std::free(memory);
    }
    void copy(DevicePurpose purpose, void* to, const void* from, std::size_t bytes) override
    {
        EXPECT_EQ(polls_left_[index(purpose)], 0) << "copied before the operation was on the stream";
        std::memmove(to, from, bytes);
    }

    void all_reduce(DevicePurpose purpose, void* data, std::size_t count, DeviceElement element) override
    {
        started("all_reduce", purpose);
        ASSERT_EQ(element, DeviceElement::f32);
        float* const values = static_cast<float*>(data);
        std::vector<double> sums(values, values + count);
        world().all_reduce(std::span<double>(sums), ReduceOp::sum, "fake");
        std::copy(sums.begin(), sums.end(), values);
    }
    void broadcast(DevicePurpose purpose, void* data, std::size_t count, DeviceElement element, int root) override
    {
        if (!in_group_)
            started("broadcast", purpose);
        world().broadcast({static_cast<std::byte*>(data), count * size(element)}, root, "fake");
    }
    void all_gather(DevicePurpose purpose, const void* shard, void* full, std::size_t count, DeviceElement element) override
    {
        started("all_gather", purpose);
        const auto* const from = static_cast<const std::byte*>(shard);
        const std::vector<std::byte> own(from, from + count * size(element));
        world().all_gather(own, {static_cast<std::byte*>(full), own.size() * rank_count()}, "fake");
    }
    void reduce_scatter(DevicePurpose purpose, const void* full, void* shard, std::size_t count, DeviceElement element) override
    {
        started("reduce_scatter", purpose);
        ASSERT_EQ(element, DeviceElement::f32);
        std::vector<std::size_t> offsets;
        for (std::size_t r = 0; r <= rank_count(); ++r)
            offsets.push_back(r * count);
        world().reduce_scatter_sum({static_cast<const float*>(full), count * rank_count()}, offsets,
                                   {static_cast<float*>(shard), count}, "fake");
    }
    void group(DevicePurpose purpose, const std::function<void()>& body) override
    {
        in_group_ = true;
        body();
        in_group_ = false;
        const auto exchange = world().start_exchange(outgoing_, incoming_, "fake");
        exchange->wait();
        outgoing_.clear();
        incoming_.clear();
        started("group", purpose);
    }
    void send(DevicePurpose, const void* data, std::size_t bytes, int destination) override
    {
        ASSERT_TRUE(in_group_);
        ASSERT_NE(destination, world().rank());
        outgoing_.push_back({destination, {static_cast<const std::byte*>(data), bytes}});
    }
    void receive(DevicePurpose, void* data, std::size_t bytes, int source) override
    {
        ASSERT_TRUE(in_group_);
        for (const auto& [memory, length] : memory_) { // scratch memory must not be overrun
            const auto* const begin = static_cast<const std::byte*>(memory);
            if (data >= begin && data < begin + length) {
                ASSERT_LE(static_cast<std::byte*>(data) + bytes, begin + length);
            }
        }
        incoming_.push_back({source, {static_cast<std::byte*>(data), bytes}});
    }

  private:
    static std::size_t index(DevicePurpose purpose) { return static_cast<std::size_t>(purpose); }
    static std::size_t size(DeviceElement element) { return element == DeviceElement::f32 ? 4 : 2; }
    void started(const std::string& call, DevicePurpose purpose)
    {
        EXPECT_EQ(polls_left_[index(purpose)], 0) << call << " while the call before is in progress";
        polls_left_[index(purpose)] = script_.polls_in_progress;
        script_.calls.push_back(call);
    }

    Script& script_;
    std::array<int, 2> polls_left_{};
    std::array<int, 2> streams_{};
    int events_ = 0;
    std::map<void*, std::size_t> memory_;
    bool in_group_ = false;
    std::vector<Communicator::Outgoing> outgoing_;
    std::vector<Communicator::Incoming> incoming_;
};

DeviceCommunicator::Options options(std::size_t scratch_bytes = 1 << 16, double timeout_s = 60)
{
    return {.timeout_s = timeout_s, .scratch_bytes = scratch_bytes};
}

std::unique_ptr<DeviceCommunicator> make(Script& script, const DeviceCommunicator::Options& chosen = options())
{
    return std::make_unique<DeviceCommunicator>(world(), chosen, std::make_unique<FakeBackend>(script));
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

bool says(const Error& error, const std::string& text)
{
    return std::string(error.what()).find(text) != std::string::npos;
}

/// Numbers whose sum depends on its order.
float contribution(std::size_t rank, std::size_t i)
{
    RandomStream stream(9, 1, rank, i);
    return static_cast<float>(stream.next_normal() * std::pow(10.0, static_cast<double>(stream.next_below(9))));
}

std::uint16_t upper_half(float value)
{
    return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
}

float from_upper_half(std::uint16_t value)
{
    return std::bit_cast<float>(static_cast<std::uint32_t>(value) << 16);
}

void plain_sum(const void* parts, DeviceElement element, std::int64_t number_of_parts, std::int64_t count, float* sum, void*)
{
    const auto value = [&](std::int64_t i) {
        return element == DeviceElement::f32 ? static_cast<const float*>(parts)[i]
                                             : from_upper_half(static_cast<const std::uint16_t*>(parts)[i]);
    };
    for (std::int64_t i = 0; i < count; ++i) {
        sum[i] = value(i);
        for (std::int64_t part = 1; part < number_of_parts; ++part)
            sum[i] += value(part * count + i);
    }
}

/// Shards of unequal lengths, some of them empty: rank r has (r * 3 + shift) % 4 * unit elements, after `first` others.
std::vector<std::size_t> uneven_offsets(std::size_t unit, std::size_t shift, std::size_t first)
{
    std::vector<std::size_t> offsets{first};
    for (std::size_t r = 0; r < rank_count(); ++r)
        offsets.push_back(offsets.back() + (r * 3 + shift) % 4 * unit);
    return offsets;
}

TEST(DeviceCommunicatorTest, SumsInRankOrderAsTheHostDoes)
{
    // The smallest scratch memory holds one element of each rank: many rounds.
    for (const std::size_t scratch : {4 * rank_count(), std::size_t{1200} * 4, std::size_t{1} << 16}) {
        Script script;
        const auto device = make(script, options(scratch));
        for (const std::size_t shift : {std::size_t{0}, std::size_t{1}, std::size_t{2}}) {
            const auto offsets = uneven_offsets(41, shift, 3);
            Floats full(offsets.back() + 2);
            Halves halves(full.size());
            for (std::size_t i = 0; i < full.size(); ++i) {
                full[i] = contribution(own_rank(), i);
                halves[i] = upper_half(full[i]);
            }
            const std::size_t length = offsets[own_rank() + 1] - offsets[own_rank()];
            Floats expected(length), got(length, -1), expected_bf16(length), got_bf16(length, -1);
            world().reduce_scatter_sum(full, offsets, expected, "host");
            world().start_reduce_scatter_sum_bf16(halves, offsets, expected_bf16, "host")->wait();
            device->reduce_scatter_sum(DevicePurpose::gradients, full.data(), DeviceElement::f32, offsets, got.data(), plain_sum,
                                       "layer 3");
            device->reduce_scatter_sum(DevicePurpose::gradients, halves.data(), DeviceElement::bf16, offsets, got_bf16.data(),
                                       plain_sum, "layer 3");
            device->wait(DevicePurpose::gradients);
            EXPECT_EQ(got, expected) << "scratch " << scratch << " shift " << shift;
            EXPECT_EQ(got_bf16, expected_bf16) << "scratch " << scratch << " shift " << shift;
        }
    }
}

TEST(DeviceCommunicatorTest, SumsLeftToTheLibrary)
{
    Script script;
    const auto device = make(script);
    Floats full(6 * rank_count());
    for (std::size_t i = 0; i < full.size(); ++i)
        full[i] = static_cast<float>(i + own_rank());
    const float ranks_sum = static_cast<float>(rank_count() * (rank_count() - 1) / 2);
    Floats shard(6);
    device->reduce_scatter_sum_unordered(DevicePurpose::gradients, full.data(), shard.data(), 6, DeviceElement::f32, "sum");
    device->all_reduce_sum_unordered(DevicePurpose::gradients, full.data(), full.size(), DeviceElement::f32, "sum");
    device->wait(DevicePurpose::gradients);
    for (std::size_t i = 0; i < full.size(); ++i)
        EXPECT_EQ(full[i], static_cast<float>(i * rank_count()) + ranks_sum) << i;
    EXPECT_EQ(shard, Floats(full.begin() + static_cast<std::ptrdiff_t>(6 * own_rank()),
                            full.begin() + static_cast<std::ptrdiff_t>(6 * own_rank() + 6)));
}

TEST(DeviceCommunicatorTest, GathersShardsOfAnyLength)
{
    Script script;
    const auto device = make(script);
    std::vector<std::size_t> equal{2};
    for (std::size_t r = 0; r < rank_count(); ++r)
        equal.push_back(equal.back() + 5);
    for (const auto& offsets : {equal, uneven_offsets(7, 0, 2), uneven_offsets(7, 1, 2)}) {
        for (const bool in_place : {false, true}) {
            Floats full(offsets.back() + 1, -1), expected = full;
            for (std::size_t i = offsets.front(); i < offsets.back(); ++i)
                expected[i] = static_cast<float>(i);
            const auto begin = static_cast<std::ptrdiff_t>(offsets[own_rank()]), end = static_cast<std::ptrdiff_t>(offsets[own_rank() + 1]);
            const Floats shard(expected.begin() + begin, expected.begin() + end);
            if (in_place)
                std::copy(shard.begin(), shard.end(), full.begin() + begin);
            device->all_gather_shards(DevicePurpose::parameters, in_place ? full.data() + begin : shard.data(), offsets,
                                      full.data(), DeviceElement::f32, "layer 1");
            device->wait(DevicePurpose::parameters);
            EXPECT_EQ(full, expected) << "in place " << in_place;
        }
    }
}

TEST(DeviceCommunicatorTest, BroadcastsExchangesAndBarriers)
{
    Script script;
    const auto device = make(script);
    for (int root = 0; root < world().size(); ++root) {
        Halves data(9, static_cast<std::uint16_t>(world().rank()));
        device->broadcast(DevicePurpose::parameters, data.data(), data.size(), DeviceElement::bf16, root, "weights");
        device->wait(DevicePurpose::parameters);
        EXPECT_EQ(data, Halves(9, static_cast<std::uint16_t>(root)));
    }
    std::vector<DeviceCommunicator::Outgoing> outgoing;
    std::vector<DeviceCommunicator::Incoming> incoming;
    const int next = (world().rank() + 1) % world().size(), before = (world().rank() + world().size() - 1) % world().size();
    const std::string message = cat("from ", world().rank()), expected = cat("from ", before);
    std::string received(expected.size(), '?');
    if (world().size() > 1) {
        outgoing.push_back({next, message.data(), message.size()});
        incoming.push_back({before, received.data(), received.size()});
    }
    device->exchange(DevicePurpose::gradients, outgoing, incoming, "ring");
    device->barrier(DevicePurpose::gradients, "end of step");
    if (world().size() > 1) {
        EXPECT_EQ(received, expected);
    }
}

TEST(DeviceCommunicatorTest, PurposesWaitForEachOtherUnlessConcurrent)
{
    for (const bool concurrent : {false, true}) {
        Script script;
        auto chosen = options();
        chosen.concurrent = concurrent;
        const auto device = make(script, chosen);
        Floats data(4);
        int compute_stream = 0;
        device->wait_for_compute(DevicePurpose::gradients, &compute_stream);
        device->broadcast(DevicePurpose::gradients, data.data(), 4, DeviceElement::f32, 0, "a");
        device->broadcast(DevicePurpose::parameters, data.data(), 4, DeviceElement::f32, 0, "b");
        device->broadcast(DevicePurpose::gradients, data.data(), 4, DeviceElement::f32, 0, "c");
        device->compute_waits_for(&compute_stream, DevicePurpose::parameters);
        EXPECT_EQ(script.count("gradients wait"), concurrent ? 1 : 2);
        EXPECT_EQ(script.count("parameters wait"), concurrent ? 0 : 1);
        EXPECT_EQ(script.count("wait"), 1);
        EXPECT_NE(device->stream(DevicePurpose::gradients), device->stream(DevicePurpose::parameters));
    }
}

TEST(DeviceCommunicatorTest, ClosesInOrderWhereAllIsWell)
{
    Script script;
    {
        const auto device = make(script);
        EXPECT_TRUE(device->description().find("fake 1.2.3") != std::string::npos) << device->description();
    }
    EXPECT_EQ(script.count("connect"), 2);
    EXPECT_EQ(script.count("unique_id"), world().is_root() ? 2 : 0) << "a communicator of its own for each purpose";
    EXPECT_EQ(script.count("finish_close"), 2);
    EXPECT_EQ(script.count("abort"), 0);
}

TEST(DeviceCommunicatorTest, AbortsWhileAnExceptionUnwinds)
{
    Script script;
    try {
        const auto device = make(script);
        throw data_error("elsewhere");
    } catch (const Error&) {
    }
    EXPECT_EQ(script.count("abort"), 2);
    EXPECT_EQ(script.count("close"), 0);
}

TEST(DeviceCommunicatorTest, AStalledOperationEndsInATimeOutThatNamesIt)
{
    Script script;
    const auto device = make(script, options(1 << 16, 0.05));
    Floats data(4);
    device->broadcast(DevicePurpose::gradients, data.data(), 4, DeviceElement::f32, 0, "done before");
    device->wait(DevicePurpose::gradients);
    script.stalled = true;
    device->broadcast(DevicePurpose::gradients, data.data(), 4, DeviceElement::f32, 0, "gradients of layer 7");
    device->broadcast(DevicePurpose::gradients, data.data(), 4, DeviceElement::f32, 0, "gradients of layer 6");
    const Error error = error_of([&] { device->wait(DevicePurpose::gradients); });
    EXPECT_EQ(error.code(), ExitCode::internal);
    EXPECT_TRUE(says(error, "gradients of layer 7: not done after 0.05 s")) << error.what();
    EXPECT_TRUE(says(error, cat("rank ", world().rank(), " of ", world().size()))) << error.what();
    EXPECT_GE(script.count("abort"), 2) << "both communicators";
    const Error later = error_of([&] { device->barrier(DevicePurpose::parameters, "next step"); });
    EXPECT_TRUE(says(later, "gradients of layer 7")) << "the first failure is the one to report: " << later.what();
    EXPECT_TRUE(says(error_of([&] { device->wait(DevicePurpose::parameters); }), "gradients of layer 7"));
}

TEST(DeviceCommunicatorTest, ErrorsOfTheLibraryNameTheOperation)
{
    for (const bool while_queued : {true, false}) {
        Script script;
        const auto device = make(script);
        Floats data(4);
        const auto queue = [&] {
            device->all_reduce_sum_unordered(DevicePurpose::gradients, data.data(), 4, DeviceElement::f32, "norm");
        };
        Error error{ExitCode::done, ""};
        if (while_queued) {
            script.error = "remote process exited";
            error = error_of(queue);
        } else {
            queue();
            script.stalled = true;
            script.error = "remote process exited";
            error = error_of([&] { device->wait(DevicePurpose::gradients); });
        }
        EXPECT_EQ(error.code(), ExitCode::internal);
        EXPECT_TRUE(says(error, "norm: ") && says(error, "remote process exited")) << error.what();
        EXPECT_GE(script.count("abort"), 2);
    }
}

TEST(DeviceCommunicatorTest, AMissingRankEndsInATimeOutWhileConnecting)
{
    Script script;
    script.polls_in_progress = -1;
    const Error error = error_of([&] { make(script, options(1 << 16, 0.05)); });
    EXPECT_EQ(error.code(), ExitCode::internal);
    EXPECT_TRUE(says(error, "connecting GPUs for gradients") && says(error, "waited 0.05 s")) << error.what();
    EXPECT_GE(script.count("abort"), 2);
}

TEST(DeviceCommunicatorTest, ATimeOutOfZeroIsNone)
{
    Script script;
    script.polls_in_progress = 10;
    const auto device = make(script, options(1 << 16, 0));
    EXPECT_NO_THROW(device->barrier(DevicePurpose::gradients, "slow"));
    EXPECT_EQ(error_of([&] { make(script, options(1 << 16, -1)); }).code(), ExitCode::usage);
}

TEST(DeviceCommunicatorTest, LocalRanksTakeDevicesInTurn)
{
    Script script;
    script.visible_devices = 4; // each rank sees all four of the node
    script.bus_of_first_device = "bus";
    const auto device = make(script);
    EXPECT_EQ(device->device(), world().rank());
}

TEST(DeviceCommunicatorTest, TwoRanksOnOneGpuAreRefusedOnAllRanks)
{
    if (world().size() == 1)
        GTEST_SKIP() << "needs two ranks";
    Script script;
    script.bus_of_first_device = cat("bus", std::min(world().rank(), world().size() - 2)); // the last two ranks share
    const Error error = error_of([&] { make(script); });
    EXPECT_EQ(error.code(), ExitCode::configuration);
    EXPECT_TRUE(says(error, cat("ranks ", world().size() - 2, " and ", world().size() - 1, " would share the GPU bus",
                                world().size() - 2, "+0 (model) of host")))
        << error.what();
    EXPECT_TRUE(script.calls.empty() || script.count("connect") == 0) << "refused before anything is connected";
}

TEST(DeviceCommunicatorTest, SharedGpusAreFoundByMachineAndBus)
{
    const DevicePlace first{"a", "machine 1", "0000:1b:00.0", "model"};
    DevicePlace second{"container on a", "machine 1", "0000:1b:00.0", "model"};
    EXPECT_EQ(error_of([&] { comm::check_one_rank_per_device({first, second}); }).code(), ExitCode::configuration);
    second.bus = "0000:1c:00.0";
    EXPECT_NO_THROW(comm::check_one_rank_per_device({first, second}));
    second = {"b", "machine 2", "0000:1b:00.0", "model"};
    EXPECT_NO_THROW(comm::check_one_rank_per_device({first, second}));
}

TEST(DeviceCommunicatorTest, ARankWithoutADeviceIsNamedOnAllRanks)
{
    Script script;
    const int last = world().size() - 1;
    script.visible_devices = world().rank() == last ? 0 : 1;
    const Error error = error_of([&] { make(script); });
    EXPECT_EQ(error.code(), ExitCode::configuration);
    EXPECT_TRUE(says(error, cat("rank ", last, " on ")) && says(error, "no device is visible")) << error.what();
}

#ifndef SELM_ENABLE_CUDA
TEST(DeviceCommunicatorTest, ABuildWithoutNcclSaysSo)
{
    const Error error = error_of([] { make_device_communicator(world(), {}); });
    EXPECT_EQ(error.code(), ExitCode::configuration);
    EXPECT_TRUE(says(error, "this build has no NCCL")) << error.what();
}
#endif

} // namespace
} // namespace selm
