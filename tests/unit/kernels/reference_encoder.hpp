#pragma once

#include "reference.hpp"

// The operations of encoders with LayerNorm, GELU and disentangled attention as plain loops in double.
namespace reference {

struct LayerNorm {
    Matrix y;
    std::vector<double> mean, rstd;
};

inline LayerNorm layer_norm(const Matrix& x, const Matrix& gain, const Matrix& bias, double eps)
{
    LayerNorm out{Matrix(x.rows, x.columns), {}, {}};
    const auto count = static_cast<double>(x.columns);
    for (std::int64_t t = 0; t < x.rows; ++t) {
        double mean = 0, variance = 0;
        for (std::int64_t h = 0; h < x.columns; ++h)
            mean += x(t, h) / count;
        for (std::int64_t h = 0; h < x.columns; ++h)
            variance += (x(t, h) - mean) * (x(t, h) - mean) / count;
        out.mean.push_back(mean);
        out.rstd.push_back(1 / std::sqrt(variance + eps));
        for (std::int64_t h = 0; h < x.columns; ++h)
            out.y(t, h) = gain(0, h) * (x(t, h) - mean) * out.rstd.back() + bias(0, h);
    }
    return out;
}

struct LayerNormGradient {
    Matrix dx, dgain, dbias;
};

/// From the chain rule: y_h = g_h n_h + b_h, n_h = (x_h - m) r, dm/dx_j = 1/H, dr/dx_j = -r^3 (x_j - m) / H.
inline LayerNormGradient layer_norm_backward(const Matrix& x, const Matrix& gain, double eps, const Matrix& dy)
{
    LayerNormGradient out{Matrix(x.rows, x.columns), Matrix(1, x.columns), Matrix(1, x.columns)};
    const LayerNorm forward = layer_norm(x, gain, Matrix(1, x.columns), eps);
    const auto count = static_cast<double>(x.columns);
    for (std::int64_t t = 0; t < x.rows; ++t) {
        const double m = forward.mean[static_cast<std::size_t>(t)], r = forward.rstd[static_cast<std::size_t>(t)];
        double dm = 0, dr = 0;
        for (std::int64_t h = 0; h < x.columns; ++h) {
            dm -= dy(t, h) * gain(0, h) * r;
            dr += dy(t, h) * gain(0, h) * (x(t, h) - m);
            out.dgain(0, h) += dy(t, h) * (x(t, h) - m) * r;
            out.dbias(0, h) += dy(t, h);
        }
        for (std::int64_t j = 0; j < x.columns; ++j)
            out.dx(t, j) = dy(t, j) * gain(0, j) * r + dm / count - dr * r * r * r * (x(t, j) - m) / count;
    }
    return out;
}

inline double normal_distribution(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }
inline double normal_density(double x) { return std::exp(-0.5 * x * x) / std::sqrt(2 * std::acos(-1.0)); }

// --- disentangled attention: scores by definition, gradients term by term ------------------------------------------

struct DisentangledColumns {
    std::int64_t q, k, v, relative_q, relative_k;
};

inline DisentangledColumns disentangled_columns(const selm::DisentangledShape& shape, std::int64_t head)
{
    const std::int64_t width = shape.heads * shape.head_dim, first = head * shape.head_dim;
    return {first, width + first, 2 * width + first, first, width + first};
}

inline std::int64_t relative_row(const selm::DisentangledShape& shape, std::int64_t distance)
{
    const auto middle = static_cast<std::int64_t>(shape.relative_index.size() / 2);
    return shape.relative_index[static_cast<std::size_t>(middle + distance)];
}

/// log-softmax over the segment's keys, and the scores themselves.
inline std::vector<double> disentangled_scores(const Matrix& qkv, const Matrix& relative,
                                               const selm::DisentangledShape& shape, const selm::Segment& segment,
                                               std::int64_t query, const DisentangledColumns& at)
{
    std::vector<double> scores;
    for (std::int64_t key = segment.begin; key < segment.begin + segment.length; ++key) {
        const std::int64_t r = relative_row(shape, query - key);
        double sum = 0;
        for (std::int64_t d = 0; d < shape.head_dim; ++d)
            sum += qkv(query, at.q + d) * qkv(key, at.k + d) + qkv(query, at.q + d) * relative(r, at.relative_k + d) +
                   qkv(key, at.k + d) * relative(r, at.relative_q + d);
        scores.push_back(sum * static_cast<double>(shape.scale));
    }
    return scores;
}

inline Attention disentangled_attention(const Matrix& qkv, const Matrix& relative, const selm::DisentangledShape& shape,
                                        std::span<const selm::Segment> segments)
{
    Attention result{Matrix(qkv.rows, shape.heads * shape.head_dim), Matrix(shape.heads, qkv.rows)};
    for (const selm::Segment& segment : segments) {
        for (std::int64_t query = segment.begin; query < segment.begin + segment.length; ++query) {
            for (std::int64_t head = 0; head < shape.heads; ++head) {
                const DisentangledColumns at = disentangled_columns(shape, head);
                const std::vector<double> scores = disentangled_scores(qkv, relative, shape, segment, query, at);
                const double lse = log_sum_exp(scores);
                result.lse(head, query) = lse;
                for (std::size_t j = 0; j < scores.size(); ++j)
                    for (std::int64_t d = 0; d < shape.head_dim; ++d)
                        result.out(query, at.q + d) += std::exp(scores[j] - lse) *
                                                       qkv(segment.begin + static_cast<std::int64_t>(j), at.v + d);
            }
        }
    }
    return result;
}

struct DisentangledGradient {
    Matrix dqkv, drelative;
};

inline DisentangledGradient disentangled_attention_backward(const Matrix& qkv, const Matrix& relative,
                                                            const selm::DisentangledShape& shape,
                                                            std::span<const selm::Segment> segments, const Matrix& dout)
{
    DisentangledGradient g{Matrix(qkv.rows, qkv.columns), Matrix(relative.rows, relative.columns)};
    for (const selm::Segment& segment : segments) {
        for (std::int64_t query = segment.begin; query < segment.begin + segment.length; ++query) {
            for (std::int64_t head = 0; head < shape.heads; ++head) {
                const DisentangledColumns at = disentangled_columns(shape, head);
                const std::vector<double> scores = disentangled_scores(qkv, relative, shape, segment, query, at);
                const double lse = log_sum_exp(scores);
                std::vector<double> dp(scores.size());
                double mean_dp = 0;
                for (std::size_t j = 0; j < scores.size(); ++j) {
                    const std::int64_t key = segment.begin + static_cast<std::int64_t>(j);
                    const double p = std::exp(scores[j] - lse);
                    for (std::int64_t d = 0; d < shape.head_dim; ++d) {
                        dp[j] += dout(query, at.q + d) * qkv(key, at.v + d);
                        g.dqkv(key, at.v + d) += p * dout(query, at.q + d);
                    }
                    mean_dp += p * dp[j];
                }
                for (std::size_t j = 0; j < scores.size(); ++j) {
                    const std::int64_t key = segment.begin + static_cast<std::int64_t>(j);
                    const std::int64_t r = relative_row(shape, query - key);
                    const double ds = std::exp(scores[j] - lse) * (dp[j] - mean_dp) * static_cast<double>(shape.scale);
                    for (std::int64_t d = 0; d < shape.head_dim; ++d) {
                        g.dqkv(query, at.q + d) += ds * (qkv(key, at.k + d) + relative(r, at.relative_k + d));
                        g.dqkv(key, at.k + d) += ds * (qkv(query, at.q + d) + relative(r, at.relative_q + d));
                        g.drelative(r, at.relative_k + d) += ds * qkv(query, at.q + d);
                        g.drelative(r, at.relative_q + d) += ds * qkv(key, at.k + d);
                    }
                }
            }
        }
    }
    return g;
}

} // namespace reference
