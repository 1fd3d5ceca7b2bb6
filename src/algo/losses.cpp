#include "selm/algo/losses.hpp"

#include <algorithm>
#include <cmath>

namespace selm {

namespace {

/// 1 / (1 + exp(-x)) without overflow.
double sigmoid(double x)
{
    if (x >= 0)
        return 1 / (1 + std::exp(-x));
    const double e = std::exp(x);
    return e / (1 + e);
}

} // namespace

double log_sigmoid(double x)
{
    return std::min(x, 0.0) - std::log1p(std::exp(-std::fabs(x)));
}

SelmLoss selm_loss(const RowLogProbs& row, double alpha, double beta)
{
    SelmLoss out;
    out.reward_best = beta * (row.policy_best - row.reference_best);
    out.reward_worst = beta * (row.policy_worst - row.reference_worst);
    const double margin = out.reward_best - out.reward_worst;
    out.dpo = -log_sigmoid(margin);
    out.d_best = -beta * sigmoid(-margin);
    out.d_worst = -out.d_best;
    if (row.has_generated && alpha != 0) {
        out.optimism = alpha * beta * (row.policy_generated - row.reference_generated);
        out.d_generated = alpha * beta;
    }
    out.loss = out.dpo + out.optimism;
    return out;
}

BradleyTerryLoss bradley_terry_loss(double reward_best, double reward_worst)
{
    const double margin = reward_best - reward_worst;
    const double slope = sigmoid(-margin);
    return {-log_sigmoid(margin), -slope, slope};
}

} // namespace selm
