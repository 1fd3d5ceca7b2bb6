#include "engine_test_support.hpp"

namespace selm {
namespace {

struct Shape {
    std::int64_t rows, vocabulary, hidden;
};
const std::vector<Shape> shapes = {{1, 1, 1},      {1, 99, 33},   {3, 99, 33},   {8, 64, 16},   {127, 99, 33},
                                   {129, 100, 32}, {300, 99, 16}, {5, 3001, 64}, {2, 1000, 576},
                                   {1041, 301, 17}};

/// Hidden states and weights that give logits of a few units, as a model's do.
struct Problem {
    Matrix h, w;
    std::vector<std::int32_t> targets;
    std::vector<float> g;
    std::vector<double> g_double;

    Problem(const Shape& s, const std::function<Matrix(Matrix)>& operand, double logit_size = 2)
        : h(operand(random_matrix(s.rows, s.hidden, 1))),
          w(operand(random_matrix(s.vocabulary, s.hidden, 2, logit_size / std::sqrt(static_cast<double>(s.hidden))))),
          targets(random_tokens(static_cast<std::size_t>(s.rows), static_cast<std::int32_t>(s.vocabulary), 3))
    {
        for (const double value : random_matrix(1, s.rows, 4).values) {
            g.push_back(static_cast<float>(value));
            g_double.push_back(value);
        }
    }
};

/// What f32 logits may be off by: 8 u of the largest sum of magnitudes (u = 2^-24; three times the largest error seen).
double logit_error(const Problem& p)
{
    const Matrix sums =
        reference::product(reference::magnitudes(p.h), reference::transposed(reference::magnitudes(p.w)));
    return 8.0 / (1 << 24) * largest_magnitude(sums);
}

class HeadTest : public EngineTest {
  protected:
    struct Result {
        std::vector<float> log_probs, lse;
    };
    Result log_probs(const Problem& p, std::int64_t extra_stride = 0)
    {
        Result out{std::vector<float>(p.targets.size()), std::vector<float>(p.targets.size())};
        engine().head_log_probs(tensor(p.h, extra_stride), packed(p.w), p.targets, out.log_probs, out.lse);
        return out;
    }
};

std::string text(const Shape& s) { return cat("rows ", s.rows, " vocabulary ", s.vocabulary, " hidden ", s.hidden); }

TEST_P(HeadTest, logits_are_products)
{
    for (const Shape& s : shapes) {
        const Problem p(s, operand);
        const Tensor logits = output(s.rows, s.vocabulary, 2);
        engine().logits(tensor(p.h, 1), packed(p.w), logits);
        expect_product(values(logits), p.h, reference::transposed(p.w), nullptr, text(s));
    }
}

TEST_P(HeadTest, log_probs_as_defined)
{
    for (const Shape& s : shapes) {
        const Problem p(s, operand);
        const reference::HeadScores expected = reference::head_log_probs(p.h, p.w, p.targets);
        const Result result = log_probs(p, 3);
        // A log-prob is a difference of logits (the log-sum-exp is a mean of them, with a log good to a few u).
        const double tolerance = 2 * logit_error(p) + 2e-6;
        expect_close(as_row(std::span<const float>(result.log_probs)),
                     as_row(std::span<const double>(expected.log_probs)), tolerance, text(s) + ", log-probs");
        expect_close(as_row(std::span<const float>(result.lse)), as_row(std::span<const double>(expected.lse)),
                     tolerance, text(s) + ", lse");
        for (const float log_prob : result.log_probs)
            EXPECT_LE(log_prob, 0);
    }
}

// Near-certain and near-impossible targets, logits of hundreds: nothing overflows, and a log-prob near 0 keeps its
// digits.
TEST_P(HeadTest, extreme_logits_are_finite)
{
    Problem p({6, 99, 33}, operand, 200);
    const Matrix logits = reference::product(p.h, reference::transposed(p.w));
    for (std::int64_t r = 0; r < 6; r += 2) {
        std::int32_t best = 0;
        for (std::int32_t v = 1; v < 99; ++v)
            if (logits(r, v) > logits(r, best))
                best = v;
        p.targets[static_cast<std::size_t>(r)] = best;
    }
    const reference::HeadScores expected = reference::head_log_probs(p.h, p.w, p.targets);
    const Result result = log_probs(p);
    for (std::size_t r = 0; r < 6; ++r) {
        EXPECT_NEAR(static_cast<double>(result.log_probs[r]), expected.log_probs[r],
                    5e-4 + 1e-6 * std::abs(expected.log_probs[r]));
        EXPECT_LE(result.log_probs[r], 0);
    }
}

TEST_P(HeadTest, backward_as_defined)
{
    for (const Shape& s : shapes) {
        const Problem p(s, operand);
        const reference::HeadGradient expected = reference::head_log_probs_backward(p.h, p.w, p.targets, p.g_double);
        const Result forward = log_probs(p);
        const Matrix before = random_matrix(s.vocabulary, s.hidden, 5);
        const Tensor dh = output(s.rows, s.hidden, 1), dw = tensor(before);
        engine().head_log_probs_backward(tensor(p.h, 3), packed(p.w), p.targets, forward.lse, p.g, dh, dw);
        Matrix expected_dw = expected.dw;
        for (std::size_t i = 0; i < before.values.size(); ++i)
            expected_dw.values[i] += before.values[i];
        // Softmax weights are off by the logits' error, relatively; dh sums them over w, dw over the rows.
        // Operands of bf16 products: logit gradients are rounded, in sums the roundings partly cancel.
        const double relative = 2 * logit_error(p) + 2e-6 + operand_error();
        expect_close(values(dh), expected.dh, relative * std::max(1.0, largest_magnitude(expected.dh)),
                     text(s) + ", dh");
        expect_close(values(dw), expected_dw, relative * std::max(1.0, largest_magnitude(expected_dw)),
                     text(s) + ", dw");
        const Tensor alone = output(s.rows, s.hidden, 1);
        engine().head_log_probs_backward(tensor(p.h, 3), packed(p.w), p.targets, forward.lse, p.g, alone, {});
        EXPECT_EQ(values(alone).values, values(dh).values) << text(s) << ", without dw";
    }
}

// Where p is nearly 1, the gradient 1 - p is small: good to the rounding of the log-sum-exp (8 * 2^-24), not of 1.
TEST_P(HeadTest, gradient_of_a_likely_target)
{
    Matrix h(1, 1), w(2, 1);
    h(0, 0) = 1;
    w(0, 0) = 8;
    const double other = std::exp(-8.0) / (1 + std::exp(-8.0)); // 3.4e-4
    const std::vector<std::int32_t> target = {0};
    const std::vector<float> g = {1};
    std::vector<float> log_prob(1), lse(1);
    const PackedWeight head = packed(w);
    engine().head_log_probs(tensor(h), head, target, log_prob, lse);
    EXPECT_NEAR(static_cast<double>(log_prob[0]), std::log1p(-other), 1e-6);
    const Tensor dh = output(1, 1), dw = tensor(Matrix(2, 1));
    engine().head_log_probs_backward(tensor(h), head, target, lse, g, dh, dw);
    const Matrix result = values(dw);
    EXPECT_NEAR(result(0, 0), other, 1e-6);
    EXPECT_NEAR(result(1, 0), -other, (1e-6 + operand_error()) * other);
    EXPECT_NEAR(values(dh)(0, 0), 8 * other, 1e-5 + 8 * other * operand_error());
}

TEST_P(HeadTest, a_row_without_weight_gives_no_gradient)
{
    Problem p({4, 99, 33}, operand);
    std::fill(p.g.begin(), p.g.end(), 0.0f);
    const Result forward = log_probs(p);
    const Tensor dh = output(4, 33), dw = tensor(Matrix(99, 33));
    engine().head_log_probs_backward(tensor(p.h), packed(p.w), p.targets, forward.lse, p.g, dh, dw);
    EXPECT_EQ(largest_magnitude(values(dh)), 0);
    EXPECT_EQ(largest_magnitude(values(dw)), 0);
}

TEST_P(HeadTest, no_rows_are_fine)
{
    const Matrix before = random_matrix(9, 4, 1);
    const PackedWeight head = packed(before);
    const Tensor none = engine().allocate(0, 4, DType::f32), dw = tensor(before);
    engine().head_log_probs(none, head, {}, {}, {});
    engine().head_log_probs_backward(none, head, {}, {}, {}, none, dw);
    engine().logits(none, head, engine().allocate(0, 9, DType::f32));
    EXPECT_EQ(values(dw).values, before.values);
}

SELM_INSTANTIATE_ENGINES_AND_BF16(HeadTest);

} // namespace
} // namespace selm
