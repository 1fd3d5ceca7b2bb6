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

class OptimizerStage : public ::testing::TestWithParam<int> {
  protected:
    const std::unique_ptr<Communicator> comm = make_single_communicator();
};

TEST_P(OptimizerStage, EqualsTheFormulaWithClippingAndDecay)
{
    const ShardedAdamW::Options options{.stage = GetParam(), .weight_decay = 0.1, .max_grad_norm = 5};
    test::ToyTraining toy(*comm, {.optimizer = options});
    const auto start = test::toy_flat(toy.parameters, toy.layout, 11);
    toy.fill(start);
    std::vector<PlainAdamW> plain(toy.layout.total());
    for (std::size_t i = 0; i < plain.size(); ++i)
        plain[i].w = start[i];
    for (int step = 1; step <= 3; ++step) {
        const auto gradient = test::toy_flat(toy.parameters, toy.layout, static_cast<std::uint32_t>(20 + step));
        double squares = 0;
        for (const float g : gradient)
            squares += static_cast<double>(g) * g;
        const double norm = toy.step(0.01, gradient);
        EXPECT_NEAR(norm, std::sqrt(squares), 1e-9 * norm);
        ASSERT_GT(norm, 5); // so that clipping has work to do
        for (std::size_t i = 0; i < plain.size(); ++i)
            plain[i].step(gradient[i] * 5 / (norm + 1e-6), 0.01, options, step);
    }
    const auto master = toy.master();
    for (std::size_t i = 0; i < plain.size(); ++i)
        // Three steps of 0.01 in fp32: a few units in the last place of values of size 1.
        EXPECT_NEAR(master[i], plain[i].w, 1e-6) << i;
    if (toy.shared) {
        EXPECT_EQ(toy.compute(), master);
    }
    EXPECT_EQ(toy.optimizer.steps_done(), 3);
}

TEST_P(OptimizerStage, PaddingStaysZero)
{
    test::ToyTraining toy(*comm, {.optimizer = {.stage = GetParam(), .weight_decay = 0.1}});
    toy.fill(test::toy_flat(toy.parameters, toy.layout, 11));
    toy.step(0.01, test::toy_flat(toy.parameters, toy.layout, 21));
    const auto master = toy.master();
    for (std::size_t p = 0; p < toy.parameters.size(); ++p) {
        const std::size_t begin = toy.layout.offset(p) + static_cast<std::size_t>(toy.parameters[p].elements());
        const std::size_t end = p + 1 < toy.parameters.size() ? toy.layout.offset(p + 1) : toy.layout.total();
        for (std::size_t i = begin; i < end; ++i)
            EXPECT_EQ(master[i], 0);
    }
}

TEST_P(OptimizerStage, RoundsComputeWeightsButNotTheMaster)
{
    test::ToyTraining toy(*comm, {.optimizer = {.stage = GetParam(), .round_bf16 = true}});
    const auto start = test::toy_flat(toy.parameters, toy.layout, 11);
    toy.fill(start);
    EXPECT_EQ(toy.master()[0], start[0]);
    if (toy.shared) {
        EXPECT_EQ(toy.compute()[0], bf16_to_float(float_to_bf16(start[0])));
    }
    toy.step(0.01, test::toy_flat(toy.parameters, toy.layout, 21));
    EXPECT_NE(toy.master()[0], start[0]);
    if (toy.shared) {
        EXPECT_EQ(toy.compute()[0], bf16_to_float(float_to_bf16(toy.master()[0])));
    }
}

TEST_P(OptimizerStage, FrozenParametersKeepTheirBitsAndHaveNoState)
{
    std::vector<bool> frozen(test::toy_parameters().size(), false);
    frozen[0] = frozen[2] = true;
    const ShardedAdamW::Options adamw{.stage = GetParam(), .weight_decay = 0.1};
    test::ToyTraining all(*comm, {.optimizer = adamw});
    test::ToyTraining toy(*comm,
                          {.optimizer = adamw, .layout = {.group_ends = test::toy_groups(), .frozen = frozen}});
    const auto start = test::toy_flat(toy.parameters, toy.layout, 11);
    const auto gradient = test::toy_flat(toy.parameters, toy.layout, 21);
    all.fill(start);
    toy.fill(start);
    const double norm = toy.step(0.01, gradient);
    all.step(0.01, gradient);
    double squares = 0;
    const auto master = toy.master(), trained = all.master();
    for (std::size_t p = 0; p < toy.parameters.size(); ++p)
        for (std::size_t i = toy.layout.offset(p);
             i < toy.layout.offset(p) + static_cast<std::size_t>(toy.parameters[p].elements()); ++i) {
            ASSERT_EQ(master[i], frozen[p] ? start[i] : trained[i]) << p;
            squares += frozen[p] ? 0 : static_cast<double>(gradient[i]) * gradient[i];
        }
    EXPECT_NEAR(norm, std::sqrt(squares), 1e-9 * norm);
    EXPECT_TRUE(toy.optimizer.exp_avg(0).empty());
    EXPECT_LT(toy.optimizer.bytes(), all.optimizer.bytes());
}

INSTANTIATE_TEST_SUITE_P(Stages, OptimizerStage, ::testing::Values(0, 1, 2, 3));

TEST(ShardedGradient, NormOfANonFiniteGradientIsNotFinite)
{
    const auto comm = make_single_communicator();
    for (const int stage : {0, 1, 2}) {
        test::ToyTraining toy(*comm, {.optimizer = {.stage = stage}});
        auto gradient = test::toy_flat(toy.parameters, toy.layout, 21);
        gradient[100] = std::numeric_limits<float>::quiet_NaN();
        EXPECT_FALSE(std::isfinite(toy.reduce(gradient)));
        gradient[100] = std::numeric_limits<float>::infinity();
        EXPECT_FALSE(std::isfinite(toy.reduce(gradient)));
    }
}

TEST(ShardedGradient, HoldsNoMoreThanPlanned)
{
    for (const int stage : {0, 1, 2, 3})
        for (const DType accumulate : {DType::f32, DType::bf16})
            for (const std::size_t in_flight : {std::size_t{300}, std::size_t{1} << 20}) {
                if (stage == 0 && accumulate == DType::bf16)
                    continue;
                const auto comm = make_dry_run_communicator(1, 3);
                const auto parameters = test::toy_parameters();
                const FlatLayout layout(parameters, 3, {.group_ends = test::toy_groups()});
                const ShardedGradient::Options options{
                    .stage = stage, .accumulate = accumulate, .most_in_flight = in_flight};
                ShardedGradient gradient(parameters, layout, *comm, options);
                gradient.begin_step();
                for (int pass = 0; pass < 3; ++pass) {
                    gradient.begin_pass(pass == 2);
                    gradient.gradient(0); // the tied head
                    for (std::int64_t p = 13; p >= 0; --p) {
                        gradient.gradient(p);
                        gradient.ready(p);
                    }
                    gradient.end_pass();
                }
                gradient.finish();
                const std::int64_t planned = ShardedGradient::planned_peak_bytes(layout, 1, options, true);
                EXPECT_LE(gradient.peak_bytes(), planned) << stage;
                EXPECT_GE(gradient.peak_bytes(), planned * 6 / 10) << stage; // a toy's units are few
            }
}

TEST(ShardedAdamW, StateIsCutEvenlyOverThousandsOfRanks)
{
    const auto parameters = test::toy_parameters();
    for (const int ranks : {8, 512, 4096}) {
        const FlatLayout layout(parameters, ranks, {.group_ends = test::toy_groups()});
        for (const int rank : {0, 1, ranks / 2, ranks - 1}) {
            const auto comm = make_dry_run_communicator(rank, ranks);
            ShardedAdamW optimizer(layout, *comm, {.stage = 3}, nullptr);
            std::size_t held = 0;
            for (std::size_t u = 0; u < layout.units(); ++u) {
                EXPECT_EQ(optimizer.master(u).size(), layout.shard(u, rank).size);
                held += optimizer.master(u).size();
            }
            EXPECT_EQ(optimizer.bytes(), static_cast<std::int64_t>(3 * held * sizeof(float)));
            EXPECT_LE(held, layout.total() / static_cast<std::size_t>(ranks) + 64 * layout.units());
        }
    }
}

} // namespace
} // namespace selm
