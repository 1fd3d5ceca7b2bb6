// The logic by which data are cut and scheduled, for more ranks than any machine of the tests has.

#include <algorithm>
#include <map>
#include <numeric>
#include <vector>

#include <gtest/gtest.h>

#include "reduce_plan.hpp"
#include "selm/base/error.hpp"
#include "selm/comm/communicator.hpp"

namespace selm::comm {
namespace {

class Schedule : public testing::TestWithParam<std::size_t> {
  protected:
    std::size_t ranks() const { return GetParam(); }
    std::vector<std::size_t> even(std::size_t total) const
    {
        std::vector<std::size_t> offsets{0};
        for (std::size_t r = 0; r < ranks(); ++r)
            offsets.push_back(offsets.back() + total / ranks() + (r < total % ranks() ? 1 : 0));
        return offsets;
    }
    std::vector<std::size_t> all_on(std::size_t rank, std::size_t total) const
    {
        std::vector<std::size_t> offsets(ranks() + 1, 0);
        std::fill(offsets.begin() + static_cast<std::ptrdiff_t>(rank) + 1, offsets.end(), total);
        return offsets;
    }
};

/// Rounds until the longest shard is through, and the buffer that a rank of that shard needs.
struct Cost {
    std::size_t rounds = 0;
    std::size_t buffer_elements = 0;
};

Cost cost_of(const std::vector<std::size_t>& offsets, const ReducePlan& plan)
{
    std::size_t longest = 0;
    for (std::size_t r = 0; r + 1 < offsets.size(); ++r)
        longest = std::max(longest, elements_of(offsets, r));
    const std::size_t round = plan.in_rounds ? std::min(plan.round, longest) : longest;
    return {round == 0 ? 0 : (longest + round - 1) / round, round * (offsets.size() - 2)};
}

TEST_P(Schedule, ABucketOfEvenShardsIsOneCall)
{
    const std::size_t total = ranks() * 5000; // 20 kB a rank
    const auto offsets = even(total);
    const ReducePlan plan = plan_reduce(offsets, 4, total * 4);
    EXPECT_EQ(plan.in_rounds, total * 4 > max_message_bytes());
    EXPECT_EQ(cost_of(offsets, plan).rounds, 1U);
    EXPECT_LE(cost_of(offsets, plan).buffer_elements, total);
}

TEST_P(Schedule, NoBufferIsLargerThanTheInputOrTheLimit)
{
    for (const std::size_t total : {std::size_t{1}, std::size_t{1000}, std::size_t{1} << 20, std::size_t{3'000'000'001}})
        for (const std::size_t buffer_bytes : {std::size_t{64} << 20, total * 4})
            for (const auto& offsets : {even(total), all_on(ranks() - 1, total), all_on(0, total)}) {
                const ReducePlan plan = plan_reduce(offsets, 4, buffer_bytes);
                const std::size_t one_element_each = ranks() - 1; // where even that is more
                const Cost cost = cost_of(offsets, plan);
                EXPECT_LE(cost.buffer_elements, std::max(total, one_element_each));
                EXPECT_LE(cost.buffer_elements * 4, std::max(buffer_bytes, one_element_each * 4));
                if (plan.in_rounds)
                    EXPECT_LE(plan.round * 4, max_message_bytes());
                else
                    EXPECT_LE(total * 4, max_message_bytes()) << "one MPI call, counts and starts are int";
            }
}

TEST_P(Schedule, AllRanksSeeTheSamePlan)
{
    // The plan has no rank in it; shards that a rank shares with nobody change it on all.
    const auto offsets = all_on(ranks() / 2, 1 << 20);
    EXPECT_TRUE(plan_reduce(offsets, 4, std::size_t{1} << 30).in_rounds);
    EXPECT_FALSE(plan_reduce(even(1 << 20), 4, std::size_t{1} << 30).in_rounds);
    EXPECT_FALSE(plan_reduce(all_on(0, 0), 4, 0).in_rounds) << "nothing to move";
}

TEST_P(Schedule, EveryRanksShardsTileTheWhole)
{
    const auto offsets = even(ranks() * 3 + 5);
    std::vector<float> full(offsets.back());
    std::iota(full.begin(), full.end(), 0.0F);
    for (std::size_t r = 0; r < ranks(); r += std::max<std::size_t>(1, ranks() / 64)) {
        const auto comm = make_dry_run_communicator(static_cast<int>(r), static_cast<int>(ranks()));
        std::vector<float> shard(elements_of(offsets, r));
        const auto pending = comm->start_reduce_scatter_sum(full, offsets, shard, "sum");
        EXPECT_TRUE(pending->test());
        EXPECT_EQ(shard.front(), static_cast<float>(offsets[r]));
        EXPECT_EQ(shard.back(), static_cast<float>(offsets[r + 1] - 1));
        std::vector<float> gathered(full.size(), -1.0F);
        comm->start_all_gather_shards(shard, offsets, gathered, "gather")->wait();
        EXPECT_TRUE(std::equal(shard.begin(), shard.end(), gathered.begin() + static_cast<std::ptrdiff_t>(offsets[r])));
        EXPECT_EQ(std::count(gathered.begin(), gathered.end(), -1.0F), static_cast<std::ptrdiff_t>(full.size() - shard.size()));
    }
}

TEST_P(Schedule, NodesOfADryRunTileItsRanks)
{
    for (const int most : {1, 8, 48, 5000}) {
        int next = 0;
        while (next < static_cast<int>(ranks())) {
            const auto node = make_dry_run_communicator(next, static_cast<int>(ranks()))->split_node("node", most);
            EXPECT_EQ(node->rank(), 0) << "rank " << next << " is the first of its node";
            const int last = next + node->size() - 1;
            const auto end = make_dry_run_communicator(last, static_cast<int>(ranks()))->split_node("node", most);
            EXPECT_EQ(end->rank(), end->size() - 1);
            EXPECT_EQ(end->size(), node->size());
            EXPECT_LE(node->size(), most);
            next = last + 1;
        }
        EXPECT_EQ(next, static_cast<int>(ranks()));
    }
}

INSTANTIATE_TEST_SUITE_P(Ranks, Schedule, testing::Values(8, 512, 4096));

TEST(DryRunExchange, OwnMessagesArriveAndOthersAreZeros)
{
    const auto comm = make_dry_run_communicator(5, 512);
    const std::vector<std::byte> first(3, std::byte{1}), second(2, std::byte{2});
    std::vector<std::byte> got_first(3), got_second(2), from_other(4, std::byte{9});
    const std::vector<Communicator::Outgoing> outgoing{{5, first}, {511, second}, {5, second}};
    const std::vector<Communicator::Incoming> incoming{{5, got_first}, {0, from_other}, {5, got_second}};
    comm->start_exchange(outgoing, incoming, "exchange")->wait();
    EXPECT_EQ(got_first, first);
    EXPECT_EQ(got_second, second);
    EXPECT_EQ(from_other, std::vector<std::byte>(4, std::byte{0}));
    EXPECT_THROW(comm->start_exchange(outgoing, {}, "one side only"), Error);
    const std::vector<Communicator::Outgoing> nowhere{{512, first}};
    EXPECT_THROW(comm->start_exchange(nowhere, {}, "no such rank"), Error);
}

TEST(DryRunReduce, Bf16BecomesFp32)
{
    const auto comm = make_dry_run_communicator(1, 4096);
    std::vector<std::size_t> offsets(4097, 2);
    offsets[0] = 0;
    offsets[1] = 1;
    const std::vector<std::uint16_t> full{0x3F80, 0xC000}; // 1, -2
    std::vector<float> shard(1);
    comm->start_reduce_scatter_sum_bf16(full, offsets, shard, "bf16")->wait();
    EXPECT_EQ(shard[0], -2.0F);
}

} // namespace
} // namespace selm::comm
