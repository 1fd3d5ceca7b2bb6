#include <numeric>

#include "engine_test_support.hpp"

// A row has the same bits alone, among others, and wherever it stands. Attention: attention_test,
// cached_attention_test.
namespace selm {
namespace {

/// Runs an operation on the given rows of its inputs; returns the rows of its output.
using RowOperation = std::function<Matrix(std::span<const std::int64_t>)>;

constexpr std::int64_t all_rows = 150;

class RowInvarianceTest : public EngineTest {
  protected:
    void SetUp() override
    {
        EngineTest::SetUp();
        if (!IsSkipped() && !engine().row_invariant())
            GTEST_SKIP() << "this engine does not promise row invariance";
    }

    Matrix rows_of(const Matrix& x, std::span<const std::int64_t> index)
    {
        Matrix out(static_cast<std::int64_t>(index.size()), x.columns);
        for (std::int64_t i = 0; i < out.rows; ++i)
            for (std::int64_t c = 0; c < x.columns; ++c)
                out(i, c) = x(index[static_cast<std::size_t>(i)], c);
        return out;
    }

    void expect_invariant(const std::string& what, const RowOperation& operation)
    {
        std::vector<std::int64_t> everything(static_cast<std::size_t>(all_rows));
        std::iota(everything.begin(), everything.end(), 0);
        const Matrix together = operation(everything);
        std::vector<std::vector<std::int64_t>> selections = {{0}, {77}, {149}, {149, 0}, {77, 77, 77}};
        for (const std::int64_t count : {2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129}) {
            std::vector<std::int64_t> run; // backwards from the end, so that no row keeps its place
            for (std::int64_t i = 0; i < count; ++i)
                run.push_back(all_rows - 1 - i);
            selections.push_back(run);
        }
        for (const std::vector<std::int64_t>& selection : selections) {
            const Matrix some = operation(selection);
            for (std::size_t i = 0; i < selection.size(); ++i)
                for (std::int64_t c = 0; c < some.columns; ++c)
                    ASSERT_EQ(some(static_cast<std::int64_t>(i), c), together(selection[i], c))
                        << what << ": row " << selection[i] << " at place " << i << " of " << selection.size()
                        << ", column " << c;
        }
    }
};

TEST_P(RowInvarianceTest, linear)
{
    struct Shape {
        std::int64_t outputs, inputs;
    };
    for (const Shape s :
         {Shape{7, 5}, Shape{33, 99}, Shape{99, 33}, Shape{64, 64}, Shape{65, 17}, Shape{960, 576}, Shape{576, 1536},
          Shape{1, 48}, Shape{1, 576}}) {
        const Matrix x = random_matrix(all_rows, s.inputs, 1), w = random_matrix(s.outputs, s.inputs, 2);
        const Matrix residual = random_matrix(all_rows, s.outputs, 3);
        const PackedWeight weight = packed(w);
        const std::string shape = cat(" ", s.outputs, " x ", s.inputs);
        for (const std::int64_t extra : {0, 3}) {
            expect_invariant(cat("linear", shape, " stride +", extra), [&](std::span<const std::int64_t> rows) {
                const Tensor y = output(static_cast<std::int64_t>(rows.size()), s.outputs, extra);
                engine().linear(tensor(rows_of(x, rows), extra), weight, y);
                return values(y);
            });
        }
        expect_invariant("linear_add" + shape, [&](std::span<const std::int64_t> rows) {
            const Tensor y = tensor(rows_of(residual, rows));
            engine().linear_add(tensor(rows_of(x, rows)), weight, y);
            return values(y);
        });
    }
}

TEST_P(RowInvarianceTest, head)
{
    struct Shape {
        std::int64_t vocabulary, hidden;
    };
    for (const Shape s : {Shape{99, 33}, Shape{1000, 64}, Shape{3001, 48}}) {
        const Matrix h = random_matrix(all_rows, s.hidden, 1), w = random_matrix(s.vocabulary, s.hidden, 2, 0.3);
        const std::vector<std::int32_t> targets = random_tokens(all_rows, static_cast<std::int32_t>(s.vocabulary), 3);
        const PackedWeight head = packed(w);
        const std::string shape = cat(" ", s.vocabulary, " x ", s.hidden);
        expect_invariant("logits" + shape, [&](std::span<const std::int64_t> rows) {
            const Tensor y = output(static_cast<std::int64_t>(rows.size()), s.vocabulary);
            engine().logits(tensor(rows_of(h, rows)), head, y);
            return values(y);
        });
        expect_invariant("head_log_probs" + shape, [&](std::span<const std::int64_t> rows) {
            std::vector<std::int32_t> wanted;
            for (const std::int64_t row : rows)
                wanted.push_back(targets[static_cast<std::size_t>(row)]);
            std::vector<float> log_probs(rows.size()), lse(rows.size());
            engine().head_log_probs(tensor(rows_of(h, rows)), head, wanted, log_probs, lse);
            Matrix out(static_cast<std::int64_t>(rows.size()), 2);
            for (std::int64_t i = 0; i < out.rows; ++i) {
                out(i, 0) = static_cast<double>(log_probs[static_cast<std::size_t>(i)]);
                out(i, 1) = static_cast<double>(lse[static_cast<std::size_t>(i)]);
            }
            return out;
        });
    }
}

TEST_P(RowInvarianceTest, norm_and_activation)
{
    for (const std::int64_t width : {1, 5, 33, 64, 99, 576, 1536}) {
        const Matrix x = random_matrix(all_rows, 2 * width, 1), gain = random_matrix(1, 2 * width, 2);
        for (const std::int64_t extra : {0, 3}) {
            expect_invariant(cat("rms_norm of ", 2 * width, " stride +", extra),
                             [&](std::span<const std::int64_t> rows) {
                                 const Tensor y = output(static_cast<std::int64_t>(rows.size()), 2 * width, extra);
                                 engine().rms_norm(tensor(rows_of(x, rows), extra), tensor(gain), 1e-5f, y, {});
                                 return values(y);
                             });
            expect_invariant(cat("swiglu of ", width, " stride +", extra), [&](std::span<const std::int64_t> rows) {
                const Tensor a = output(static_cast<std::int64_t>(rows.size()), width, extra);
                engine().swiglu(tensor(rows_of(x, rows), extra), a);
                return values(a);
            });
        }
    }
}

TEST_P(RowInvarianceTest, encoder_operations)
{
    for (const std::int64_t width : {1, 5, 33, 64, 99, 576}) {
        const Matrix x = random_matrix(all_rows, width, 1), residual = random_matrix(all_rows, width, 2);
        const Matrix gain = random_matrix(1, width, 3), bias = random_matrix(1, width, 4);
        const PackedWeight weight = packed(random_matrix(width, width, 5));
        for (const std::int64_t extra : {0, 3}) {
            const std::string what = cat(" of ", width, " stride +", extra);
            const auto on_rows = [&](const auto& operation) {
                return [&, operation](std::span<const std::int64_t> rows) {
                    const Tensor y = output(static_cast<std::int64_t>(rows.size()), width, extra);
                    operation(rows, tensor(rows_of(x, rows), extra), y);
                    return values(y);
                };
            };
            using Rows = std::span<const std::int64_t>;
            expect_invariant("linear_bias" + what, on_rows([&](Rows, const Tensor& in, const Tensor& y) {
                                 engine().linear_bias(in, weight, tensor(bias), y);
                             }));
            expect_invariant("layer_norm" + what, on_rows([&](Rows rows, const Tensor& in, const Tensor& y) {
                                 engine().layer_norm(in, tensor(rows_of(residual, rows), extra), tensor(gain),
                                                     tensor(bias), 1e-7f, y, {}, {});
                             }));
            expect_invariant("gelu" + what,
                             on_rows([&](Rows, const Tensor& in, const Tensor& y) { engine().gelu(in, y); }));
            expect_invariant("tanh" + what, [&](Rows rows) {
                const Tensor y = tensor(rows_of(x, rows), extra);
                engine().tanh(y);
                return values(y);
            });
        }
    }
}

TEST_P(RowInvarianceTest, rope_embed_and_gather)
{
    const AttentionShape shape{3, 1, 6, 0.4f};
    const Matrix qkv = random_matrix(all_rows, 30, 1), cos = random_matrix(200, 3, 2), sin = random_matrix(200, 3, 3);
    const std::vector<std::int32_t> positions = random_tokens(all_rows, 200, 4);
    expect_invariant("rope", [&](std::span<const std::int64_t> rows) {
        std::vector<std::int32_t> at;
        for (const std::int64_t row : rows)
            at.push_back(positions[static_cast<std::size_t>(row)]);
        const Tensor x = tensor(rows_of(qkv, rows));
        engine().rope(x, shape, at, tensor(cos), tensor(sin), false);
        return values(x);
    });
    expect_invariant("embed", [&](std::span<const std::int64_t> rows) {
        std::vector<std::int32_t> tokens(rows.begin(), rows.end());
        const Tensor x = output(static_cast<std::int64_t>(rows.size()), 30);
        engine().embed(tokens, tensor(qkv), x);
        return values(x);
    });
    expect_invariant("gather_rows", [&](std::span<const std::int64_t> rows) {
        const Tensor x = output(static_cast<std::int64_t>(rows.size()), 30);
        engine().gather_rows(tensor(qkv), rows, x);
        return values(x);
    });
}

SELM_INSTANTIATE_ENGINES_AND_BF16(RowInvarianceTest);

} // namespace
} // namespace selm
