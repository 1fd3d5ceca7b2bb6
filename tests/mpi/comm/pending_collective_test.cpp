#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "message_limit_test.hpp"
#include "mpi_test.hpp"
#include "own_tags.hpp"
#include "selm/base/error.hpp"
#include "selm/base/rng.hpp"
#include "selm/comm/communicator.hpp"

namespace selm {
namespace {

using test::own_rank;
using test::rank_count;

Communicator& world()
{
    return test::test_world();
}

/// Numbers whose sum depends on its order.
float contribution(int rank, std::size_t i, std::uint64_t salt = 0)
{
    RandomStream stream(7, 1 + salt, static_cast<std::uint64_t>(rank), i);
    return static_cast<float>(stream.next_normal() * std::pow(10.0, static_cast<double>(stream.next_below(8))));
}

std::uint16_t bf16_bits(float value)
{
    return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16); // cut: any bf16 number will do
}

enum class Shape { even, odd, second_empty, all_on_last, empty, gap_before, one_element };

std::vector<std::size_t> offsets_of(Shape shape)
{
    std::vector<std::size_t> offsets{shape == Shape::gap_before ? std::size_t{5} : 0};
    for (std::size_t r = 0; r < rank_count(); ++r) {
        std::size_t count = 40;
        if (shape == Shape::odd)
            count = 31 + (r % 2);
        if (shape == Shape::second_empty || shape == Shape::gap_before)
            count = r == 1 ? 0 : 50 + 23 * r;
        if (shape == Shape::all_on_last)
            count = r + 1 == rank_count() ? 333 : 0;
        if (shape == Shape::empty)
            count = 0;
        if (shape == Shape::one_element)
            count = r == 0 ? 1 : 0;
        offsets.push_back(offsets.back() + count);
    }
    return offsets;
}

const std::vector<Shape> all_shapes{Shape::even,  Shape::odd,        Shape::second_empty, Shape::all_on_last,
                                    Shape::empty, Shape::gap_before, Shape::one_element};

std::vector<float> contributions(const std::vector<std::size_t>& offsets, std::uint64_t salt = 0)
{
    std::vector<float> full(offsets.back() + 3); // and more that belongs to nobody
    for (std::size_t i = 0; i < full.size(); ++i)
        full[i] = contribution(world().rank(), i, salt);
    return full;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b)
{
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

/// Two limits: one MPI call each, and pieces of 64 bytes, the code path of transfers above 2^31 bytes.
class Pending : public test::WithMessageLimit {};

TEST_P(Pending, ReduceScatterHasTheBitsOfTheBlockingCall)
{
    for (const Shape shape : all_shapes) {
        const auto offsets = offsets_of(shape);
        const auto full = contributions(offsets);
        std::vector<float> expected(offsets[own_rank() + 1] - offsets[own_rank()], -1.0F);
        world().reduce_scatter_sum(full, offsets, expected, "blocking");
        std::vector<float> shard(expected.size(), -2.0F);
        auto pending = world().start_reduce_scatter_sum(full, offsets, shard, "started");
        pending->wait();
        EXPECT_TRUE(pending->test());
        pending->wait(); // a second time does nothing
        EXPECT_TRUE(same_bits(shard, expected)) << "shape " << static_cast<int>(shape);

        auto in_place = full;
        const std::span<float> part = std::span<float>(in_place).subspan(offsets[own_rank()], shard.size());
        world().start_reduce_scatter_sum(in_place, offsets, part, "in place")->wait();
        EXPECT_TRUE(same_bits(std::vector<float>(part.begin(), part.end()), expected)) << "shape " << static_cast<int>(shape);
    }
}

TEST_P(Pending, NegativeZerosKeepTheirSign)
{
    const auto offsets = offsets_of(Shape::even);
    const std::vector<float> full(offsets.back(), -0.0F);
    std::vector<float> shard(offsets[own_rank() + 1] - offsets[own_rank()], 1.0F);
    world().start_reduce_scatter_sum(full, offsets, shard, "zeros")->wait();
    EXPECT_TRUE(std::signbit(shard.front()));
}

TEST_P(Pending, Bf16IsSummedInFp32InRankOrder)
{
    for (const Shape shape : all_shapes) {
        const auto offsets = offsets_of(shape);
        std::vector<std::uint16_t> full;
        for (const float value : contributions(offsets))
            full.push_back(bf16_bits(value));
        std::vector<float> expected(offsets[own_rank() + 1] - offsets[own_rank()]);
        for (std::size_t i = 0; i < expected.size(); ++i)
            for (int r = 0; r < world().size(); ++r) {
                const auto bits = static_cast<std::uint32_t>(bf16_bits(contribution(r, offsets[own_rank()] + i))) << 16;
                expected[i] = r == 0 ? std::bit_cast<float>(bits) : expected[i] + std::bit_cast<float>(bits);
            }
        std::vector<float> shard(expected.size(), -2.0F);
        world().start_reduce_scatter_sum_bf16(full, offsets, shard, "bf16")->wait();
        EXPECT_TRUE(same_bits(shard, expected)) << "shape " << static_cast<int>(shape);
    }
}

TEST_P(Pending, GatherOfShardsFromOutsideAndInPlace)
{
    for (const Shape shape : all_shapes) {
        const auto offsets = offsets_of(shape);
        std::vector<float> expected(offsets.back() + 2, -1.0F); // what lies outside of all shards stays
        std::iota(expected.begin() + static_cast<std::ptrdiff_t>(offsets.front()),
                  expected.begin() + static_cast<std::ptrdiff_t>(offsets.back()), 1.0F);
        const std::vector<float> shard(expected.begin() + static_cast<std::ptrdiff_t>(offsets[own_rank()]),
                                       expected.begin() + static_cast<std::ptrdiff_t>(offsets[own_rank() + 1]));
        std::vector<float> full(expected.size(), -1.0F);
        world().start_all_gather_shards(shard, offsets, full, "gather")->wait();
        EXPECT_TRUE(same_bits(full, expected)) << "shape " << static_cast<int>(shape);

        std::vector<float> in_place(expected.size(), -1.0F);
        std::copy(shard.begin(), shard.end(), in_place.begin() + static_cast<std::ptrdiff_t>(offsets[own_rank()]));
        world().start_all_gather_shards(std::span<const float>(in_place).subspan(offsets[own_rank()], shard.size()), offsets, in_place,
                                        "gather in place")->wait();
        EXPECT_TRUE(same_bits(in_place, expected)) << "shape " << static_cast<int>(shape);
    }
}

TEST_P(Pending, ManyInFlightWaitedForInAnyOrder)
{
    // Even ranks wait from the first to the last, odd ranks from the last to the first, a blocking call in between.
    struct Case {
        std::vector<std::size_t> offsets;
        std::vector<float> full, shard, expected, gathered, gathered_expected;
    };
    std::vector<Case> cases;
    for (std::uint64_t salt = 0; salt < 2; ++salt)
        for (const Shape shape : all_shapes) {
            Case one{offsets_of(shape), {}, {}, {}, {}, {}};
            one.full = contributions(one.offsets, salt);
            one.expected.resize(one.offsets[own_rank() + 1] - one.offsets[own_rank()]);
            one.shard.resize(one.expected.size());
            world().reduce_scatter_sum(one.full, one.offsets, one.expected, "blocking");
            one.gathered_expected.resize(one.offsets.back());
            world().all_gather_shards(one.expected, one.offsets, one.gathered_expected, "blocking");
            one.gathered.resize(one.offsets.back());
            cases.push_back(std::move(one));
        }
    std::vector<std::unique_ptr<PendingCollective>> pending;
    for (Case& one : cases) {
        pending.push_back(world().start_reduce_scatter_sum(one.full, one.offsets, one.shard, "many"));
        pending.push_back(world().start_all_gather_shards(one.expected, one.offsets, one.gathered, "many"));
        pending.push_back(world().start_barrier("many"));
    }
    EXPECT_EQ(all_reduce_value(world(), std::int64_t{1}, ReduceOp::sum, "between"), world().size());
    if (world().rank() % 2 == 1)
        std::reverse(pending.begin(), pending.end());
    for (auto& one : pending)
        one->wait();
    for (const Case& one : cases) {
        EXPECT_TRUE(same_bits(one.shard, one.expected));
        EXPECT_TRUE(same_bits(one.gathered, one.gathered_expected));
    }
}

TEST_P(Pending, TestAloneFinishesIt)
{
    const auto offsets = offsets_of(Shape::all_on_last);
    const auto full = contributions(offsets);
    std::vector<float> expected(offsets[own_rank() + 1] - offsets[own_rank()]), shard(expected.size());
    world().reduce_scatter_sum(full, offsets, expected, "blocking");
    const auto pending = world().start_reduce_scatter_sum(full, offsets, shard, "polled");
    while (!pending->test())
        std::this_thread::yield();
    EXPECT_TRUE(same_bits(shard, expected));
}

TEST_P(Pending, DestructionWaits)
{
    const auto offsets = offsets_of(Shape::second_empty);
    const auto full = contributions(offsets);
    std::vector<float> expected(offsets[own_rank() + 1] - offsets[own_rank()]), shard(expected.size());
    world().reduce_scatter_sum(full, offsets, expected, "blocking");
    world().start_reduce_scatter_sum(full, offsets, shard, "dropped");
    EXPECT_TRUE(same_bits(shard, expected));
}

TEST_P(Pending, UnwindingFromAnAgreedErrorFinishesToo)
{
    const auto offsets = offsets_of(Shape::all_on_last);
    const auto full = contributions(offsets);
    std::vector<float> expected(offsets[own_rank() + 1] - offsets[own_rank()]), shard(expected.size());
    world().reduce_scatter_sum(full, offsets, expected, "blocking");
    EXPECT_THROW(
        {
            const auto pending = world().start_reduce_scatter_sum(full, offsets, shard, "unwound");
            throw data_error("on all ranks");
        },
        Error);
    world().barrier("after the error");
    EXPECT_TRUE(same_bits(shard, expected));
}

std::vector<std::byte> message(int from, int to, int k, std::size_t bytes)
{
    std::vector<std::byte> data(bytes);
    for (std::size_t i = 0; i < bytes; ++i)
        data[i] = static_cast<std::byte>((static_cast<std::size_t>(from * 37 + to * 11 + k * 101) + i * 7) & 0xff);
    return data;
}

/// Message k from one rank to another; none between some pairs, some to itself, some empty.
std::vector<std::size_t> message_sizes(int from, int to)
{
    if ((from + 2 * to) % 3 == 1)
        return {};
    return {static_cast<std::size_t>(from * 100 + to * 13 + 1), 0, 333};
}

TEST_P(Pending, ExchangeDeliversListsOfMessages)
{
    for (int round = 0; round < 2; ++round) { // two in flight on the same pairs
        std::vector<std::vector<std::byte>> sent, received, expected;
        for (int other = 0; other < world().size(); ++other) {
            int k = 0;
            for (const std::size_t bytes : message_sizes(world().rank(), other))
                sent.push_back(message(world().rank(), other, k++, bytes));
            k = 0;
            for (const std::size_t bytes : message_sizes(other, world().rank())) {
                expected.push_back(message(other, world().rank(), k++, bytes));
                received.emplace_back(bytes);
            }
        }
        std::vector<Communicator::Outgoing> outgoing;
        std::vector<Communicator::Incoming> incoming;
        std::size_t s = 0, r = 0;
        for (int other = 0; other < world().size(); ++other) {
            for (std::size_t k = 0; k < message_sizes(world().rank(), other).size(); ++k)
                outgoing.push_back({other, sent[s++]});
            for (std::size_t k = 0; k < message_sizes(other, world().rank()).size(); ++k)
                incoming.push_back({other, received[r++]});
        }
        if (outgoing.empty() && incoming.empty())
            continue;
        world().start_exchange(outgoing, incoming, "exchange")->wait();
        EXPECT_EQ(received, expected);
    }
}

TEST_P(Pending, ExchangeIsNotCollective)
{
    if (world().size() < 2)
        GTEST_SKIP() << "needs a peer";
    const auto first = message(0, 1, 0, 200);
    const auto second = message(0, 1, 1, 100);
    std::vector<std::byte> got_first(200), got_second(100);
    if (world().rank() == 0) { // two objects here, one at the partner
        const auto one = world().start_exchange(std::vector<Communicator::Outgoing>{{1, first}}, {}, "first");
        const auto two = world().start_exchange(std::vector<Communicator::Outgoing>{{1, second}}, {}, "second");
        two->wait();
        one->wait();
    } else if (world().rank() == 1) {
        world().start_exchange({}, std::vector<Communicator::Incoming>{{0, got_first}, {0, got_second}}, "both")->wait();
        EXPECT_EQ(got_first, first);
        EXPECT_EQ(got_second, second);
    }
}

TEST_P(Pending, ExchangeOfDifferentSizesIsAnError)
{
    const auto copy = world().duplicate("sizes"); // messages left over must not meet other tests
    const auto data = message(0, 0, 0, 10);
    std::vector<std::byte> room(12);
    EXPECT_THROW(copy->start_exchange(std::vector<Communicator::Outgoing>{{copy->rank(), data}},
                                      std::vector<Communicator::Incoming>{{copy->rank(), room}}, "sizes")->wait(),
                 Error);
}

INSTANTIATE_TEST_SUITE_P(WholeAndInPieces, Pending, testing::Values(std::size_t{256} << 20, std::size_t{64}),
                         [](const auto& info) { return info.param > 1000 ? std::string("Whole") : std::string("InPieces"); });

TEST(PendingCollective, TagsAreUsedAgain)
{
    const auto copy = world().duplicate("tags");
    const auto offsets = offsets_of(Shape::all_on_last); // in rounds where there are more than two ranks
    const auto full = contributions(offsets);
    std::vector<float> expected(offsets[own_rank() + 1] - offsets[own_rank()]);
    copy->reduce_scatter_sum(full, offsets, expected, "blocking");
    comm::set_max_message_bytes(512);
    const int count = comm::reduce_tags + 20;
    std::vector<std::vector<float>> shards(static_cast<std::size_t>(count), std::vector<float>(expected.size()));
    std::vector<std::unique_ptr<PendingCollective>> pending;
    for (auto& shard : shards)
        pending.push_back(copy->start_reduce_scatter_sum(full, offsets, shard, "tags"));
    for (auto& one : pending)
        one->wait();
    comm::set_max_message_bytes(std::size_t{256} << 20);
    EXPECT_TRUE(std::all_of(shards.begin(), shards.end(), [&](const auto& shard) { return same_bits(shard, expected); }));
}

TEST(PendingCollective, ABarrierIsOpenOnlyWhenAllHaveStartedIt)
{
    if (world().size() < 2)
        GTEST_SKIP() << "needs a peer";
    if (world().is_root()) {
        const auto pending = world().start_barrier("barrier");
        EXPECT_FALSE(pending->test());
        world().send(world().size() - 1, 3, {});
        pending->wait();
    } else {
        while (world().rank() == world().size() - 1 && !world().try_receive(3))
            std::this_thread::yield();
        world().start_barrier("barrier")->wait();
    }
}

TEST(Communicator, NodesAreCutIntoConsecutiveGroups)
{
    for (const int most : {1, 2, 3, 100}) {
        const auto part = world().split_node("part", most);
        const int first = world().rank() / most * most;
        EXPECT_EQ(part->rank(), world().rank() - first);
        EXPECT_EQ(part->size(), std::min(most, world().size() - first));
    }
}

} // namespace
} // namespace selm
