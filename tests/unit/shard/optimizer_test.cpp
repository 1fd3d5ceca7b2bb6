#include "selm/shard/optimizer.hpp"

#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include "selm/kernels/engine.hpp"
#include "shard_test_support.hpp"

namespace selm {
namespace {

/// torch.optim.AdamW's formula in double, one element.
struct PlainAdamW {
    double w = 0, m = 0, v = 0;
    void step(double g, double rate, const ShardedAdamW::Options& o, int count)
    {
        w *= 1 - rate * o.weight_decay;
        m = o.beta1 * m + (1 - o.beta1) * g;
        v = o.beta2 * v + (1 - o.beta2) * g * g;
        w -= rate / (1 - std::pow(o.beta1, count)) * m /
             (std::sqrt(v) / std::sqrt(1 - std::pow(o.beta2, count)) + o.epsilon);
    }
};

class OptimizerStage : public ::testing::TestWithParam<int> {};

TEST_P(OptimizerStage, EqualsTheFormulaWithClippingAndDecay)
{
    const auto parameters = test::toy_parameters();
    const FlatLayout layout(parameters, 1);
    const auto comm = make_single_communicator();
    const ShardedAdamW::Options options{.stage = GetParam(), .weight_decay = 0.1, .max_grad_norm = 5};
    ShardedAdamW optimizer(layout, *comm, options);
    const auto start = test::toy_flat(parameters, layout, 11);
    test::fill_state(optimizer, start);
    std::vector<float> compute(layout.total());
    std::vector<PlainAdamW> plain(layout.total());
    for (std::size_t i = 0; i < plain.size(); ++i)
        plain[i].w = start[i];
    for (int step = 1; step <= 3; ++step) {
        const auto gradient = test::toy_flat(parameters, layout, static_cast<std::uint32_t>(20 + step));
        double squares = 0;
        for (const float g : gradient)
            squares += static_cast<double>(g) * g;
        const double norm = optimizer.reduce(gradient);
        EXPECT_NEAR(norm, std::sqrt(squares), 1e-9 * norm);
        ASSERT_GT(norm, 5); // so that clipping has work to do
        optimizer.apply(0.01, compute);
        for (std::size_t i = 0; i < plain.size(); ++i)
            plain[i].step(gradient[i] * 5 / (norm + 1e-6), 0.01, options, step);
    }
    for (std::size_t i = 0; i < plain.size(); ++i) {
        // Three steps of 0.01 in fp32: a few units in the last place of values of size 1.
        EXPECT_NEAR(compute[i], plain[i].w, 1e-6) << i;
        EXPECT_EQ(compute[i], optimizer.master()[i]);
    }
    EXPECT_EQ(optimizer.steps_done(), 3);
}

TEST_P(OptimizerStage, PaddingStaysZero)
{
    const auto parameters = test::toy_parameters();
    const FlatLayout layout(parameters, 1);
    const auto comm = make_single_communicator();
    ShardedAdamW optimizer(layout, *comm, {.stage = GetParam(), .weight_decay = 0.1});
    test::fill_state(optimizer, test::toy_flat(parameters, layout, 11));
    std::vector<float> compute(layout.total());
    optimizer.reduce(test::toy_flat(parameters, layout, 21));
    optimizer.apply(0.01, compute);
    for (std::size_t p = 0; p < parameters.size(); ++p) {
        const std::size_t begin = layout.offset(p) + static_cast<std::size_t>(parameters[p].elements());
        const std::size_t end = p + 1 < parameters.size() ? layout.offset(p + 1) : layout.total();
        for (std::size_t i = begin; i < end; ++i)
            EXPECT_EQ(compute[i], 0);
    }
}

TEST_P(OptimizerStage, RoundsComputeWeightsButNotTheMaster)
{
    const auto parameters = test::toy_parameters();
    const FlatLayout layout(parameters, 1);
    const auto comm = make_single_communicator();
    ShardedAdamW optimizer(layout, *comm, {.stage = GetParam(), .round_bf16 = true});
    const auto start = test::toy_flat(parameters, layout, 11);
    test::fill_state(optimizer, start);
    std::vector<float> compute(layout.total());
    optimizer.publish(compute);
    EXPECT_EQ(compute[0], bf16_to_float(float_to_bf16(start[0])));
    EXPECT_EQ(optimizer.master()[0], start[0]);
    optimizer.reduce(test::toy_flat(parameters, layout, 21));
    optimizer.apply(0.01, compute);
    EXPECT_NE(optimizer.master()[0], start[0]);
    EXPECT_EQ(compute[0], bf16_to_float(float_to_bf16(optimizer.master()[0])));
}

INSTANTIATE_TEST_SUITE_P(Stages, OptimizerStage, ::testing::Values(0, 1));

TEST(ShardedAdamW, NormOfANonFiniteGradientIsNotFinite)
{
    const auto parameters = test::toy_parameters();
    const FlatLayout layout(parameters, 1);
    const auto comm = make_single_communicator();
    ShardedAdamW optimizer(layout, *comm, {});
    auto gradient = test::toy_flat(parameters, layout, 21);
    gradient[100] = std::numeric_limits<float>::quiet_NaN();
    EXPECT_FALSE(std::isfinite(optimizer.reduce(gradient)));
    gradient[100] = std::numeric_limits<float>::infinity();
    EXPECT_FALSE(std::isfinite(optimizer.reduce(gradient)));
}

TEST(ShardedAdamW, StateIsCutEvenlyOverThousandsOfRanks)
{
    const auto parameters = test::toy_parameters();
    for (const int ranks : {8, 512, 4096}) {
        const FlatLayout layout(parameters, ranks);
        std::size_t total = 0;
        for (const int rank : {0, 1, ranks / 2, ranks - 1}) {
            const auto comm = make_dry_run_communicator(rank, ranks);
            ShardedAdamW optimizer(layout, *comm, {});
            EXPECT_EQ(optimizer.state_shard().size, layout.shard(rank).size);
            EXPECT_EQ(optimizer.master().size(), layout.shard(rank).size);
            EXPECT_LE(optimizer.state_shard().size, layout.total() / static_cast<std::size_t>(ranks) + 64);
            total += optimizer.master().size();
        }
        EXPECT_GT(total, 0U);
    }
}

} // namespace
} // namespace selm
