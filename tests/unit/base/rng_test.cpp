#include "selm/base/rng.hpp"

#include <cmath>
#include <set>
#include <vector>

#include <gtest/gtest.h>

namespace selm {
namespace {

using Block = std::array<std::uint32_t, 4>;

// Known answers of the Random123 distribution (tests/kat_vectors, philox4x32 with 10 rounds).
TEST(Philox, EqualsThePublishedKnownAnswers)
{
    EXPECT_EQ(philox4x32_10({0, 0, 0, 0}, {0, 0}), (Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
    EXPECT_EQ(philox4x32_10({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
              (Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
    EXPECT_EQ(philox4x32_10({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
              (Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(RandomStream, IsAFunctionOfItsIdsAlone)
{
    RandomStream first(7, 1, 2, 3);
    RandomStream again(7, 1, 2, 3);
    for (int draw = 0; draw < 20; ++draw)
        EXPECT_EQ(first.next_u32(), again.next_u32());
}

TEST(RandomStream, EveryIdSeparatesStreams)
{
    std::set<std::uint64_t> firsts;
    const std::uint64_t high = std::uint64_t{1} << 32; // differences above 32 bits count too
    for (const std::uint64_t seed : {std::uint64_t{0}, std::uint64_t{1}, high})
        for (const std::uint32_t purpose : {1U, 2U, 3U})
            for (const std::uint64_t iteration : {std::uint64_t{0}, std::uint64_t{1}, high})
                for (const std::uint64_t row : {std::uint64_t{0}, std::uint64_t{1}, high})
                    firsts.insert(RandomStream(seed, purpose, iteration, row).next_u64());
    EXPECT_EQ(firsts.size(), 3U * 3U * 3U * 3U);
}

TEST(RandomStream, DoublesAreUniform)
{
    RandomStream stream(42, 1, 0, 0);
    std::vector<int> bins(10, 0);
    double sum = 0;
    constexpr int draws = 100000;
    for (int draw = 0; draw < draws; ++draw) {
        const double value = stream.next_double();
        ASSERT_GE(value, 0.0);
        ASSERT_LT(value, 1.0);
        sum += value;
        ++bins[static_cast<std::size_t>(value * 10)];
    }
    EXPECT_NEAR(sum / draws, 0.5, 5 * std::sqrt(1.0 / 12 / draws)); // 5 standard errors
    for (const int count : bins)
        EXPECT_NEAR(count, draws / 10, 5 * std::sqrt(draws * 0.1 * 0.9));
}

TEST(RandomStream, NormalsHaveMeanZeroAndVarianceOne)
{
    RandomStream stream(42, 3, 0, 0);
    constexpr int draws = 100000;
    double sum = 0;
    double squares = 0;
    double fourth = 0;
    for (int draw = 0; draw < draws; ++draw) {
        const double value = stream.next_normal();
        sum += value;
        squares += value * value;
        fourth += value * value * value * value;
    }
    EXPECT_NEAR(sum / draws, 0, 5 / std::sqrt(draws));
    EXPECT_NEAR(squares / draws, 1, 5 * std::sqrt(2.0 / draws));
    EXPECT_NEAR(fourth / draws, 3, 5 * std::sqrt(96.0 / draws));
}

TEST(RandomStream, BoundedDrawsCoverTheRangeEvenly)
{
    RandomStream stream(1, 2, 0, 0);
    std::vector<int> counts(7, 0);
    constexpr int draws = 70000;
    for (int draw = 0; draw < draws; ++draw)
        ++counts.at(stream.next_below(7));
    for (const int count : counts)
        EXPECT_NEAR(count, draws / 7, 5 * std::sqrt(draws * (1.0 / 7) * (6.0 / 7)));
    EXPECT_EQ(stream.next_below(1), 0U);
    // A bound near 2^64 (half of the draws are rejected by a biased method's threshold) stays inside.
    const std::uint64_t bound = (std::uint64_t{1} << 63) + 1;
    for (int draw = 0; draw < 1000; ++draw)
        EXPECT_LT(stream.next_below(bound), bound);
}

} // namespace
} // namespace selm
