#include "selm/algo/schedule.hpp"

#include <algorithm>
#include <array>
#include <fstream>
#include <numeric>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "selm/base/error.hpp"

namespace selm {
namespace {

// The table is made by tests/oracle/make_schedule_golden.py, which writes its versions of torch and transformers into
// it.
TEST(LearningRate, EqualsTransformersSchedulers)
{
    std::ifstream file(SELM_SOURCE_DIR "/tests/unit/algo/schedule_golden.json");
    const auto golden = nlohmann::json::parse(file);
    ASSERT_EQ(golden["cases"].size(), 15U);
    for (const auto& entry : golden["cases"]) {
        const Schedule schedule = parse_schedule(entry["schedule"].get<std::string>());
        const auto steps = entry["steps"].get<std::int64_t>();
        const auto ratio = entry["warmup_ratio"].get<double>();
        const auto peak = entry["peak"].get<double>();
        EXPECT_EQ(warmup_steps(steps, ratio), entry["warmup_steps"].get<std::int64_t>());
        for (std::int64_t step = 0; step < steps; ++step) {
            const double expected = entry["rates"][static_cast<std::size_t>(step)].get<double>();
            // Both are double; only the order of two multiplications differs.
            EXPECT_NEAR(learning_rate(schedule, peak, step, steps, ratio), expected, 1e-15 * peak)
                << entry["schedule"] << " step " << step << " of " << steps;
        }
    }
}

TEST(LearningRate, PaperIterationsHave59And159StepsWithWarmUp6And16)
{
    EXPECT_EQ(steps_per_epoch(15283, 256), 59);
    EXPECT_EQ(warmup_steps(59, 0.1), 6);
    EXPECT_EQ(steps_per_epoch(20378, 128), 159);
    EXPECT_EQ(warmup_steps(159, 0.1), 16);
    EXPECT_EQ(learning_rate(Schedule::cosine, 5e-7, 0, 59, 0.1), 0);
    EXPECT_EQ(learning_rate(Schedule::cosine, 5e-7, 6, 59, 0.1), 5e-7);
}

TEST(ParseSchedule, RefusesOtherWords)
{
    EXPECT_THROW(parse_schedule("polynomial"), Error);
}

TEST(StepsPerEpoch, AnIncompleteBatchIsDroppedUnlessItIsTheOnlyOne)
{
    EXPECT_EQ(steps_per_epoch(0, 4), 0);
    EXPECT_EQ(steps_per_epoch(3, 4), 1);
    EXPECT_EQ(steps_per_epoch(4, 4), 1);
    EXPECT_EQ(steps_per_epoch(7, 4), 1);
    EXPECT_EQ(steps_per_epoch(8, 4), 2);
}

TEST(PortionRange, ThePaperLeavesTheRemainderUnused)
{
    for (std::int64_t t = 1; t <= 4; ++t) {
        EXPECT_EQ(portion_range(61135, t, 4).begin, (t - 1) * 15283);
        EXPECT_EQ(portion_range(61135, t, 4).end, t * 15283);
    }
    EXPECT_EQ(portion_range(61135, 3, 3).end, 61134);
    EXPECT_EQ(portion_range(2, 3, 3).begin, portion_range(2, 3, 3).end); // fewer rows than portions: all empty
    EXPECT_THROW(portion_range(10, 0, 3), Error);
    EXPECT_THROW(portion_range(10, 4, 3), Error);
    EXPECT_THROW(portion_range(10, 1, 0), Error);
}

TEST(EpochOrder, IsASeededPermutationThatDiffersByEpochAndIteration)
{
    const auto order = epoch_order(500, 42, 1, 0, true);
    auto sorted = order;
    std::sort(sorted.begin(), sorted.end());
    const auto identity = epoch_order(500, 42, 1, 0, false);
    std::vector<std::int64_t> expected(500);
    std::iota(expected.begin(), expected.end(), std::int64_t{0});
    EXPECT_EQ(identity, expected);
    EXPECT_EQ(sorted, expected);
    EXPECT_NE(order, expected);
    EXPECT_EQ(order, epoch_order(500, 42, 1, 0, true));
    EXPECT_NE(order, epoch_order(500, 42, 1, 1, true));
    EXPECT_NE(order, epoch_order(500, 42, 2, 0, true));
    EXPECT_NE(order, epoch_order(500, 43, 1, 0, true));
    EXPECT_TRUE(epoch_order(0, 42, 1, 0, true).empty());
}

TEST(EpochOrder, EveryPositionIsReachedAboutEquallyOften)
{
    // 6 permutations of 3 rows over 6000 seeds: mean 1000, standard deviation 29; five of them are allowed.
    std::array<int, 6> counts{};
    for (std::uint64_t seed = 0; seed < 6000; ++seed) {
        const auto order = epoch_order(3, seed, 0, 0, true);
        ++counts[static_cast<std::size_t>(order[0] * 2 + (order[1] > order[2] ? 1 : 0))];
    }
    for (const int count : counts)
        EXPECT_NEAR(count, 1000, 145);
}

} // namespace
} // namespace selm
