#include "engine_test_support.hpp"
#include "reference_encoder.hpp"

// What encoders need besides attention: biases, LayerNorm, GELU, tanh.
namespace selm {
namespace {

const std::vector<std::int64_t> row_counts = {1, 2, 7, 65, 130};
const std::vector<std::int64_t> widths = {1, 3, 16, 33, 99, 576};

class EncoderTest : public EngineTest {};

TEST_P(EncoderTest, linear_with_bias_and_the_bias_gradient)
{
    struct Shape {
        std::int64_t outputs, inputs;
    };
    for (const Shape s : {Shape{1, 3}, Shape{33, 99}, Shape{65, 17}, Shape{96, 300}}) {
        for (const std::int64_t rows : {1, 7, 130}) {
            const Matrix x = random_matrix(rows, s.inputs, 1), w = random_matrix(s.outputs, s.inputs, 2);
            const Matrix bias = random_matrix(1, s.outputs, 3), dy = random_matrix(rows, s.outputs, 4);
            const Matrix before = random_matrix(1, s.outputs, 5);
            Matrix added(rows, s.outputs), sums = before;
            for (std::int64_t t = 0; t < rows; ++t) {
                for (std::int64_t n = 0; n < s.outputs; ++n) {
                    added(t, n) = bias(0, n);
                    sums(0, n) += dy(t, n);
                }
            }
            const Tensor y = output(rows, s.outputs, 3), dbias = tensor(before);
            engine().linear_bias(tensor(x, 1), packed(w), tensor(bias), y);
            expect_product(values(y), x, reference::transposed(w), &added, cat(s.outputs, " x ", s.inputs));
            engine().bias_backward(tensor(dy, 2), dbias);
            // at most 131 additions to sums below about 40
            expect_close(values(dbias), sums, 2e-5, cat("dbias of ", rows, " rows"));
        }
    }
}

TEST_P(EncoderTest, layer_norm_as_defined)
{
    for (const std::int64_t rows : row_counts) {
        for (const std::int64_t width : widths) {
            const Matrix x = random_matrix(rows, width, 1, 3), residual = random_matrix(rows, width, 6, 2);
            const Matrix gain = random_matrix(1, width, 2), bias = random_matrix(1, width, 3);
            Matrix sum = x;
            for (std::size_t i = 0; i < sum.values.size(); ++i)
                sum.values[i] = static_cast<double>(static_cast<float>(x.values[i] + residual.values[i]));
            const std::string what = cat(rows, " x ", width);
            // rstd of one column is 1/sqrt(eps): differences of rounding in x - mean must not count there
            const double eps = width == 1 ? 1 : 1e-7;
            for (const bool with_residual : {false, true}) {
                const Matrix& normalised = with_residual ? sum : x;
                const reference::LayerNorm expected = reference::layer_norm(normalised, gain, bias, eps);
                const double largest_rstd =
                    largest_magnitude(as_row(std::span<const double>(expected.rstd)));
                const Tensor x_t = tensor(x, 5), y = with_residual ? tensor(residual, 1) : output(rows, width, 1);
                const Tensor mean = output(1, rows), rstd = output(1, rows);
                engine().layer_norm(x_t, with_residual ? y : Tensor{}, tensor(gain), tensor(bias),
                                    static_cast<float>(eps), y, mean, rstd);
                EXPECT_EQ(values(x_t).values, normalised.values) << what;
                // x - mean is off by a few u of x (below 20), times rstd and gain
                const double tolerance = 2e-6 * (1 + largest_rstd) * (1 + largest_magnitude(gain));
                expect_close(values(y), expected.y, tolerance, "y of " + what);
                expect_close(values(mean), as_row(std::span<const double>(expected.mean)), 2e-6, "mean of " + what);
                expect_close(
                    values(rstd), as_row(std::span<const double>(expected.rstd)),
                    [&](std::size_t i) { return 4e-6 * expected.rstd[i] * (1 + largest_rstd); }, "rstd of " + what);
                const Tensor again = output(rows, width);
                engine().layer_norm(tensor(normalised), {}, tensor(gain), tensor(bias), static_cast<float>(eps), again,
                                    {}, {});
                EXPECT_EQ(values(again).values, values(y).values) << what;
            }
        }
    }
}

TEST_P(EncoderTest, layer_norm_backward_as_defined)
{
    for (const std::int64_t rows : row_counts) {
        for (const std::int64_t width : widths) {
            const Matrix x = random_matrix(rows, width, 1, 3), gain = random_matrix(1, width, 2);
            const Matrix bias = random_matrix(1, width, 7), dy = random_matrix(rows, width, 3);
            const Matrix dgain_before = random_matrix(1, width, 5), dbias_before = random_matrix(1, width, 6);
            const double eps = width == 1 ? 1 : 1e-3;
            const Tensor x_t = tensor(x, 1), y = output(rows, width), mean = output(1, rows), rstd = output(1, rows);
            engine().layer_norm(x_t, {}, tensor(gain), tensor(bias), static_cast<float>(eps), y, mean, rstd);
            reference::LayerNormGradient expected =
                reference::layer_norm_backward(x, gain, static_cast<double>(static_cast<float>(eps)), dy);
            const reference::LayerNorm forward = reference::layer_norm(x, gain, bias, eps);
            const double scale = largest_magnitude(as_row(std::span<const double>(forward.rstd)));
            for (std::size_t i = 0; i < expected.dgain.values.size(); ++i) {
                expected.dgain.values[i] += dgain_before.values[i];
                expected.dbias.values[i] += dbias_before.values[i];
            }
            for (const bool in_place : {false, true}) {
                const Tensor dy_t = tensor(dy, 2), dx = in_place ? dy_t : output(rows, width, 3);
                const Tensor dgain = tensor(dgain_before), dbias = tensor(dbias_before);
                engine().layer_norm_backward(x_t, tensor(gain), mean, rstd, dy_t, dx, dgain, dbias);
                // the terms of dx cancel: errors are relative to |dy gain| rstd
                const double terms = largest_magnitude(dy) * largest_magnitude(gain) * scale;
                const std::string what = cat(rows, " x ", width, in_place ? " in place" : "");
                expect_close(values(dx), expected.dx, 4e-6 * (terms * (1 + scale) + 1), "dx of " + what);
                expect_close(values(dgain), expected.dgain,
                             2e-6 * (12 + std::sqrt(static_cast<double>(rows)) * (1 + scale)), "dgain of " + what);
                expect_close(values(dbias), expected.dbias, 2e-5, "dbias of " + what);
                const Tensor alone = output(rows, width, 3);
                engine().layer_norm_backward(x_t, tensor(gain), mean, rstd, tensor(dy, 2), alone, {}, {});
                EXPECT_EQ(values(alone).values, values(dx).values) << "without dgain and dbias of " << what;
            }
        }
    }
}

TEST_P(EncoderTest, gelu_and_its_backward)
{
    for (const std::int64_t rows : row_counts) {
        for (const std::int64_t width : widths) {
            const Matrix x = random_matrix(rows, width, 1, 3), da = random_matrix(rows, width, 2);
            Matrix expected(rows, width), gradient(rows, width);
            for (std::size_t i = 0; i < x.values.size(); ++i) {
                const double v = x.values[i];
                expected.values[i] = v * reference::normal_distribution(v);
                gradient.values[i] =
                    da.values[i] * (reference::normal_distribution(v) + v * reference::normal_density(v));
            }
            const Tensor a = output(rows, width, 1), again = output(rows, width, 1), x_t = tensor(x, 5);
            engine().gelu(x_t, a);
            // exp and the rest of the tail are each good to 2e-7; a rounding of x^2/2 counts x^2/2 times
            const auto tolerance = [&](std::size_t i) {
                return 5e-7 * std::abs(expected.values[i]) * (1 + x.values[i] * x.values[i]) + 1e-30;
            };
            expect_close(values(a), expected, tolerance, cat("gelu of ", rows, " x ", width));
            engine().gelu_backward(x_t, tensor(da, 2), again);
            expect_close(values(again), expected, tolerance, cat("recomputed gelu of ", rows, " x ", width));
            const auto gradient_tolerance = [&](std::size_t i) {
                return 4e-7 * std::abs(da.values[i]) * (1 + std::abs(x.values[i]));
            };
            expect_close(values(x_t), gradient, gradient_tolerance, cat("gelu backward of ", rows, " x ", width));
        }
    }
}

TEST_P(EncoderTest, gelu_of_extreme_numbers)
{
    Matrix x(1, 16);
    const std::vector<double> numbers = {-1e30, -200, -20, -13.3, -13, -8, -0.0, 0, 1e-30, 1e-3, 8, 13, 20, 200, 1e30, 3e38};
    x.values = numbers;
    for (double& value : x.values)
        value = static_cast<double>(static_cast<float>(value));
    const Tensor x_t = tensor(x), a = output(1, 16), da = tensor(random_matrix(1, 16, 1));
    engine().gelu(x_t, a);
    const Matrix result = values(a);
    for (std::size_t i = 0; i < 16; ++i) {
        const double expected = x.values[i] * reference::normal_distribution(x.values[i]);
        EXPECT_NEAR(result.values[i], expected, 1e-6 * std::abs(expected) + 1e-15) << numbers[i];
    }
    engine().gelu_backward(x_t, da, a);
    for (const double value : values(x_t).values)
        EXPECT_TRUE(std::isfinite(value));
    Matrix nan(1, 16);
    nan.values.assign(16, std::numeric_limits<double>::quiet_NaN());
    engine().gelu(tensor(nan), a);
    for (const double value : values(a).values)
        EXPECT_TRUE(std::isnan(value));
}

TEST_P(EncoderTest, tanh_and_its_backward)
{
    for (const std::int64_t width : {1, 33, 130}) {
        const Matrix x = random_matrix(9, width, 1, 2), d = random_matrix(9, width, 2);
        Matrix expected = x, gradient = d;
        for (std::size_t i = 0; i < x.values.size(); ++i) {
            expected.values[i] = std::tanh(x.values[i]);
            gradient.values[i] *= 1 - expected.values[i] * expected.values[i];
        }
        const Tensor y = tensor(x, 3), dy = tensor(d, 1);
        engine().tanh(y);
        expect_close(values(y), expected, 2e-7, "tanh");
        engine().tanh_backward(y, dy);
        expect_close(values(dy), gradient, 1e-6, "tanh backward");
    }
}

SELM_INSTANTIATE_ENGINES(EncoderTest);

} // namespace
} // namespace selm
