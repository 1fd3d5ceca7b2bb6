#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "selm/kernels/engine.hpp"

// The operations of Engine as plain loops in double, written from their definitions: what the engines are compared
// with.
namespace reference {

struct Matrix {
    std::int64_t rows = 0;
    std::int64_t columns = 0;
    std::vector<double> values;

    Matrix() = default;
    Matrix(std::int64_t r, std::int64_t c) : rows(r), columns(c), values(static_cast<std::size_t>(r * c)) {}
    double& operator()(std::int64_t r, std::int64_t c) { return values[static_cast<std::size_t>(r * columns + c)]; }
    double operator()(std::int64_t r, std::int64_t c) const
    {
        return values[static_cast<std::size_t>(r * columns + c)];
    }
};

// --- linear ---------------------------------------------------------------------------------------------------------

inline Matrix transposed(const Matrix& a)
{
    Matrix out(a.columns, a.rows);
    for (std::int64_t i = 0; i < a.rows; ++i)
        for (std::int64_t j = 0; j < a.columns; ++j)
            out(j, i) = a(i, j);
    return out;
}

inline Matrix magnitudes(Matrix a)
{
    for (double& value : a.values)
        value = std::abs(value);
    return a;
}

/// a b
inline Matrix product(const Matrix& a, const Matrix& b)
{
    Matrix out(a.rows, b.columns);
    for (std::int64_t i = 0; i < a.rows; ++i)
        for (std::int64_t k = 0; k < a.columns; ++k)
            for (std::int64_t j = 0; j < b.columns; ++j)
                out(i, j) += a(i, k) * b(k, j);
    return out;
}

// --- normalisation, rotation, activation ----------------------------------------------------------------------------

struct Norm {
    Matrix y;
    std::vector<double> rstd;
};

inline Norm rms_norm(const Matrix& x, const Matrix& gain, double eps)
{
    Norm out{Matrix(x.rows, x.columns), {}};
    for (std::int64_t t = 0; t < x.rows; ++t) {
        double squares = 0;
        for (std::int64_t h = 0; h < x.columns; ++h)
            squares += x(t, h) * x(t, h);
        out.rstd.push_back(1 / std::sqrt(squares / static_cast<double>(x.columns) + eps));
        for (std::int64_t h = 0; h < x.columns; ++h)
            out.y(t, h) = gain(0, h) * x(t, h) * out.rstd.back();
    }
    return out;
}

struct NormGradient {
    Matrix dx;
    Matrix dgain;
};

/// With r = rstd: y_h = g_h x_h r and dr/dx_j = -r^3 x_j / H.
inline NormGradient rms_norm_backward(const Matrix& x, const Matrix& gain, double eps, const Matrix& dy)
{
    NormGradient out{Matrix(x.rows, x.columns), Matrix(1, x.columns)};
    const std::vector<double> rstd = rms_norm(x, gain, eps).rstd;
    for (std::int64_t t = 0; t < x.rows; ++t) {
        const double r = rstd[static_cast<std::size_t>(t)];
        double dr = 0;
        for (std::int64_t h = 0; h < x.columns; ++h) {
            dr += dy(t, h) * gain(0, h) * x(t, h);
            out.dgain(0, h) += dy(t, h) * x(t, h) * r;
        }
        for (std::int64_t j = 0; j < x.columns; ++j)
            out.dx(t, j) = dy(t, j) * gain(0, j) * r - dr * r * r * r * x(t, j) / static_cast<double>(x.columns);
    }
    return out;
}

/// Query and key heads as complex numbers (x_j, x_{j + D/2}), turned by the angle of (position, j).
inline Matrix rope(Matrix qkv, const selm::AttentionShape& shape, std::span<const std::int32_t> positions,
                   const Matrix& cos, const Matrix& sin, bool backward)
{
    const std::int64_t half = shape.head_dim / 2;
    for (std::int64_t t = 0; t < qkv.rows; ++t) {
        const std::int64_t position = positions[static_cast<std::size_t>(t)];
        for (std::int64_t head = 0; head < shape.heads + shape.kv_heads; ++head) {
            for (std::int64_t j = 0; j < half; ++j) {
                double& real = qkv(t, head * shape.head_dim + j);
                double& imaginary = qkv(t, head * shape.head_dim + half + j);
                const double c = cos(position, j);
                const double s = backward ? -sin(position, j) : sin(position, j);
                const double turned = real * c - imaginary * s;
                imaginary = real * s + imaginary * c;
                real = turned;
            }
        }
    }
    return qkv;
}

inline double silu(double x) { return x / (1 + std::exp(-x)); }

inline Matrix swiglu(const Matrix& gate_up)
{
    Matrix out(gate_up.rows, gate_up.columns / 2);
    for (std::int64_t t = 0; t < out.rows; ++t)
        for (std::int64_t i = 0; i < out.columns; ++i)
            out(t, i) = silu(gate_up(t, i)) * gate_up(t, out.columns + i);
    return out;
}

/// d(gate) | d(up)
inline Matrix swiglu_backward(const Matrix& gate_up, const Matrix& da)
{
    Matrix out(gate_up.rows, gate_up.columns);
    for (std::int64_t t = 0; t < da.rows; ++t) {
        for (std::int64_t i = 0; i < da.columns; ++i) {
            const double gate = gate_up(t, i);
            const double e = std::exp(-gate);
            const double slope = 1 / (1 + e) + gate * e / ((1 + e) * (1 + e));
            out(t, i) = da(t, i) * gate_up(t, da.columns + i) * slope;
            out(t, da.columns + i) = da(t, i) * silu(gate);
        }
    }
    return out;
}

// --- attention ------------------------------------------------------------------------------------------------------

/// Rows that token `row` of segment `segment` attends to.
inline std::vector<std::int64_t> visible_rows(std::span<const selm::Segment> segments, const selm::Segment& segment,
                                              std::int64_t row)
{
    std::vector<std::int64_t> rows;
    if (segment.trunk >= 0) {
        const selm::Segment& trunk = segments[static_cast<std::size_t>(segment.trunk)];
        for (std::int64_t i = 0; i < trunk.length; ++i)
            rows.push_back(trunk.begin + i);
    }
    for (std::int64_t i = segment.begin; i <= row; ++i)
        rows.push_back(i);
    return rows;
}

struct Columns {
    std::int64_t q, k, v; ///< first columns of a query head and its key and value heads
};

inline Columns columns_of(const selm::AttentionShape& shape, std::int64_t head)
{
    const std::int64_t kv = head / (shape.heads / shape.kv_heads);
    return {head * shape.head_dim, (shape.heads + kv) * shape.head_dim,
            (shape.heads + shape.kv_heads + kv) * shape.head_dim};
}

inline std::vector<double> scaled_scores(const Matrix& qkv, const selm::AttentionShape& shape, std::int64_t row,
                                         const Columns& at, std::span<const std::int64_t> keys)
{
    std::vector<double> scores;
    for (const std::int64_t key : keys) {
        double dot = 0;
        for (std::int64_t d = 0; d < shape.head_dim; ++d)
            dot += qkv(row, at.q + d) * qkv(key, at.k + d);
        scores.push_back(dot * static_cast<double>(shape.scale));
    }
    return scores;
}

inline double log_sum_exp(std::span<const double> x)
{
    double largest = x[0];
    for (const double value : x)
        largest = std::max(largest, value);
    double sum = 0;
    for (const double value : x)
        sum += std::exp(value - largest);
    return largest + std::log(sum);
}

struct Attention {
    Matrix out; ///< [T, NH*D]
    Matrix lse; ///< [NH, T]
};

/// One row of a result, from the keys that it sees.
inline void attend_row(const Matrix& qkv, const selm::AttentionShape& shape, std::int64_t row,
                       std::span<const std::int64_t> keys, Attention& result)
{
    for (std::int64_t head = 0; head < shape.heads; ++head) {
        const Columns at = columns_of(shape, head);
        const std::vector<double> scores = scaled_scores(qkv, shape, row, at, keys);
        const double lse = log_sum_exp(scores);
        result.lse(head, row) = lse;
        for (std::size_t j = 0; j < keys.size(); ++j) {
            const double p = std::exp(scores[j] - lse);
            for (std::int64_t d = 0; d < shape.head_dim; ++d)
                result.out(row, at.q + d) += p * qkv(keys[j], at.v + d);
        }
    }
}

inline Attention attention(const Matrix& qkv, const selm::AttentionShape& shape,
                           std::span<const selm::Segment> segments)
{
    Attention result{Matrix(qkv.rows, shape.heads * shape.head_dim), Matrix(shape.heads, qkv.rows)};
    for (const selm::Segment& segment : segments) {
        for (std::int64_t row = segment.begin; row < segment.begin + segment.length; ++row)
            attend_row(qkv, shape, row, visible_rows(segments, segment, row), result);
    }
    return result;
}

inline Matrix attention_backward(const Matrix& qkv, const selm::AttentionShape& shape,
                                 std::span<const selm::Segment> segments, const Matrix& dout)
{
    Matrix dqkv(qkv.rows, qkv.columns);
    for (const selm::Segment& segment : segments) {
        for (std::int64_t row = segment.begin; row < segment.begin + segment.length; ++row) {
            const std::vector<std::int64_t> keys = visible_rows(segments, segment, row);
            for (std::int64_t head = 0; head < shape.heads; ++head) {
                const Columns at = columns_of(shape, head);
                const std::vector<double> scores = scaled_scores(qkv, shape, row, at, keys);
                const double lse = log_sum_exp(scores);
                std::vector<double> dp(keys.size());
                double mean_dp = 0;
                for (std::size_t j = 0; j < keys.size(); ++j) {
                    const double p = std::exp(scores[j] - lse);
                    for (std::int64_t d = 0; d < shape.head_dim; ++d) {
                        dp[j] += dout(row, at.q + d) * qkv(keys[j], at.v + d);
                        dqkv(keys[j], at.v + d) += p * dout(row, at.q + d);
                    }
                    mean_dp += p * dp[j];
                }
                for (std::size_t j = 0; j < keys.size(); ++j) {
                    const double ds = std::exp(scores[j] - lse) * (dp[j] - mean_dp) * static_cast<double>(shape.scale);
                    for (std::int64_t d = 0; d < shape.head_dim; ++d) {
                        dqkv(row, at.q + d) += ds * qkv(keys[j], at.k + d);
                        dqkv(keys[j], at.k + d) += ds * qkv(row, at.q + d);
                    }
                }
            }
        }
    }
    return dqkv;
}

/**
 * What the rounding of softmax weights p and of d(scores) ds before they are multiplied can do to attention, as sums of
 * magnitudes; a relative error e of each of them gives an error of up to e times these.
 */
struct AttentionMagnitudes {
    Matrix out;  ///< sums of p |v|
    Matrix dqkv; ///< sums of p |dout|; of |ds| |k| and |ds| |q|, |ds| as if dp and its mean had the same sign
};

inline AttentionMagnitudes attention_magnitudes(const Matrix& qkv, const selm::AttentionShape& shape,
                                                std::span<const selm::Segment> segments, const Matrix& dout)
{
    AttentionMagnitudes result{Matrix(qkv.rows, shape.heads * shape.head_dim), Matrix(qkv.rows, qkv.columns)};
    for (const selm::Segment& segment : segments) {
        for (std::int64_t row = segment.begin; row < segment.begin + segment.length; ++row) {
            const std::vector<std::int64_t> keys = visible_rows(segments, segment, row);
            for (std::int64_t head = 0; head < shape.heads; ++head) {
                const Columns at = columns_of(shape, head);
                const std::vector<double> scores = scaled_scores(qkv, shape, row, at, keys);
                const double lse = log_sum_exp(scores);
                std::vector<double> p(keys.size()), dp(keys.size());
                double mean_dp = 0;
                for (std::size_t j = 0; j < keys.size(); ++j) {
                    p[j] = std::exp(scores[j] - lse);
                    for (std::int64_t d = 0; d < shape.head_dim; ++d) {
                        dp[j] += dout(row, at.q + d) * qkv(keys[j], at.v + d);
                        result.out(row, at.q + d) += p[j] * std::abs(qkv(keys[j], at.v + d));
                        result.dqkv(keys[j], at.v + d) += p[j] * std::abs(dout(row, at.q + d));
                    }
                    mean_dp += p[j] * std::abs(dp[j]);
                }
                for (std::size_t j = 0; j < keys.size(); ++j) {
                    const double ds = p[j] * (std::abs(dp[j]) + mean_dp) * static_cast<double>(shape.scale);
                    for (std::int64_t d = 0; d < shape.head_dim; ++d) {
                        result.dqkv(row, at.q + d) += ds * std::abs(qkv(keys[j], at.k + d));
                        result.dqkv(keys[j], at.k + d) += ds * std::abs(qkv(row, at.q + d));
                    }
                }
            }
        }
    }
    return result;
}

// --- output head ----------------------------------------------------------------------------------------------------

struct HeadScores {
    std::vector<double> log_probs;
    std::vector<double> lse;
};

inline HeadScores head_log_probs(const Matrix& h, const Matrix& w, std::span<const std::int32_t> targets)
{
    const Matrix logits = product(h, transposed(w));
    HeadScores out;
    for (std::int64_t r = 0; r < h.rows; ++r) {
        const std::span<const double> row(&logits.values[static_cast<std::size_t>(r * logits.columns)],
                                          static_cast<std::size_t>(logits.columns));
        out.lse.push_back(log_sum_exp(row));
        out.log_probs.push_back(row[static_cast<std::size_t>(targets[static_cast<std::size_t>(r)])] - out.lse.back());
    }
    return out;
}

struct HeadGradient {
    Matrix dh;
    Matrix dw;
};

inline HeadGradient head_log_probs_backward(const Matrix& h, const Matrix& w, std::span<const std::int32_t> targets,
                                            std::span<const double> g)
{
    Matrix d = product(h, transposed(w));
    const std::vector<double> lse = head_log_probs(h, w, targets).lse;
    for (std::int64_t r = 0; r < h.rows; ++r) {
        const auto i = static_cast<std::size_t>(r);
        for (std::int64_t v = 0; v < w.rows; ++v)
            d(r, v) = g[i] * ((v == targets[i] ? 1.0 : 0.0) - std::exp(d(r, v) - lse[i]));
    }
    return {product(d, w), product(transposed(d), h)};
}

// --- optimizer ------------------------------------------------------------------------------------------------------

/// One element of AdamW (Loshchilov & Hutter 2019, algorithm 2 with torch's decay lr*wd applied first).
inline void adamw(const selm::AdamWOptions& o, double gradient, double& master, double& exp_avg, double& exp_avg_sq)
{
    const double g = gradient * o.gradient_scale;
    const auto t = static_cast<double>(o.step_count);
    master *= 1 - o.learning_rate * o.weight_decay;
    exp_avg = o.beta1 * exp_avg + (1 - o.beta1) * g;
    exp_avg_sq = o.beta2 * exp_avg_sq + (1 - o.beta2) * g * g;
    const double m = exp_avg / (1 - std::pow(o.beta1, t));
    const double v = exp_avg_sq / (1 - std::pow(o.beta2, t));
    master -= o.learning_rate * m / (std::sqrt(v) + o.epsilon);
}

} // namespace reference
