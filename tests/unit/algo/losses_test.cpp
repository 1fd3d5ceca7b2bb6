#include "selm/algo/losses.hpp"

#include <cmath>
#include <functional>
#include <limits>
#include <numbers>

#include <gtest/gtest.h>

namespace selm {
namespace {

constexpr double nan_value = std::numeric_limits<double>::quiet_NaN();

RowLogProbs some_row()
{
    return {.policy_best = -41.5,
            .policy_worst = -63.25,
            .policy_generated = -50.125,
            .reference_best = -40.0,
            .reference_worst = -60.0,
            .reference_generated = -52.0,
            .has_generated = true};
}

TEST(SelmLoss, BetaZeroGivesLogTwoAndNoGradient)
{
    const SelmLoss loss = selm_loss(some_row(), 0.5, 0);
    EXPECT_DOUBLE_EQ(loss.loss, std::numbers::ln2);
    EXPECT_DOUBLE_EQ(loss.optimism, 0);
    EXPECT_DOUBLE_EQ(loss.d_best, 0);
    EXPECT_DOUBLE_EQ(loss.d_worst, 0);
    EXPECT_DOUBLE_EQ(loss.d_generated, 0);
}

TEST(SelmLoss, PolicyEqualToReferenceGivesLogTwo)
{
    RowLogProbs row = some_row();
    row.policy_best = row.reference_best;
    row.policy_worst = row.reference_worst;
    row.policy_generated = row.reference_generated;
    const SelmLoss loss = selm_loss(row, 0.001, 0.01);
    EXPECT_EQ(loss.loss, std::log(2.0)); // exactly: the first loss of an iteration
    EXPECT_DOUBLE_EQ(loss.d_best, -0.005);
    EXPECT_DOUBLE_EQ(loss.d_worst, 0.005);
    EXPECT_DOUBLE_EQ(loss.d_generated, 1e-5);
}

TEST(SelmLoss, ClosedForm)
{
    // z = (-41.5 + 40) - (-63.25 + 60) = 1.75; beta z = 0.875; optimism = 0.2 * 0.5 * 1.875
    const SelmLoss loss = selm_loss(some_row(), 0.2, 0.5);
    EXPECT_NEAR(loss.dpo, std::log(1 + std::exp(-0.875)), 1e-15);
    EXPECT_NEAR(loss.optimism, 0.1875, 1e-15);
    EXPECT_NEAR(loss.loss, loss.dpo + 0.1875, 1e-15);
    EXPECT_DOUBLE_EQ(loss.reward_best, -0.75);
    EXPECT_DOUBLE_EQ(loss.reward_worst, -1.625);
    EXPECT_NEAR(loss.d_best, -0.5 / (1 + std::exp(0.875)), 1e-15);
}

TEST(SelmLoss, AlphaZeroIsDpoAndDoesNotReadTheGeneratedAnswer)
{
    RowLogProbs row = some_row();
    row.policy_generated = nan_value;
    row.reference_generated = nan_value;
    const SelmLoss loss = selm_loss(row, 0, 0.1);
    EXPECT_NEAR(loss.loss, std::log(1 + std::exp(-0.175)), 1e-15);
    EXPECT_EQ(loss.optimism, 0);
    EXPECT_EQ(loss.d_generated, 0);
}

TEST(SelmLoss, WithoutGeneratedAnswerTheOptimismTermIsAbsent)
{
    RowLogProbs row = some_row();
    row.policy_generated = nan_value;
    row.has_generated = false;
    const SelmLoss loss = selm_loss(row, 0.3, 0.1);
    EXPECT_EQ(loss.loss, loss.dpo);
    EXPECT_EQ(loss.d_generated, 0);
}

TEST(SelmLoss, NanOfAReadLogProbIsNotHidden)
{
    for (double RowLogProbs::*field : {&RowLogProbs::policy_best, &RowLogProbs::policy_worst,
                                       &RowLogProbs::reference_best, &RowLogProbs::policy_generated}) {
        RowLogProbs row = some_row();
        row.*field = nan_value;
        EXPECT_TRUE(std::isnan(selm_loss(row, 0.1, 0.1).loss));
    }
}

TEST(SelmLoss, ExtremeMarginsAreStable)
{
    RowLogProbs row;
    row.policy_best = -1e6;
    SelmLoss loss = selm_loss(row, 0, 1);
    EXPECT_DOUBLE_EQ(loss.loss, 1e6);
    EXPECT_DOUBLE_EQ(loss.d_best, -1);
    row.policy_best = 1e6;
    loss = selm_loss(row, 0, 1);
    EXPECT_DOUBLE_EQ(loss.loss, 0);
    EXPECT_DOUBLE_EQ(loss.d_best, 0);
    EXPECT_NEAR(log_sigmoid(-40), -40 - std::exp(-40), 1e-12);
    EXPECT_NEAR(log_sigmoid(40), -std::exp(-40), 1e-30);
    EXPECT_TRUE(std::isnan(log_sigmoid(nan_value)));
}

TEST(SelmLoss, DerivativesEqualFiniteDifferences)
{
    const double alpha = 0.7;
    const double beta = 0.3;
    const auto slope = [&](double RowLogProbs::*field) {
        const double h = 1e-5;
        RowLogProbs up = some_row();
        RowLogProbs down = some_row();
        up.*field += h;
        down.*field -= h;
        return (selm_loss(up, alpha, beta).loss - selm_loss(down, alpha, beta).loss) / (2 * h);
    };
    const SelmLoss loss = selm_loss(some_row(), alpha, beta);
    // The central difference errs by h^2 and by rounding, eps / h: 1e-10 of each.
    EXPECT_NEAR(loss.d_best, slope(&RowLogProbs::policy_best), 1e-9);
    EXPECT_NEAR(loss.d_worst, slope(&RowLogProbs::policy_worst), 1e-9);
    EXPECT_NEAR(loss.d_generated, slope(&RowLogProbs::policy_generated), 1e-9);
}

TEST(BradleyTerryLoss, ClosedFormAndDerivatives)
{
    EXPECT_DOUBLE_EQ(bradley_terry_loss(1.5, 1.5).loss, std::numbers::ln2);
    const BradleyTerryLoss loss = bradley_terry_loss(0.25, -1.0);
    EXPECT_NEAR(loss.loss, std::log(1 + std::exp(-1.25)), 1e-15);
    const double h = 1e-5;
    EXPECT_NEAR(loss.d_best, (bradley_terry_loss(0.25 + h, -1).loss - bradley_terry_loss(0.25 - h, -1).loss) / (2 * h),
                1e-9);
    EXPECT_DOUBLE_EQ(loss.d_worst, -loss.d_best);
    EXPECT_DOUBLE_EQ(bradley_terry_loss(-1e5, 1e5).loss, 2e5);
}

} // namespace
} // namespace selm
