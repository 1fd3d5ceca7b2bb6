#pragma once

#include <cstdint>

namespace selm {

/// Log-prob sums of one row: policy (l) and reference (r) for best (c), worst (r) and generated (y) answers.
struct RowLogProbs {
    double policy_best = 0, policy_worst = 0, policy_generated = 0;
    double reference_best = 0, reference_worst = 0, reference_generated = 0;
    bool has_generated = true; ///< false: no generated answer, the optimism term is absent
};

struct SelmLoss {
    double loss = 0;                                 ///< dpo + optimism
    double dpo = 0;                                  ///< -log sigmoid(beta * z)
    double optimism = 0;                             ///< alpha * beta * (policy_generated - reference_generated)
    double d_best = 0, d_worst = 0, d_generated = 0; ///< d loss / d policy log-prob sums
    double reward_best = 0, reward_worst = 0;        ///< beta * (policy - reference)
};

/// Eq. 4.2 of Zhang et al. 2024, "Self-Exploring Language Models" (alpha = 0: DPO, Rafailov et al. 2023, Eq. 7).
/// With alpha = 0 the generated log-probs are not read (they may be NaN).
SelmLoss selm_loss(const RowLogProbs& row, double alpha, double beta);

struct BradleyTerryLoss {
    double loss = 0;
    double d_best = 0, d_worst = 0;
};
/// Eq. 3.2: -log sigmoid(reward_best - reward_worst).
BradleyTerryLoss bradley_terry_loss(double reward_best, double reward_worst);

double log_sigmoid(double x); ///< stable for any finite x

} // namespace selm
