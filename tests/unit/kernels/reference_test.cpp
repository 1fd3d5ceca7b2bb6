#include "engine_test_support.hpp"

// The backward references are themselves checked: central differences of the forward references, in double.
namespace selm {
namespace {

using Loss = std::function<double(const Matrix&)>;

double dot(const Matrix& a, const Matrix& b)
{
    double sum = 0;
    for (std::size_t i = 0; i < a.values.size(); ++i)
        sum += a.values[i] * b.values[i];
    return sum;
}

/// d loss / d x with steps of 1e-5: off by about 1e-10 (third derivative) + 1e-11 (rounding).
Matrix differences(const Loss& loss, Matrix x)
{
    constexpr double step = 1e-5;
    Matrix out(x.rows, x.columns);
    for (std::size_t i = 0; i < x.values.size(); ++i) {
        const double value = x.values[i];
        x.values[i] = value + step;
        const double above = loss(x);
        x.values[i] = value - step;
        const double below = loss(x);
        x.values[i] = value;
        out.values[i] = (above - below) / (2 * step);
    }
    return out;
}

constexpr double tolerance = 1e-8;

TEST(ReferenceTest, attention_backward_equals_differences)
{
    const AttentionShape shape{4, 2, 3, 0.57735027f};
    const std::vector<Segment> segments = {{0, 4, -1}, {4, 3, 0}, {7, 1, 0}, {8, 2, -1}, {10, 2, 3}};
    const Matrix qkv = random_matrix(12, 24, 1), d_out = random_matrix(12, 12, 2);
    const Matrix numeric =
        differences([&](const Matrix& x) { return dot(reference::attention(x, shape, segments).out, d_out); }, qkv);
    expect_close(reference::attention_backward(qkv, shape, segments, d_out), numeric, tolerance, "dqkv");
}

TEST(ReferenceTest, rms_norm_backward_equals_differences)
{
    const Matrix x = random_matrix(3, 5, 1), gain = random_matrix(1, 5, 2), dy = random_matrix(3, 5, 3);
    const reference::NormGradient gradient = reference::rms_norm_backward(x, gain, 1e-3, dy);
    expect_close(gradient.dx,
                 differences([&](const Matrix& v) { return dot(reference::rms_norm(v, gain, 1e-3).y, dy); }, x),
                 tolerance, "dx");
    expect_close(gradient.dgain,
                 differences([&](const Matrix& v) { return dot(reference::rms_norm(x, v, 1e-3).y, dy); }, gain),
                 tolerance, "dgain");
}

TEST(ReferenceTest, swiglu_backward_equals_differences)
{
    const Matrix gate_up = random_matrix(3, 10, 1, 2), da = random_matrix(3, 5, 2);
    expect_close(reference::swiglu_backward(gate_up, da),
                 differences([&](const Matrix& v) { return dot(reference::swiglu(v), da); }, gate_up), tolerance,
                 "d gate_up");
}

TEST(ReferenceTest, head_backward_equals_differences)
{
    const Matrix h = random_matrix(3, 4, 1), w = random_matrix(6, 4, 2), g = random_matrix(1, 3, 3);
    const std::vector<std::int32_t> targets = {5, 0, 2};
    const auto loss = [&](const Matrix& hidden, const Matrix& weight) {
        return dot(as_row(std::span<const double>(reference::head_log_probs(hidden, weight, targets).log_probs)), g);
    };
    const reference::HeadGradient gradient = reference::head_log_probs_backward(h, w, targets, g.values);
    expect_close(gradient.dh, differences([&](const Matrix& v) { return loss(v, w); }, h), tolerance, "dh");
    expect_close(gradient.dw, differences([&](const Matrix& v) { return loss(h, v); }, w), tolerance, "dw");
}

TEST(ReferenceTest, rope_backward_undoes_rope)
{
    const AttentionShape shape{2, 1, 6, 1};
    const Matrix qkv = random_matrix(2, 24, 1);
    Matrix cos(9, 3), sin(9, 3);
    for (std::int64_t p = 0; p < 9; ++p) {
        for (std::int64_t j = 0; j < 3; ++j) {
            cos(p, j) = std::cos(0.3 * static_cast<double>(p * (j + 1)));
            sin(p, j) = std::sin(0.3 * static_cast<double>(p * (j + 1)));
        }
    }
    const std::vector<std::int32_t> positions = {8, 3};
    const Matrix turned = reference::rope(qkv, shape, positions, cos, sin, false);
    EXPECT_GT(std::abs(turned(0, 0) - qkv(0, 0)), 1e-3);
    expect_close(reference::rope(turned, shape, positions, cos, sin, true), qkv, 1e-12, "there and back");
}

} // namespace
} // namespace selm
