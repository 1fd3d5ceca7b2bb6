#include "selm/comm/communicator.hpp"

#include <algorithm>
#include <cmath>
#include <chrono>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "message_limit_test.hpp"
#include "mpi_test.hpp"
#include "selm/base/rng.hpp"

namespace selm {
namespace {

using test::rank_count;

Communicator& world()
{
    return test::test_world();
}

/// Byte i of what rank `from` sends to rank `to`.
std::byte pattern(int from, int to, std::size_t i)
{
    return static_cast<std::byte>((static_cast<std::size_t>(from) * 37 + static_cast<std::size_t>(to) * 11 + i * 7) & 0xff);
}

std::vector<std::byte> message(int from, int to, std::size_t bytes)
{
    std::vector<std::byte> data(bytes);
    for (std::size_t i = 0; i < bytes; ++i)
        data[i] = pattern(from, to, i);
    return data;
}

/// Every test runs with the normal limit (one MPI call) and with one so small that each transfer is cut into pieces:
/// the same code path as transfers above 2^31 bytes.
class Transfer : public test::WithMessageLimit {};

TEST_P(Transfer, BroadcastFromEveryRoot)
{
    for (int root = 0; root < world().size(); ++root) {
        for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, std::size_t{64}, std::size_t{1001}}) {
            std::vector<std::byte> data = message(world().rank(), root, bytes);
            world().broadcast(data, root, "broadcast");
            EXPECT_EQ(data, message(root, root, bytes));
        }
    }
}

TEST_P(Transfer, AllGatherHasBlocksInRankOrder)
{
    for (const std::size_t bytes : {std::size_t{0}, std::size_t{3}, std::size_t{333}}) {
        std::vector<std::byte> all(bytes * rank_count());
        world().all_gather(message(world().rank(), 0, bytes), all, "gather");
        for (int r = 0; r < world().size(); ++r) {
            const auto begin = all.begin() + static_cast<std::ptrdiff_t>(bytes) * r;
            EXPECT_EQ(std::vector<std::byte>(begin, begin + static_cast<std::ptrdiff_t>(bytes)), message(r, 0, bytes));
        }
    }
}

TEST_P(Transfer, RaggedGatherWithEmptyContributions)
{
    // Rank r sends 150 r bytes: rank 0 nothing.
    const auto bytes_of = [](int r) { return static_cast<std::size_t>(r) * 150; };
    const auto all = world().all_gather_ragged(message(world().rank(), 1, bytes_of(world().rank())), "ragged");
    ASSERT_EQ(all.size(), rank_count());
    for (int r = 0; r < world().size(); ++r)
        EXPECT_EQ(all[static_cast<std::size_t>(r)], message(r, 1, bytes_of(r)));
    for (const auto& part : world().all_gather_ragged({}, "nothing at all"))
        EXPECT_TRUE(part.empty());
}

TEST_P(Transfer, RaggedAllToAllWithEmptyParts)
{
    const auto bytes_of = [](int from, int to) { return static_cast<std::size_t>((from * 5 + to * 3) % 4) * 131; };
    std::vector<std::vector<std::byte>> send(rank_count());
    for (int to = 0; to < world().size(); ++to)
        send[static_cast<std::size_t>(to)] = message(world().rank(), to, bytes_of(world().rank(), to));
    const auto received = world().all_to_all_ragged(send, "all to all");
    ASSERT_EQ(received.size(), rank_count());
    for (int from = 0; from < world().size(); ++from)
        EXPECT_EQ(received[static_cast<std::size_t>(from)], message(from, world().rank(), bytes_of(from, world().rank())));
    for (const auto& part : world().all_to_all_ragged(std::vector<std::vector<std::byte>>(rank_count()), "nothing at all"))
        EXPECT_TRUE(part.empty());
}

/// Numbers whose sum depends on its order: large ones that cancel and small ones.
double contribution(int rank, std::size_t i)
{
    RandomStream stream(5, 1, static_cast<std::uint64_t>(rank), i);
    return stream.next_normal() * std::pow(10.0, static_cast<double>(stream.next_below(12)));
}

TEST_P(Transfer, DoubleSumsAreTakenInRankOrder)
{
    for (const std::size_t count : {std::size_t{1}, std::size_t{7}, std::size_t{1500}}) {
        std::vector<double> data(count);
        for (std::size_t i = 0; i < count; ++i)
            data[i] = contribution(world().rank(), i);
        world().all_reduce(std::span<double>(data), ReduceOp::sum, "sum");
        for (std::size_t i = 0; i < count; ++i) {
            double expected = contribution(0, i);
            for (int r = 1; r < world().size(); ++r)
                expected += contribution(r, i);
            ASSERT_EQ(data[i], expected) << "bitwise, element " << i << " of " << count;
        }
    }
}

TEST_P(Transfer, MinimumAndMaximumAndNan)
{
    for (const std::size_t count : {std::size_t{2}, std::size_t{1200}}) {
        std::vector<double> low(count), high(count);
        for (std::size_t i = 0; i < count; ++i)
            low[i] = high[i] = contribution(world().rank(), i);
        if (world().rank() == world().size() - 1)
            low[1] = high[1] = std::numeric_limits<double>::quiet_NaN();
        world().all_reduce(std::span<double>(low), ReduceOp::min, "min");
        world().all_reduce(std::span<double>(high), ReduceOp::max, "max");
        for (std::size_t i = 0; i < count; ++i) {
            if (i == 1) {
                EXPECT_TRUE(std::isnan(low[1]) && std::isnan(high[1])) << "a NaN of one rank must be seen on all";
                continue;
            }
            double smallest = contribution(0, i);
            double largest = smallest;
            for (int r = 1; r < world().size(); ++r) {
                smallest = std::min(smallest, contribution(r, i));
                largest = std::max(largest, contribution(r, i));
            }
            ASSERT_EQ(low[i], smallest);
            ASSERT_EQ(high[i], largest);
        }
    }
}

TEST_P(Transfer, IntegerReductions)
{
    std::vector<std::int64_t> sum(40), low(40), high(40);
    const std::int64_t big = std::int64_t{1} << 60;
    for (std::size_t i = 0; i < 40; ++i)
        sum[i] = low[i] = high[i] = big + static_cast<std::int64_t>(i) * (world().rank() + 1);
    world().all_reduce(std::span<std::int64_t>(sum), ReduceOp::sum, "sum");
    world().all_reduce(std::span<std::int64_t>(low), ReduceOp::min, "min");
    world().all_reduce(std::span<std::int64_t>(high), ReduceOp::max, "max");
    const std::int64_t n = world().size();
    for (std::int64_t i = 0; i < 40; ++i) {
        EXPECT_EQ(sum[static_cast<std::size_t>(i)], n * big + i * n * (n + 1) / 2);
        EXPECT_EQ(low[static_cast<std::size_t>(i)], big + i);
        EXPECT_EQ(high[static_cast<std::size_t>(i)], big + i * n);
    }
    world().all_reduce(std::span<std::int64_t>(), ReduceOp::sum, "empty");
}

/// Unequal shards, the second empty where there is one.
std::vector<std::size_t> unequal_offsets()
{
    std::vector<std::size_t> offsets{0};
    for (std::size_t r = 0; r < rank_count(); ++r)
        offsets.push_back(offsets.back() + (r == 1 ? 0 : 50 + 23 * r));
    return offsets;
}

TEST_P(Transfer, ReduceScatterSumsInRankOrder)
{
    const auto offsets = unequal_offsets();
    const auto own = static_cast<std::size_t>(world().rank());
    const auto value = [](int r, std::size_t i) { return static_cast<float>(contribution(r, i)); };
    std::vector<float> full(offsets.back());
    for (std::size_t i = 0; i < full.size(); ++i)
        full[i] = value(world().rank(), i);
    std::vector<float> shard(offsets[own + 1] - offsets[own], -1.0F);
    world().reduce_scatter_sum(full, offsets, shard, "reduce scatter");
    for (std::size_t i = 0; i < shard.size(); ++i) {
        float expected = value(0, offsets[own] + i);
        for (int r = 1; r < world().size(); ++r)
            expected += value(r, offsets[own] + i);
        ASSERT_EQ(shard[i], expected) << "bitwise, element " << i;
    }
}

TEST_P(Transfer, GatherOfShardsFromOutsideAndInPlace)
{
    const auto offsets = unequal_offsets();
    const auto own = static_cast<std::size_t>(world().rank());
    std::vector<float> expected(offsets.back());
    std::iota(expected.begin(), expected.end(), 1.0F);
    std::vector<float> full(offsets.back(), 0.0F);
    const std::vector<float> shard(expected.begin() + static_cast<std::ptrdiff_t>(offsets[own]),
                                   expected.begin() + static_cast<std::ptrdiff_t>(offsets[own + 1]));
    world().all_gather_shards(shard, offsets, full, "gather shards");
    EXPECT_EQ(full, expected);

    std::vector<float> in_place(offsets.back(), 0.0F);
    std::copy(shard.begin(), shard.end(), in_place.begin() + static_cast<std::ptrdiff_t>(offsets[own]));
    world().all_gather_shards(std::span<const float>(in_place).subspan(offsets[own], shard.size()), offsets, in_place,
                              "gather in place");
    EXPECT_EQ(in_place, expected);
}

INSTANTIATE_TEST_SUITE_P(WholeAndInPieces, Transfer, testing::Values(std::size_t{256} << 20, std::size_t{64}),
                         [](const auto& info) { return info.param > 1000 ? std::string("Whole") : std::string("InPieces"); });

TEST(Communicator, CountsAboveIntAreRefused)
{
    EXPECT_EQ(comm::to_count(2147483647), 2147483647);
    try {
        comm::to_count(std::size_t{1} << 31);
        FAIL();
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::internal);
    }
}

TEST(Communicator, TypedHelpers)
{
    std::string text = world().is_root() ? std::string("zero\0inside", 11) : "something else that is longer";
    broadcast_string(world(), text, 0, "string");
    EXPECT_EQ(text, std::string("zero\0inside", 11));
    struct Pair {
        int rank;
        double value;
    };
    const auto all = all_gather_value(world(), Pair{world().rank(), world().rank() * 0.5}, "pairs");
    ASSERT_EQ(all.size(), rank_count());
    for (int r = 0; r < world().size(); ++r) {
        EXPECT_EQ(all[static_cast<std::size_t>(r)].rank, r);
        EXPECT_EQ(all[static_cast<std::size_t>(r)].value, r * 0.5);
    }
    EXPECT_EQ(all_reduce_value(world(), std::int64_t{1}, ReduceOp::sum, "count"), world().size());
}

TEST(Communicator, SendDoesNotWaitAndNothingIsLost)
{
    const auto copy = world().duplicate("messages");
    const int next = (copy->rank() + 1) % copy->size();
    // All send before any receives: a send that waited would hang here. 64 KiB is far above MPI's eager limits.
    for (int i = 0; i < 8; ++i)
        copy->send(next, 5, message(copy->rank(), i, i % 2 == 0 ? 65536 : 3));
    copy->send(next, 6, {});
    int received = 0;
    bool other_tag = false;
    while (received < 8 || !other_tag) {
        if (const auto got = copy->try_receive(5)) {
            EXPECT_EQ(got->source, (copy->rank() + copy->size() - 1) % copy->size());
            EXPECT_EQ(got->data, message(got->source, received, received % 2 == 0 ? 65536 : 3)) << "order is kept";
            ++received;
        }
        if (const auto got = copy->try_receive(6)) {
            EXPECT_TRUE(got->data.empty());
            other_tag = true;
        }
        std::this_thread::yield();
    }
    copy->barrier("after the messages");
    EXPECT_FALSE(copy->try_receive(5).has_value());
    EXPECT_FALSE(copy->try_receive(7).has_value());
}

TEST(Communicator, UnreceivedMessagesDoNotHangTheEnd)
{
    const auto copy = world().duplicate("dropped");
    copy->send(0, 1, message(copy->rank(), 0, 65536));
}

TEST(Communicator, SleepingBarrierPollsWhileItWaits)
{
    const auto copy = world().duplicate("polling");
    if (copy->size() == 1)
        GTEST_SKIP() << "needs a peer";
    // Rank 0 answers the others' questions from inside its barrier; they enter theirs only when answered.
    int answered = 0;
    const auto answer = [&] {
        while (const auto question = copy->try_receive(1)) {
            copy->send(question->source, 2, question->data);
            ++answered;
        }
    };
    if (copy->is_root()) {
        copy->sleeping_barrier("wait for all", answer);
        EXPECT_EQ(answered, copy->size() - 1);
    } else {
        copy->send(0, 1, message(copy->rank(), 0, 16));
        std::optional<Communicator::Message> reply;
        while (!(reply = copy->try_receive(2)))
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        EXPECT_EQ(reply->data, message(copy->rank(), 0, 16));
        copy->sleeping_barrier("wait for all", {});
    }
}

TEST(Communicator, NodeGroupsAreOrderedByRank)
{
    const auto node = world().split_node("node");
    EXPECT_EQ(node->size(), world().size()) << "the tests run on one machine";
    EXPECT_EQ(node->rank(), world().rank());
}

} // namespace
} // namespace selm
