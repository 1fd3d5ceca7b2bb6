#include "selm/model/packed.hpp"

#include <gtest/gtest.h>

#include "selm/base/error.hpp"

namespace selm {
namespace {

using Ids = std::vector<std::int32_t>;

TEST(PackedBatch, ScoredTokensArePredictedByTheTokenBefore)
{
    PackedBatch batch;
    const std::vector<Branch> branches = {{{10, 11, 12}, 0}, {{}, 0}, {{20, 21, 22}, 2}, {{30}, 1}};
    batch.add_scored(Ids{1, 2}, branches);
    batch.add_scored(Ids{5}, std::vector<Branch>{{{6, 7}, 0}});
    EXPECT_EQ(batch.tokens, (Ids{1, 2, 10, 11, 12, 20, 21, 22, 30, 5, 6, 7}));
    EXPECT_EQ(batch.positions, (Ids{0, 1, 2, 3, 4, 2, 3, 4, 2, 0, 1, 2}));
    EXPECT_EQ(batch.selected, (std::vector<std::int64_t>{1, 2, 3, 6, 9, 10}));
    EXPECT_EQ(batch.targets, (Ids{10, 11, 12, 22, 6, 7}));
    EXPECT_EQ(batch.owner, (Ids{0, 0, 0, 2, 4, 4}));
    EXPECT_EQ(batch.branches, 5);
    const std::vector<std::array<std::int64_t, 3>> expected = {{0, 2, -1}, {2, 3, 0}, {5, 3, 0}, {8, 1, 0}, {9, 1, -1}, {10, 2, 4}};
    ASSERT_EQ(batch.segments.size(), expected.size());
    for (std::size_t i = 0; i < expected.size(); ++i) {
        const Segment& segment = batch.segments[i];
        EXPECT_EQ((std::array<std::int64_t, 3>{segment.begin, segment.length, segment.trunk}), expected[i]);
    }
}

TEST(PackedBatch, LastTokens)
{
    PackedBatch batch;
    batch.add_last_token(Ids{1, 2}, std::vector<Branch>{{{3, 4}, 0}, {{}, 0}});
    EXPECT_EQ(batch.selected, (std::vector<std::int64_t>{3, 1}));
    EXPECT_EQ(batch.targets, (Ids{-1, -1}));
    EXPECT_EQ(batch.owner, (Ids{0, 1}));
    EXPECT_EQ(batch.branches, 2);
}

TEST(PackedBatch, BranchesWithoutATrunkStandAlone)
{
    PackedBatch batch;
    batch.add_scored(Ids{1}, std::vector<Branch>{{{2}, 0}});
    batch.add_scored(Ids{}, std::vector<Branch>{{{3, 4, 5}, 2}, {{6, 7}, 1}});
    EXPECT_EQ(batch.positions, (Ids{0, 1, 0, 1, 2, 0, 1}));
    EXPECT_EQ(batch.selected, (std::vector<std::int64_t>{0, 3, 5}));
    EXPECT_EQ(batch.targets, (Ids{2, 5, 7}));
    ASSERT_EQ(batch.segments.size(), 4U);
    EXPECT_EQ(batch.segments[2].trunk, -1);
    EXPECT_EQ(batch.segments[3].trunk, -1);
}

TEST(PackedBatch, AFirstScoredTokenNeedsOneBeforeItAndUnscoredMustFit)
{
    PackedBatch batch;
    EXPECT_THROW(batch.add_scored(Ids{}, std::vector<Branch>{{{3, 4}, 0}}), Error);
    EXPECT_THROW(batch.add_last_token(Ids{}, std::vector<Branch>{{{3, 4}, 0}}), Error);
    EXPECT_THROW(batch.add_scored(Ids{1}, std::vector<Branch>{{{3}, 2}}), Error);
}

} // namespace
} // namespace selm
