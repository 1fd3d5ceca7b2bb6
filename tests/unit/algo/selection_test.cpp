#include "selm/algo/selection.hpp"

#include <limits>

#include <gtest/gtest.h>

#include "selm/base/error.hpp"

namespace selm {
namespace {

constexpr double none = std::numeric_limits<double>::quiet_NaN();
using Scores = std::array<double, 3>;

void expect_pair(const Scores& scores, UpdateRule rule, int best, int worst)
{
    const PairChoice pair = choose_pair(scores, rule);
    EXPECT_EQ(pair.best, best) << scores[0] << " " << scores[1] << " " << scores[2];
    EXPECT_EQ(pair.worst, worst) << scores[0] << " " << scores[1] << " " << scores[2];
}

TEST(ChoosePair, BestWorstTakesExtremesAndTheFirstIndexOnTies)
{
    expect_pair({0.5, 2, -1}, UpdateRule::best_worst, 1, 2);
    expect_pair({3, 2, -1}, UpdateRule::best_worst, 0, 2);
    expect_pair({-3, -2, -1}, UpdateRule::best_worst, 2, 0);
    expect_pair({2, 2, 1}, UpdateRule::best_worst, 0, 2);
    expect_pair({2, 1, 1}, UpdateRule::best_worst, 0, 1); // ranks 1, 2, 2: the original chosen becomes the worst
    expect_pair({1, 1, 1}, UpdateRule::best_worst, 0, 0);
}

TEST(ChoosePair, AnAnswerThatDoesNotExistIsNeverPicked)
{
    expect_pair({none, 1, 2}, UpdateRule::best_worst, 2, 1);
    expect_pair({none, 1, 1}, UpdateRule::best_worst, 1, 1);
    expect_pair({4, none, none}, UpdateRule::best_worst, 0, 0);
    EXPECT_THROW(choose_pair({none, none, none}, UpdateRule::best_worst), Error);
}

TEST(ChoosePair, ReplaceComparesGeneratedWithChosenOnly)
{
    expect_pair({2, 1, 5}, UpdateRule::replace, 0, 2);
    expect_pair({1, 2, 5}, UpdateRule::replace, 1, 0);
    expect_pair({2, 2, 5}, UpdateRule::replace, 1, 0);
    expect_pair({none, 2, 5}, UpdateRule::replace, 1, 2);
    EXPECT_THROW(choose_pair({1, none, 5}, UpdateRule::replace), Error);
}

TEST(ChoosePair, OfflineNeedsNoScores)
{
    expect_pair({none, none, none}, UpdateRule::offline, 1, 2);
    expect_pair({9, 1, 5}, UpdateRule::offline, 1, 2);
}

TEST(RanksOf, TiesShareTheBetterRankAndAbsentAnswersHaveNone)
{
    EXPECT_EQ(ranks_of({1, 3, 2}), (std::array<std::int32_t, 3>{3, 1, 2}));
    EXPECT_EQ(ranks_of({2, 1, 1}), (std::array<std::int32_t, 3>{1, 2, 2}));
    EXPECT_EQ(ranks_of({1, 1, 1}), (std::array<std::int32_t, 3>{1, 1, 1}));
    EXPECT_EQ(ranks_of({none, 1, 2}), (std::array<std::int32_t, 3>{0, 2, 1}));
}

TEST(ParseUpdateRule, KnowsThreeWords)
{
    EXPECT_EQ(parse_update_rule("best-worst"), UpdateRule::best_worst);
    EXPECT_EQ(parse_update_rule("replace"), UpdateRule::replace);
    EXPECT_EQ(parse_update_rule("offline"), UpdateRule::offline);
    EXPECT_THROW(parse_update_rule("best_worst"), Error);
}

} // namespace
} // namespace selm
