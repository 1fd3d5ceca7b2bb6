#include "engine_test_support.hpp"

namespace selm {
namespace {

const std::vector<std::int64_t> row_counts = {1, 2, 7, 65, 130};
const std::vector<std::int64_t> widths = {1, 3, 16, 33, 99, 576};

class ElementwiseTest : public EngineTest {};

TEST_P(ElementwiseTest, embed_takes_rows_of_the_embedding)
{
    const Matrix table = random_matrix(99, 33, 1);
    const std::vector<std::int32_t> tokens = {98, 0, 5, 5, 17, 98};
    const Tensor x = output(6, 33, 2), rounded = output(6, 33);
    engine().embed(tokens, tensor(table, 3), x);
    engine().embed(tokens, bf16_tensor(table), rounded);
    const Matrix taken = values(x), taken_rounded = values(rounded);
    for (std::int64_t t = 0; t < 6; ++t) {
        for (std::int64_t h = 0; h < 33; ++h) {
            const double value = table(tokens[static_cast<std::size_t>(t)], h);
            EXPECT_EQ(taken(t, h), value);
            EXPECT_EQ(taken_rounded(t, h),
                      static_cast<double>(bf16_to_float(float_to_bf16(static_cast<float>(value)))));
        }
    }
}

TEST_P(ElementwiseTest, embed_backward_adds_repeated_tokens)
{
    const Matrix before = random_matrix(20, 33, 1), dx = random_matrix(5, 33, 2);
    const std::vector<std::int32_t> tokens = {19, 3, 3, 0, 3};
    const Tensor d_table = tensor(before);
    engine().embed_backward(tokens, tensor(dx, 1), d_table);
    Matrix expected = before;
    for (std::int64_t t = 0; t < 5; ++t)
        for (std::int64_t h = 0; h < 33; ++h)
            expected(tokens[static_cast<std::size_t>(t)], h) += dx(t, h);
    // at most three additions of values below 4: each rounds by at most 2^-24 * 8
    expect_close(values(d_table), expected, 2e-6, "d_embedding");
}

TEST_P(ElementwiseTest, rms_norm_as_defined)
{
    for (const std::int64_t rows : row_counts) {
        for (const std::int64_t width : widths) {
            const Matrix x = random_matrix(rows, width, 1, 3), gain = random_matrix(1, width, 2);
            const reference::Norm expected = reference::rms_norm(x, gain, 1e-5);
            const Tensor y = output(rows, width, 1), rstd = output(1, rows), without = output(rows, width);
            engine().rms_norm(tensor(x, 5), tensor(gain), 1e-5f, y, rstd);
            engine().rms_norm(tensor(x, 5), tensor(gain), 1e-5f, without, {});
            // A mean of positive squares is good to a few u = 6e-8, its root to half of that; y adds two roundings.
            expect_close(
                values(y), expected.y, [&](std::size_t i) { return 1e-6 * std::abs(expected.y.values[i]); },
                cat("y of ", rows, " x ", width));
            expect_close(
                values(rstd), as_row(std::span<const double>(expected.rstd)),
                [&](std::size_t i) { return 1e-6 * expected.rstd[i]; }, cat("rstd of ", rows, " x ", width));
            EXPECT_EQ(values(without).values, values(y).values);
        }
    }
}

TEST_P(ElementwiseTest, rms_norm_of_zeros_is_zero)
{
    const Tensor y = output(2, 33), rstd = output(1, 2);
    engine().rms_norm(tensor(Matrix(2, 33)), tensor(random_matrix(1, 33, 2)), 1e-5f, y, rstd);
    for (const double value : values(y).values)
        EXPECT_EQ(value, 0);
    EXPECT_NEAR(values(rstd)(0, 0), 1 / std::sqrt(1e-5), 1e-3);
}

TEST_P(ElementwiseTest, rms_norm_backward_accumulates)
{
    for (const std::int64_t rows : row_counts) {
        for (const std::int64_t width : widths) {
            const Matrix x = random_matrix(rows, width, 1), gain = random_matrix(1, width, 2);
            const Matrix dy = random_matrix(rows, width, 3);
            const Matrix dx_before = random_matrix(rows, width, 4), dgain_before = random_matrix(1, width, 5);
            const Tensor x_t = tensor(x, 1), gain_t = tensor(gain), y = output(rows, width), rstd = output(1, rows);
            const Tensor dx = tensor(dx_before, 3), dgain = tensor(dgain_before);
            engine().rms_norm(x_t, gain_t, 1e-5f, y, rstd);
            engine().rms_norm_backward(x_t, gain_t, rstd, tensor(dy, 2), dx, dgain);
            reference::NormGradient expected = reference::rms_norm_backward(x, gain, 1e-5, dy);
            // The two terms of dx cancel (wholly at width 1): errors are relative to the terms, |dy gain| rstd.
            const std::vector<double> scale = reference::rms_norm(x, gain, 1e-5).rstd;
            const double largest = largest_magnitude(dy) * largest_magnitude(gain) *
                                   largest_magnitude(as_row(std::span<const double>(scale)));
            for (std::size_t i = 0; i < expected.dx.values.size(); ++i)
                expected.dx.values[i] += dx_before.values[i];
            for (std::size_t i = 0; i < expected.dgain.values.size(); ++i)
                expected.dgain.values[i] += dgain_before.values[i];
            expect_close(values(dx), expected.dx, 1e-6 * (largest + 4), cat("dx of ", rows, " x ", width));
            // sums of `rows` terms below about 12 (4 deviations of dy times 3 of x rstd)
            expect_close(values(dgain), expected.dgain, 1e-6 * (12 + std::sqrt(static_cast<double>(rows))),
                         cat("dgain of ", rows, " x ", width));
            const Tensor alone = tensor(dx_before, 3);
            engine().rms_norm_backward(x_t, gain_t, rstd, tensor(dy, 2), alone, {});
            EXPECT_EQ(values(alone).values, values(dx).values) << "without dgain";
        }
    }
}

struct RopeTable {
    Matrix cos, sin;
};

RopeTable rope_table(std::int64_t positions, std::int64_t half)
{
    RopeTable table{Matrix(positions, half), Matrix(positions, half)};
    for (std::int64_t p = 0; p < positions; ++p) {
        for (std::int64_t j = 0; j < half; ++j) {
            const double angle =
                static_cast<double>(p) * std::pow(1e4, -static_cast<double>(j) / static_cast<double>(half));
            table.cos(p, j) = static_cast<double>(static_cast<float>(std::cos(angle)));
            table.sin(p, j) = static_cast<double>(static_cast<float>(std::sin(angle)));
        }
    }
    return table;
}

TEST_P(ElementwiseTest, rope_turns_queries_and_keys)
{
    for (const AttentionShape shape :
         {AttentionShape{3, 1, 16, 0.25f}, AttentionShape{9, 3, 64, 0.125f}, AttentionShape{1, 1, 2, 1}}) {
        const RopeTable table = rope_table(300, shape.head_dim / 2);
        const std::vector<std::int32_t> positions = {0, 1, 299, 7, 7, 64, 128};
        const Matrix qkv = random_matrix(7, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, 1);
        for (const bool backward : {false, true}) {
            const Tensor x = tensor(qkv, 3);
            engine().rope(x, shape, positions, tensor(table.cos), tensor(table.sin), backward);
            const Matrix expected = reference::rope(qkv, shape, positions, table.cos, table.sin, backward);
            // two products of values below 6 and a sum
            expect_close(values(x), expected, 1e-6, cat("head_dim ", shape.head_dim, backward ? " backward" : ""));
            const Matrix turned = values(x);
            const std::int64_t first_value = (shape.heads + shape.kv_heads) * shape.head_dim;
            for (std::int64_t t = 0; t < 7; ++t)
                for (std::int64_t c = first_value; c < qkv.columns; ++c)
                    ASSERT_EQ(turned(t, c), qkv(t, c)) << "values are not rotated";
        }
    }
}

TEST_P(ElementwiseTest, swiglu_and_its_backward)
{
    for (const std::int64_t rows : row_counts) {
        for (const std::int64_t width : widths) {
            const Matrix gate_up = random_matrix(rows, 2 * width, 1, 3), da = random_matrix(rows, width, 2);
            const Matrix expected = reference::swiglu(gate_up);
            const Tensor a = output(rows, width, 1), again = output(rows, width, 1), both = tensor(gate_up, 5);
            engine().swiglu(both, a);
            // exp is good to 2 u and its argument is exact; products and quotients add a few u.
            const auto tolerance = [&](std::size_t i) { return 2e-6 * std::abs(expected.values[i]) + 1e-30; };
            expect_close(values(a), expected, tolerance, cat("swiglu of ", rows, " x ", width));
            engine().swiglu_backward(both, tensor(da, 2), again);
            expect_close(values(again), expected, tolerance, cat("recomputed swiglu of ", rows, " x ", width));
            // slope = sigma + gate sigma (1 - sigma) cancels: its error is relative to the terms, at most 1 + |gate|
            const Matrix gradient = reference::swiglu_backward(gate_up, da);
            const auto gradient_tolerance = [&](std::size_t i) {
                const auto row = static_cast<std::int64_t>(i) / (2 * width),
                           column = static_cast<std::int64_t>(i) % width;
                const double factors =
                    std::abs(da(row, column)) * std::max(1.0, std::abs(gate_up(row, width + column)));
                return 1e-6 * factors * (1 + std::abs(gate_up(row, column)));
            };
            expect_close(values(both), gradient, gradient_tolerance, cat("swiglu backward of ", rows, " x ", width));
        }
    }
}

TEST_P(ElementwiseTest, swiglu_of_extreme_gates_is_finite)
{
    Matrix gate_up(1, 12);
    const std::vector<double> gates = {-200, -100, -88, 88, 100, 200};
    for (std::size_t i = 0; i < 6; ++i) {
        gate_up.values[i] = gates[i];
        gate_up.values[6 + i] = 2;
    }
    const Tensor both = tensor(gate_up), a = output(1, 6), da = tensor(random_matrix(1, 6, 1));
    engine().swiglu(both, a);
    const Matrix result = values(a), expected = reference::swiglu(gate_up);
    for (std::size_t i = 0; i < 6; ++i)
        EXPECT_NEAR(result.values[i], expected.values[i], 1e-5 * std::abs(expected.values[i]) + 1e-30) << gates[i];
    engine().swiglu_backward(both, da, a);
    for (const double value : values(both).values)
        EXPECT_TRUE(std::isfinite(value));
}

TEST_P(ElementwiseTest, rows_are_gathered_and_scattered)
{
    const Matrix x = random_matrix(9, 33, 1), d = random_matrix(5, 33, 2);
    const std::vector<std::int64_t> index = {8, 0, 0, 4, 8};
    const Tensor out = output(5, 33, 1), sums = tensor(x, 2);
    engine().gather_rows(tensor(x, 3), index, out);
    engine().scatter_add_rows(tensor(d, 1), index, sums);
    const Matrix gathered = values(out);
    Matrix expected = x;
    for (std::int64_t i = 0; i < 5; ++i) {
        for (std::int64_t h = 0; h < 33; ++h) {
            EXPECT_EQ(gathered(i, h), x(index[static_cast<std::size_t>(i)], h));
            // in order of i, each addition rounded to f32: exactly this
            double& sum = expected(index[static_cast<std::size_t>(i)], h);
            sum = static_cast<double>(static_cast<float>(sum) + static_cast<float>(d(i, h)));
        }
    }
    EXPECT_EQ(values(sums).values, expected.values);
}

SELM_INSTANTIATE_ENGINES(ElementwiseTest);

class ConvertTest : public EngineTest {};

TEST_P(ConvertTest, rounds_to_nearest_even_and_expands_exactly)
{
    for (const std::int64_t columns : {1, 33, 48, 100}) {
        Matrix x = random_matrix(7, columns, 1);
        x(0, 0) = 1.00390625; // between 1 and 1.0078125: the even one
        x(1, 0) = 1.01171875; // between 1.0078125 and 1.015625
        x(2, 0) = -3.0e38;
        const Tensor narrow = engine().allocate(7, columns, DType::bf16), wide = output(7, columns, 3);
        engine().convert(tensor(x, 5), narrow);
        engine().convert(narrow, wide);
        Matrix expected = x;
        for (double& value : expected.values)
            value = static_cast<double>(bf16_to_float(float_to_bf16(static_cast<float>(value))));
        EXPECT_EQ(expected(0, 0), 1.0);
        EXPECT_EQ(expected(1, 0), 1.015625);
        EXPECT_EQ(values(wide).values, expected.values) << columns;
    }
}

SELM_INSTANTIATE_ENGINES_AND_BF16(ConvertTest);

} // namespace
} // namespace selm
