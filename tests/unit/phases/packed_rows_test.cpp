#include "packed_rows.hpp"

#include <algorithm>
#include <limits>
#include <numeric>

#include <gtest/gtest.h>

#include "selm/base/error.hpp"
#include "selm/base/rng.hpp"

namespace selm {
namespace {

std::vector<std::int64_t> random_costs(std::size_t count)
{
    RandomStream random(5, 9, 0, 0);
    std::vector<std::int64_t> costs(count);
    for (auto& cost : costs)
        cost = 20 + static_cast<std::int64_t>(random.next_below(1500));
    return costs;
}

SequenceRow sequence_row()
{
    EncodedRow row;
    row.prompt = {1, 2, 3};
    row.responses[0] = std::vector<std::int32_t>{7, 8};
    row.responses[1] = std::vector<std::int32_t>{9};
    row.responses[2] = std::vector<std::int32_t>{7, 8};
    return sequences_of(row);
}

TEST(PackRow, EqualAnswersShareABranch)
{
    const PackedRow row = pack_row(4, sequence_row(), {true, true, true});
    EXPECT_EQ(row.trunk, (std::vector<std::int32_t>{1, 2, 3}));
    ASSERT_EQ(row.branches.size(), 2U);
    EXPECT_EQ(row.branch_of, (std::array<std::int32_t, 3>{0, 1, 0}));
    EXPECT_EQ(row.branches[0].tokens, (std::vector<std::int32_t>{7, 8}));
    EXPECT_EQ(row.branches[0].unscored, 0);
    EXPECT_EQ(row.tokens(), 3 + 2 + 1);
    EXPECT_EQ(row.position, 4);
}

TEST(PackRow, UnwantedAnswersAreNotComputed)
{
    const PackedRow row = pack_row(0, sequence_row(), {false, true, false});
    ASSERT_EQ(row.branches.size(), 1U);
    EXPECT_EQ(row.branch_of, (std::array<std::int32_t, 3>{-1, 0, -1}));
    EXPECT_EQ(row.tokens(), 4);
    SequenceRow without = sequence_row();
    without[0].reset();
    EXPECT_THROW(pack_row(0, without, {true, true, true}), Error);
}

TEST(PackRow, PromptsThatDifferShareTheirBeginning)
{
    const SequenceRow row{LabelledSequence{{1, 2, 3, 7}, 3}, LabelledSequence{{1, 2, 9, 7}, 3},
                          LabelledSequence{{1, 2, 3, 7}, 2}};
    const PackedRow packed = pack_row(0, row, {true, true, true});
    EXPECT_EQ(packed.trunk, (std::vector<std::int32_t>{1, 2}));
    ASSERT_EQ(packed.branches.size(), 3U); // the same tokens, scored from another one on, are another answer
    EXPECT_EQ(packed.branches[0].tokens, (std::vector<std::int32_t>{3, 7}));
    EXPECT_EQ(packed.branches[1].tokens, (std::vector<std::int32_t>{9, 7}));
    EXPECT_EQ(packed.branches[2].tokens, (std::vector<std::int32_t>{3, 7}));
    EXPECT_EQ(packed.scored_tokens(0), 1);
    EXPECT_EQ(packed.scored_tokens(1), 1);
    EXPECT_EQ(packed.scored_tokens(2), 2);
    // What is wanted changes the branches, not the trunk.
    EXPECT_EQ(pack_row(0, row, {true, false, false}).trunk, packed.trunk);
}

TEST(PackRow, PromptsWithNothingInCommonHaveNoTrunk)
{
    const PackedRow packed =
        pack_row(0, {std::nullopt, LabelledSequence{{1, 2, 3}, 2}, LabelledSequence{{2, 3, 4}, 1}},
                 {false, true, true});
    EXPECT_TRUE(packed.trunk.empty());
    ASSERT_EQ(packed.branches.size(), 2U);
    EXPECT_EQ(packed.branches[0].unscored, 2);
    EXPECT_EQ(packed.branches[1].unscored, 1);
    EXPECT_EQ(packed.tokens(), 6);
}

TEST(RowPair, WantsTheBestTheWorstAndTheGeneratedOne)
{
    const auto wanted = [](std::int32_t best, std::int32_t worst, bool generated) {
        return RowPair{best, worst, generated}.wanted();
    };
    EXPECT_EQ(wanted(1, 2, true), (WantedCandidates{true, true, true}));
    EXPECT_EQ(wanted(1, 2, false), (WantedCandidates{false, true, true}));
    EXPECT_EQ(wanted(0, 2, false), (WantedCandidates{true, false, true}));
    EXPECT_EQ(wanted(1, 1, false), (WantedCandidates{false, true, false}));
}

TEST(Microbatches, KeepTheBudgetAndARowAboveItIsAlone)
{
    using Groups = std::vector<std::vector<std::size_t>>;
    const auto groups = [](std::vector<std::int64_t> costs) { return microbatches(costs, 10); };
    EXPECT_EQ(groups({}), Groups{});
    EXPECT_EQ(groups({1, 1, 1}), (Groups{{0, 1, 2}}));
    EXPECT_EQ(groups({4, 25, 1, 2}), (Groups{{1}, {0, 2, 3}}));
    EXPECT_EQ(groups({25, 30}), (Groups{{1}, {0}}));
    EXPECT_EQ(groups({4, 6, 1}), (Groups{{1}, {0, 2}}));       // as even as two groups can be
    EXPECT_EQ(groups({6, 4, 4, 3, 3}), (Groups{{0, 1}, {2, 3, 4}})); // longest first would need {0, 3} and {1, 2, 4}: 9 and 11
    EXPECT_EQ(microbatches(std::vector<std::int64_t>{1, 1, 1}, 1), (Groups{{0}, {1}, {2}}));
}

TEST(Microbatches, EveryRowIsInOneAndTheLargestComeFirst)
{
    const auto costs = random_costs(500);
    std::vector<int> seen(costs.size(), 0);
    std::int64_t before = std::numeric_limits<std::int64_t>::max();
    for (const auto& group : microbatches(costs, 2048)) {
        std::int64_t load = 0;
        for (const std::size_t row : group) {
            ++seen[row];
            load += costs[row];
        }
        EXPECT_TRUE(group.size() == 1 || load <= 2048);
        EXPECT_LE(load, before);
        before = load;
    }
    EXPECT_TRUE(std::all_of(seen.begin(), seen.end(), [](int count) { return count == 1; }));
}

class BalanceRows : public ::testing::TestWithParam<int> {};

TEST_P(BalanceRows, EveryRowHasOneRankAndTokensAreEven)
{
    const int ranks = GetParam();
    for (const std::size_t rows : {std::size_t{1}, std::size_t{3}, std::size_t{256}, std::size_t{5000}}) {
        const auto costs = random_costs(rows);
        const auto dealt = balance_rows(costs, ranks);
        ASSERT_EQ(dealt.size(), static_cast<std::size_t>(ranks));
        std::vector<int> seen(rows, 0);
        std::vector<std::int64_t> loads;
        for (const auto& of_rank : dealt) {
            EXPECT_TRUE(std::is_sorted(of_rank.begin(), of_rank.end()));
            std::int64_t load = 0;
            for (const std::size_t row : of_rank) {
                ++seen[row];
                load += costs[row];
            }
            loads.push_back(load);
        }
        EXPECT_TRUE(std::all_of(seen.begin(), seen.end(), [](int count) { return count == 1; }));
        // Greedy by size, then evened out: no load exceeds another by more than the largest row.
        const auto [least, most] = std::minmax_element(loads.begin(), loads.end());
        EXPECT_LE(*most - *least, *std::max_element(costs.begin(), costs.end()));
        EXPECT_EQ(dealt, balance_rows(costs, ranks));
    }
}

TEST(BalanceRowsOfOneBatch, ExchangesRowsWhereGreedyIsUneven)
{
    const auto loads = [](const std::vector<std::int64_t>& costs, int ranks) {
        std::vector<std::int64_t> out;
        for (const auto& rows : balance_rows(costs, ranks)) {
            out.push_back(0);
            for (const std::size_t row : rows)
                out.back() += costs[row];
        }
        std::sort(out.begin(), out.end());
        return out;
    };
    using Loads = std::vector<std::int64_t>;
    EXPECT_EQ(loads({7, 6, 5, 4, 4, 3}, 2), (Loads{14, 15}));
    EXPECT_EQ(loads({80, 70, 60, 50, 45}, 2), (Loads{150, 155})); // greedy: 80+50+45 = 175 and 130
    EXPECT_EQ(loads({30, 30, 20, 20, 20}, 2), (Loads{60, 60}));   // greedy: 30+20+20 and 30+20
}

TEST(WorkOfARow, CountsLayersHeadAndAttention)
{
    DecoderConfig config;
    config.hidden = 100;
    config.intermediate = 200;
    config.layers = 10;
    config.heads = 4;
    config.kv_heads = 2;
    config.head_dim = 25;
    config.vocabulary = 5000;
    PackedRow row;
    row.trunk.assign(40, 1);
    row.branches = {{std::vector<std::int32_t>(30, 2), 0}, {std::vector<std::int32_t>(20, 3), 5}};
    EXPECT_EQ(row.tokens(), 90);
    EXPECT_EQ(row.scored_tokens(), 45);
    EXPECT_EQ(row.attention_pairs(), 40 * 41 / 2 + 30 * 31 / 2 + 30 * 40 + 20 * 21 / 2 + 20 * 40);
    const std::int64_t layers = 10 * 100 * (200 + 100 + 600), head = 5000 * 100, pair = 10 * 4 * 25;
    EXPECT_EQ(work_of(row, config, false), (90 * layers + 45 * head + 3 * row.attention_pairs() * pair) / 1000);
    EXPECT_EQ(work_of(row, config, true), (3 * 90 * layers + 4 * 45 * head + 10 * row.attention_pairs() * pair) / 1000);
    config.sequence_classifier = true;
    EXPECT_EQ(work_of(row, config, false), (90 * layers + 3 * row.attention_pairs() * pair) / 1000);
}

INSTANTIATE_TEST_SUITE_P(Ranks, BalanceRows, ::testing::Values(1, 2, 3, 8, 512, 4096));

} // namespace
} // namespace selm
