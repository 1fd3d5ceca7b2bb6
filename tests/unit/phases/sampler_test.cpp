#include "selm/phases/sampler.hpp"

#include <cmath>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "selm/base/error.hpp"

namespace selm {
namespace {

std::vector<float> logits_of(const std::vector<double>& probabilities)
{
    std::vector<float> logits;
    for (const double p : probabilities)
        logits.push_back(static_cast<float>(std::log(p)) + 3.0F); // softmax does not see the shift
    return logits;
}

std::vector<double> frequencies(const SamplingOptions& options, const std::vector<float>& logits, int draws)
{
    Sampler sampler(options, static_cast<std::int64_t>(logits.size()));
    RandomStream stream(8, 1, 2, 3);
    std::vector<double> counts(logits.size(), 0);
    for (int i = 0; i < draws; ++i)
        counts[static_cast<std::size_t>(sampler.sample(logits, stream).id)] += 1;
    for (double& count : counts)
        count /= draws;
    return counts;
}

/// Pearson's statistic; ids of probability 0 must never come.
double chi_square(const std::vector<double>& observed, const std::vector<double>& expected, int draws)
{
    double sum = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
        if (expected[i] == 0) {
            EXPECT_EQ(observed[i], 0) << "id " << i;
            continue;
        }
        const double difference = (observed[i] - expected[i]) * draws;
        sum += difference * difference / (expected[i] * draws);
    }
    return sum;
}

constexpr int draws = 100'000;
constexpr double chi_square_bound =
    20; // of at most 5 degrees of freedom: exceeded once in 800 seeds, and the seed is fixed

TEST(Sampler, GreedyTakesTheLowestIdOfTheLargestLogits)
{
    Sampler sampler({}, 6);
    RandomStream stream(1, 1, 1, 1);
    EXPECT_EQ(sampler.sample(std::vector<float>{0, 2, -1, 2, 1, 2}, stream).id, 1);
    EXPECT_EQ(sampler.sample(std::vector<float>{5, 5, 5, 5, 5, 5}, stream).id, 0);
    EXPECT_EQ(sampler.sample(std::vector<float>{-9, -8, -7, -6, -5, -4}, stream).id, 5);
}

TEST(Sampler, LogProbsAreThoseOfTheUnscaledDistribution)
{
    RandomStream random(11, 3, 0, 0);
    for (const std::size_t vocabulary : {1U, 7U, 255U, 256U, 257U, 5000U}) {
        std::vector<float> logits(vocabulary);
        for (float& logit : logits)
            logit = static_cast<float>(8 * random.next_normal());
        long double sum = 0;
        for (const float logit : logits)
            sum += std::exp(static_cast<long double>(logit));
        for (const double temperature : {0.0, 0.3, 2.0}) {
            Sampler sampler({.temperature = temperature, .top_p = 0.9, .top_k = 5},
                            static_cast<std::int64_t>(vocabulary));
            const SampledToken token = sampler.sample(logits, random);
            const auto expected = static_cast<long double>(logits[static_cast<std::size_t>(token.id)]) - std::log(sum);
            EXPECT_NEAR(token.log_prob, static_cast<double>(expected), 4e-6 * std::max(1.0L, std::abs(expected)))
                << vocabulary;
        }
        EXPECT_NEAR(log_sum_exp(logits), static_cast<double>(std::log(sum)), 1e-6);
    }
}

TEST(Sampler, TemperatureRaisesProbabilitiesToItsInverse)
{
    const std::vector<double> p{0.5, 0.2, 0.15, 0.1, 0.05};
    for (const double temperature : {0.5, 1.0, 2.0}) {
        std::vector<double> expected;
        double total = 0;
        for (const double value : p)
            total += std::pow(value, 1 / temperature);
        for (const double value : p)
            expected.push_back(std::pow(value, 1 / temperature) / total);
        const auto observed = frequencies({.temperature = temperature}, logits_of(p), draws);
        EXPECT_LT(chi_square(observed, expected, draws), chi_square_bound) << "temperature " << temperature;
    }
}

TEST(Sampler, TopKKeepsExactlyKLowestIdsFirstOnTies)
{
    const std::vector<double> p{0.1, 0.3, 0.2, 0.2, 0.2};
    const auto observed = frequencies({.temperature = 1, .top_k = 3}, logits_of(p), draws);
    EXPECT_LT(chi_square(observed, {0, 3.0 / 7, 2.0 / 7, 2.0 / 7, 0}, draws), chi_square_bound);
    EXPECT_EQ(frequencies({.temperature = 1, .top_k = 1}, logits_of(p), 100)[1], 1);
    EXPECT_LT(chi_square(frequencies({.temperature = 1, .top_k = 99}, logits_of(p), draws), p, draws),
              chi_square_bound);
}

TEST(Sampler, TopPKeepsTheSmallestSetThatHoldsTheMass)
{
    const std::vector<double> p{0.1, 0.4, 0.2, 0.3};
    const auto observed = [&](double top_p) {
        return frequencies({.temperature = 1, .top_p = top_p}, logits_of(p), draws);
    };
    EXPECT_LT(chi_square(observed(0.69), {0, 4.0 / 7, 0, 3.0 / 7}, draws), chi_square_bound);
    EXPECT_LT(chi_square(observed(0.71), {0, 4.0 / 9, 2.0 / 9, 3.0 / 9}, draws), chi_square_bound);
    EXPECT_EQ(observed(0.001)[1], 1);
    EXPECT_LT(chi_square(observed(1), p, draws), chi_square_bound);
}

TEST(Sampler, TopPCountsTheMassAfterTopK)
{
    const std::vector<double> p{0.4, 0.3, 0.2, 0.1}; // the best three: 4/9, 3/9, 2/9; two of them hold 7/9
    const auto both = frequencies({.temperature = 1, .top_p = 0.75, .top_k = 3}, logits_of(p), draws);
    EXPECT_LT(chi_square(both, {4.0 / 7, 3.0 / 7, 0, 0}, draws), chi_square_bound);
    const auto mass_alone = frequencies({.temperature = 1, .top_p = 0.75}, logits_of(p), draws);
    EXPECT_LT(chi_square(mass_alone, {4.0 / 9, 3.0 / 9, 2.0 / 9, 0}, draws), chi_square_bound);
}

TEST(Sampler, IdsWithoutATokenCountInTheLogProbButAreNotChosen)
{
    const std::vector<float> logits{0, 1, 5, 9};
    RandomStream stream(1, 1, 1, 1);
    for (const double temperature : {0.0, 50.0}) {
        Sampler sampler({.temperature = temperature}, 2);
        for (int i = 0; i < 50; ++i) {
            const SampledToken token = sampler.sample(logits, stream);
            ASSERT_LT(token.id, 2);
            const double sum = 1 + std::exp(1.0) + std::exp(5.0) + std::exp(9.0);
            EXPECT_NEAR(token.log_prob, logits[static_cast<std::size_t>(token.id)] - std::log(sum), 1e-5);
        }
    }
}

TEST(Sampler, AStreamGivesTheSameTokensAgain)
{
    const auto logits = logits_of({0.25, 0.25, 0.25, 0.25});
    Sampler sampler({.temperature = 1}, 4);
    RandomStream a(5, 1, 2, 3), b(5, 1, 2, 3), other_row(5, 1, 2, 4);
    int equal = 0;
    for (int i = 0; i < 200; ++i) {
        const std::int32_t id = sampler.sample(logits, a).id;
        EXPECT_EQ(sampler.sample(logits, b).id, id);
        equal += sampler.sample(logits, other_row).id == id;
    }
    EXPECT_LT(equal, 90); // 50 expected
}

TEST(Sampler, RefusesLogitsThatAreNotFinite)
{
    RandomStream stream(1, 1, 1, 1);
    Sampler sampler({}, 3);
    const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
    EXPECT_THROW(sampler.sample(std::vector<float>{1, nan, 2}, stream), Error);
    EXPECT_THROW(sampler.sample(std::vector<float>{nan, 1, 2}, stream), Error);
    EXPECT_THROW(sampler.sample(std::vector<float>{1, infinity, 2}, stream), Error);
    EXPECT_THROW(sampler.sample(std::vector<float>{nan, nan, nan}, stream), Error);
    EXPECT_THROW(sampler.sample(std::vector<float>{-infinity, -infinity, -infinity}, stream), Error);
}

} // namespace
} // namespace selm
