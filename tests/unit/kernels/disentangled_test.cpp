#include <algorithm>

#include "engine_test_support.hpp"
#include "reference_encoder.hpp"

namespace selm {
namespace {

/// Relative positions as DeBERTa's: one per distance near 0, then buckets that widen, then the last one. With a step above 1
/// only each step-th position is used.
std::vector<std::int32_t> bucketed_index(std::int64_t span, std::int64_t longest, std::int64_t step)
{
    std::vector<std::int32_t> index;
    for (std::int64_t distance = 1 - longest; distance < longest; ++distance) {
        const std::int64_t magnitude = std::abs(distance), near = span / 2;
        const std::int64_t bucket = magnitude <= near ? magnitude : near + 1 + (magnitude - near) / 3;
        const std::int64_t row = span + (distance < 0 ? -bucket : bucket);
        index.push_back(static_cast<std::int32_t>(step * std::clamp<std::int64_t>(row, 0, 2 * span - 1)));
    }
    return index;
}

struct Case {
    std::string name;
    std::int64_t heads, head_dim, span;
    std::vector<std::int64_t> lengths;
    std::int64_t step = 1; ///< by which relative positions rise
};

const std::vector<Case>& cases()
{
    static const std::vector<Case> all = {
        {"one token", 2, 16, 4, {1}},
        {"short segments", 3, 8, 8, {1, 2, 17, 5}},
        {"lengths around tiles", 2, 16, 32, {63, 64, 65, 1, 128, 129}},
        {"all kinds of tiles", 1, 12, 100, {400}},
        {"span beyond the segment", 1, 64, 256, {70, 9}},
        {"few relative positions", 2, 5, 1, {130, 66}},
        {"positions that jump", 2, 12, 40, {150, 70}, 3},
    };
    return all;
}

std::vector<Segment> segments_of(const std::vector<std::int64_t>& lengths)
{
    std::vector<Segment> out;
    std::int64_t begin = 0;
    for (const std::int64_t length : lengths) {
        out.push_back({begin, length, -1});
        begin += length;
    }
    return out;
}

/// A case's inputs.
struct Given {
    explicit Given(const Case& c, double deviation = 1)
        : segments(segments_of(c.lengths)), tokens(segments.back().begin + segments.back().length),
          index(bucketed_index(c.span, *std::max_element(c.lengths.begin(), c.lengths.end()) + 3, c.step)),
          shape{c.heads, c.head_dim, static_cast<float>(1 / std::sqrt(3.0 * static_cast<double>(c.head_dim))), index},
          qkv(random_matrix(tokens, 3 * c.heads * c.head_dim, 11, deviation)),
          relative(random_matrix(2 * c.span * c.step, 2 * c.heads * c.head_dim, 12, deviation))
    {
    }
    std::vector<Segment> segments;
    std::int64_t tokens;
    std::vector<std::int32_t> index;
    DisentangledShape shape;
    Matrix qkv, relative;
    std::int64_t width() const { return shape.heads * shape.head_dim; }
};

class DisentangledTest : public EngineTest {
  protected:
    /// By definition, of the operands that the engine multiplies.
    static reference::Attention attention_of_operands(const Given& g)
    {
        return reference::disentangled_attention(operand(g.qkv), operand(g.relative), g.shape, g.segments);
    }

    /// What rounding the softmax weights, which are operands as well, may change the output by: sums of w |v|.
    static Matrix weight_errors(const Given& g)
    {
        Matrix qkv = operand(g.qkv);
        for (std::int64_t t = 0; t < qkv.rows; ++t)
            for (std::int64_t c = 2 * g.width(); c < qkv.columns; ++c)
                qkv(t, c) = std::abs(qkv(t, c));
        Matrix out = reference::disentangled_attention(qkv, operand(g.relative), g.shape, g.segments).out;
        for (double& value : out.values)
            value *= operand_error();
        return out;
    }
};

TEST_P(DisentangledTest, forward_as_defined)
{
    for (const Case& c : cases()) {
        const Given g(c);
        const reference::Attention expected = attention_of_operands(g);
        const Matrix rounded = weight_errors(g);
        const Tensor out = output(g.tokens, g.width(), 3), lse = output(c.heads, g.tokens, 5),
                     without = output(g.tokens, g.width());
        engine().disentangled_attention(tensor(g.qkv, 1), tensor(g.relative, 2), g.shape, g.segments, out, lse);
        engine().disentangled_attention(tensor(g.qkv), tensor(g.relative), g.shape, g.segments, without, {});
        // as for plain attention: scores of a few units with errors of about 1e-6, values below 5
        const auto tolerance = [&](std::size_t i) { return 5e-6 + rounded.values[i]; };
        expect_close(values(out), expected.out, tolerance, c.name + ", out");
        expect_close(values(lse), expected.lse, 3e-6, c.name + ", lse");
        EXPECT_EQ(values(without).values, values(out).values) << c.name << ", out without lse";
    }
}

TEST_P(DisentangledTest, large_scores_do_not_overflow)
{
    const Given g(cases()[3], 9);
    const reference::Attention expected = attention_of_operands(g);
    const Matrix rounded = weight_errors(g);
    const Tensor out = output(g.tokens, g.width()), lse = output(g.shape.heads, g.tokens);
    engine().disentangled_attention(tensor(g.qkv), tensor(g.relative), g.shape, g.segments, out, lse);
    ASSERT_GT(largest_magnitude(expected.lse), 100) << "the case should be large";
    const auto tolerance = [&](std::size_t i) { return 1e-4 * largest_magnitude(g.qkv) + rounded.values[i]; };
    expect_close(values(out), expected.out, tolerance, "out");
    expect_close(values(lse), expected.lse, 1e-4, "lse");
}

TEST_P(DisentangledTest, backward_as_defined)
{
    for (const Case& c : cases()) {
        const Given g(c);
        const Matrix d_out = random_matrix(g.tokens, g.width(), 13);
        const Tensor qkv = tensor(g.qkv, 1), relative = tensor(g.relative, 2);
        const Tensor out = output(g.tokens, g.width()), lse = output(c.heads, g.tokens);
        const Tensor d_qkv = output(g.tokens, g.qkv.columns, 3),
                     d_relative = output(g.relative.rows, g.relative.columns, 1);
        engine().disentangled_attention(qkv, relative, g.shape, g.segments, out, lse);
        engine().disentangled_attention_backward(qkv, relative, g.shape, g.segments, out, lse, tensor(d_out, 2), d_qkv,
                                                 d_relative);
        const reference::DisentangledGradient expected =
            reference::disentangled_attention_backward(operand(g.qkv), operand(g.relative), g.shape, g.segments,
                                                      operand(d_out));
        // Every term has the relative error of a softmax weight; sums of many terms (far distances) are the largest. With bf16
        // operands weights and gradients of scores are rounded, and so were the forward output's weights: twice operand_error.
        const auto tolerance = [](const Matrix& gradient) {
            return 2e-6 * std::max(5.0, largest_magnitude(gradient)) + 2 * operand_error() * largest_magnitude(gradient);
        };
        expect_close(values(d_qkv), expected.dqkv, tolerance(expected.dqkv), c.name + ", dqkv");
        expect_close(values(d_relative), expected.drelative, tolerance(expected.drelative), c.name + ", drelative");
    }
}

TEST_P(DisentangledTest, a_segment_does_not_depend_on_others)
{
    if (!engine().row_invariant())
        GTEST_SKIP() << "this engine does not promise row invariance";
    for (const Case& c : cases()) {
        const Given g(c);
        const Tensor qkv = tensor(g.qkv), relative = tensor(g.relative), out = output(g.tokens, g.width());
        engine().disentangled_attention(qkv, relative, g.shape, g.segments, out, {});
        const Matrix all = values(out);
        for (const Segment& segment : g.segments) {
            // alone, behind a stranger of 3 tokens
            std::vector<std::int64_t> rows = {0, 0, 0};
            for (std::int64_t i = 0; i < segment.length; ++i)
                rows.push_back(segment.begin + i);
            const auto total = static_cast<std::int64_t>(rows.size());
            const std::vector<Segment> segments = {{0, 3, -1}, {3, segment.length, -1}};
            const Tensor some = output(total, g.qkv.columns), some_out = output(total, g.width());
            engine().gather_rows(qkv, rows, some);
            engine().disentangled_attention(some, relative, g.shape, segments, some_out, {});
            const Matrix alone = values(some_out);
            for (std::int64_t i = 0; i < segment.length; ++i)
                for (std::int64_t j = 0; j < g.width(); ++j)
                    ASSERT_EQ(alone(3 + i, j), all(segment.begin + i, j)) << c.name << " token " << i;
        }
    }
}

TEST_P(DisentangledTest, nan_spreads_over_its_segment_only)
{
    Given g(cases()[1]);
    g.qkv(5, g.width() + 2) = std::numeric_limits<double>::quiet_NaN(); // a key of the third segment, head 0
    const Tensor out = output(g.tokens, g.width());
    engine().disentangled_attention(tensor(g.qkv), tensor(g.relative), g.shape, g.segments, out, {});
    const Matrix result = values(out);
    for (const Segment& segment : g.segments)
        for (std::int64_t i = segment.begin; i < segment.begin + segment.length; ++i)
            EXPECT_EQ(std::isnan(result(i, 0)), segment.begin <= 5 && 5 < segment.begin + segment.length) << i;
}

SELM_INSTANTIATE_ENGINES_AND_BF16(DisentangledTest);

} // namespace
} // namespace selm
