#include "engine_test_support.hpp"

namespace selm {
namespace {

struct Case {
    std::string name;
    AttentionShape shape;
    std::vector<Segment> segments;
    std::int64_t tokens() const { return segments.back().begin + segments.back().length; }
};

/// Segments from (length, trunk) pairs.
std::vector<Segment> segments_of(std::initializer_list<std::pair<std::int64_t, std::int64_t>> list)
{
    std::vector<Segment> out;
    std::int64_t begin = 0;
    for (const auto& [length, trunk] : list) {
        out.push_back({begin, length, trunk});
        begin += length;
    }
    return out;
}

constexpr AttentionShape tiny{3, 1, 16, 0.25f};     // 3 query heads share one key head
constexpr AttentionShape smollm2{9, 3, 64, 0.125f}; // SmolLM2-135M
constexpr AttentionShape no_sharing{2, 2, 8, 0.35355338f};
constexpr AttentionShape one_head{1, 1, 48, 0.14433757f};

const std::vector<Case>& cases()
{
    static const std::vector<Case> all = {
        {"one token", tiny, segments_of({{1, -1}})},
        {"two rows of one token", smollm2, segments_of({{1, -1}, {1, -1}})},
        {"no trunk", tiny, segments_of({{5, -1}, {17, -1}, {2, -1}})},
        {"prompt and three responses", tiny, segments_of({{7, -1}, {5, 0}, {1, 0}, {9, 0}})},
        {"two prompts", no_sharing, segments_of({{4, -1}, {3, 0}, {6, 0}, {11, -1}, {2, 3}, {8, 3}})},
        {"branches after other rows", one_head, segments_of({{3, -1}, {6, -1}, {5, 0}, {4, 1}, {3, 0}})},
        {"many branches", tiny,
         segments_of({{10, -1}, {1, 0}, {2, 0}, {3, 0}, {4, 0}, {1, 0}, {1, 0}, {7, 0}, {15, 0}})},
        {"lengths around 64", smollm2, segments_of({{63, -1}, {65, 0}, {64, 0}, {1, 0}})},
        {"lengths around 128", smollm2, segments_of({{129, -1}, {127, 0}, {130, 0}})},
        {"long trunk, short branches", no_sharing, segments_of({{300, -1}, {2, 0}, {1, 0}})},
        {"short trunk, long branch", no_sharing, segments_of({{1, -1}, {290, 0}})},
    };
    return all;
}

Matrix random_qkv(const Case& c, double deviation = 1)
{
    return random_matrix(c.tokens(), (c.shape.heads + 2 * c.shape.kv_heads) * c.shape.head_dim, 11, deviation);
}

class AttentionTest : public EngineTest {};

TEST_P(AttentionTest, forward_as_defined)
{
    for (const Case& c : cases()) {
        const Matrix qkv = operand(random_qkv(c));
        const reference::Attention expected = reference::attention(qkv, c.shape, c.segments);
        const Tensor out = output(c.tokens(), c.shape.heads * c.shape.head_dim, 3),
                     lse = output(c.shape.heads, c.tokens(), 5);
        engine().attention(tensor(qkv, 1), c.shape, c.segments, out, lse);
        // Scores of a few units carry errors of about D^(1/2) u |score| <= 1e-6, and so do the weights, relatively; the
        // output is a mean of values below 5 with them.
        const Matrix rounding = rounding_of_attention(qkv, c.shape, c.segments);
        expect_close(
            values(out), expected.out, [&](std::size_t i) { return 5e-6 + rounding.values[i]; }, c.name + ", out");
        expect_close(values(lse), expected.lse, 3e-6, c.name + ", lse");
    }
}

// Scores far above 88 overflow exp() unless the maximum is taken off; with scores apart the softmax is nearly one-hot.
TEST_P(AttentionTest, large_scores_do_not_overflow)
{
    for (const Case& c : {cases()[3], cases()[7]}) {
        const Matrix qkv = operand(random_qkv(c, 8));
        const reference::Attention expected = reference::attention(qkv, c.shape, c.segments);
        const Tensor out = output(c.tokens(), c.shape.heads * c.shape.head_dim),
                     lse = output(c.shape.heads, c.tokens());
        engine().attention(tensor(qkv), c.shape, c.segments, out, lse);
        ASSERT_GT(largest_magnitude(expected.lse), 100) << "the case should be large";
        // scores of up to 400 with errors of a few 2^-24 of them: weights are off by up to 1e-4 of themselves
        const Matrix rounding = rounding_of_attention(qkv, c.shape, c.segments);
        const double exact = 1e-4 * largest_magnitude(qkv);
        expect_close(
            values(out), expected.out, [&](std::size_t i) { return exact + rounding.values[i]; }, c.name + ", out");
        expect_close(values(lse), expected.lse, 1e-4, c.name + ", lse");
    }
}

TEST_P(AttentionTest, backward_as_defined)
{
    for (const Case& c : cases()) {
        const Matrix qkv = operand(random_qkv(c)),
                     d_out = operand(random_matrix(c.tokens(), c.shape.heads * c.shape.head_dim, 12));
        const Tensor out = output(d_out.rows, d_out.columns), lse = output(c.shape.heads, c.tokens());
        const Tensor qkv_t = tensor(qkv, 1), dqkv = output(qkv.rows, qkv.columns, 3);
        engine().attention(qkv_t, c.shape, c.segments, out, lse);
        engine().attention_backward(qkv_t, c.shape, c.segments, out, lse, tensor(d_out, 2), dqkv);
        const Matrix expected = reference::attention_backward(qkv, c.shape, c.segments, d_out);
        // Keys that many queries see gather the largest sums; every term has the relative error of a softmax weight.
        const double exact = 2e-6 * std::max(5.0, largest_magnitude(expected));
        const Matrix rounding = has_bf16_operands()
                                    ? reference::attention_magnitudes(qkv, c.shape, c.segments, d_out).dqkv
                                    : Matrix(qkv.rows, qkv.columns);
        expect_close(
            values(dqkv), expected, [&](std::size_t i) { return exact + operand_error() * rounding.values[i]; }, c.name);
    }
}

// A token's bits are those of its own segment and trunk, wherever they stand and whatever else is in the call.
TEST_P(AttentionTest, a_segment_does_not_depend_on_others)
{
    if (!engine().row_invariant())
        GTEST_SKIP() << "this engine does not promise row invariance";
    for (const Case& c : cases()) {
        const Matrix qkv = random_qkv(c);
        const std::int64_t width = c.shape.heads * c.shape.head_dim;
        const Tensor qkv_t = tensor(qkv), out = output(c.tokens(), width), lse = output(c.shape.heads, c.tokens());
        engine().attention(qkv_t, c.shape, c.segments, out, lse);
        const Matrix all = values(out), all_lse = values(lse);
        for (const Segment& segment : c.segments) {
            // alone with its trunk, behind a stranger of 3 tokens
            std::vector<std::int64_t> rows = {0, 0, 0};
            std::vector<Segment> segments = {{0, 3, -1}};
            if (segment.trunk >= 0) {
                const Segment& trunk = c.segments[static_cast<std::size_t>(segment.trunk)];
                segments.push_back({3, trunk.length, -1});
                for (std::int64_t i = 0; i < trunk.length; ++i)
                    rows.push_back(trunk.begin + i);
            }
            const auto begin = static_cast<std::int64_t>(rows.size());
            segments.push_back({begin, segment.length, segment.trunk >= 0 ? 1 : -1});
            for (std::int64_t i = 0; i < segment.length; ++i)
                rows.push_back(segment.begin + i);
            const auto total = static_cast<std::int64_t>(rows.size());
            const Tensor some = output(total, qkv.columns), some_out = output(total, width),
                         some_lse = output(c.shape.heads, total);
            engine().gather_rows(qkv_t, rows, some);
            engine().attention(some, c.shape, segments, some_out, some_lse);
            const Matrix alone = values(some_out), alone_lse = values(some_lse);
            for (std::int64_t i = 0; i < segment.length; ++i) {
                for (std::int64_t j = 0; j < width; ++j)
                    ASSERT_EQ(alone(begin + i, j), all(segment.begin + i, j)) << c.name << " token " << i;
                for (std::int64_t head = 0; head < c.shape.heads; ++head)
                    ASSERT_EQ(alone_lse(head, begin + i), all_lse(head, segment.begin + i)) << c.name << " token " << i;
            }
        }
    }
}

SELM_INSTANTIATE_ENGINES_AND_BF16(AttentionTest);
SELM_INSTANTIATE_ATEN_PARTS(AttentionTest);

} // namespace
} // namespace selm
