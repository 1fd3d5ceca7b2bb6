#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "bf16_rows.hpp"
#include "selm/base/error.hpp"
#include "simd.hpp"
#include "xsmm_blocks.hpp"
#include "xsmm_engine.hpp"

// Log-probs of the output head without a matrix of logits [R, V]: tiles of rows by a slice of the vocabulary, an online
// log-sum-exp in the forward pass, recomputed tiles in the backward pass.
namespace selm::xsmm {
namespace {

using simd::Float8;

/// Rows that share one sweep over the vocabulary's panels, at most, and columns of a logit tile (a multiple of every
/// panel width).
constexpr std::int64_t rows_per_sweep = 256, columns_per_tile = 256;

struct RowState {
    float max = -std::numeric_limits<float>::infinity();
    double sum = 0;   ///< of exp(logit - max)
    float target = 0; ///< the target's logit
};

/// Extends the row's log-sum-exp by `count` logits; the tile's row is readable and writable up to a multiple of 8.
void add_logits(float* logits, std::int64_t count, RowState& state)
{
    const std::int64_t padded = (count + 7) / 8 * 8;
    std::fill(logits + count, logits + padded, -std::numeric_limits<float>::infinity());
    Float8 largest = simd::load(logits);
    for (std::int64_t i = 8; i < padded; i += 8)
        largest = simd::max(largest, simd::load(logits + i));
    const float new_max = std::max(state.max, simd::max_lanes(largest));
    Float8 sum = simd::broadcast(0.0f);
    for (std::int64_t i = 0; i < padded; i += 8)
        sum += simd::exp_nonpositive(simd::load(logits + i) - new_max);
    if (new_max != state.max)
        state.sum *= std::exp(static_cast<double>(state.max) - static_cast<double>(new_max));
    state.sum += static_cast<double>(simd::sum_lanes(sum));
    state.max = new_max;
}

/**
 * A tile of logits (columns from `column` on) becomes d(loss)/d(logits) = g * (onehot(target) - p). The target's
 * entry is computed as -g * expm1(log p), which is exact to rounding even where p is close to 1.
 */
void differentiate_tile(float* tile, std::int64_t column, std::int64_t columns, std::span<const std::int32_t> targets,
                        std::span<const float> lse, std::span<const float> g)
{
    const std::int64_t padded = (columns + 7) / 8 * 8;
    for (std::size_t row = 0; row < targets.size(); ++row) {
        float* const logits = tile + static_cast<std::int64_t>(row) * columns_per_tile;
        std::fill(logits + columns, logits + padded, -std::numeric_limits<float>::infinity());
        const std::int64_t target = targets[row] - column;
        const bool has_target = target >= 0 && target < columns;
        const float target_log_prob = has_target ? logits[target] - lse[row] : 0.0f;
        for (std::int64_t i = 0; i < padded; i += 8)
            simd::store(logits + i, simd::exp_nonpositive(simd::load(logits + i) - lse[row]) * -g[row]);
        if (has_target)
            logits[target] = -g[row] * std::expm1(target_log_prob);
    }
}

void check_targets(std::span<const std::int32_t> targets, std::int64_t vocabulary)
{
    for (const std::int32_t target : targets)
        SELM_EXPECT(target >= 0 && target < vocabulary);
}

} // namespace

void XsmmEngine::logits(const Tensor& h_RH, const PackedWeight& head, const Tensor& logits_RV)
{
    multiply_linear(h_RH, head, logits_RV, nullptr, false);
}

const float* XsmmEngine::rounded_for_head(const Tensor& h_RH)
{
    if (!uses_bf16_)
        return nullptr;
    const std::int64_t pairs = pairs_of(h_RH.columns);
    float* const rounded = head_rows_.get(h_RH.rows * pairs);
    pair_columns(h_RH.f32(), h_RH.stride, h_RH.rows, h_RH.columns, rounded, pairs);
    return rounded;
}

void XsmmEngine::multiply_head_tile(const Tensor& h_RH, const float* rounded, const PackedWeight& head, std::int64_t row,
                                    std::int64_t rows, std::int64_t column, std::int64_t columns, float* tile)
{
    multiply({.x = h_RH.row_f32(row),
              .x_stride = h_RH.stride,
              .rounded_x = rounded == nullptr ? nullptr : rounded + row * pairs_of(head.inputs),
              .rows = rows,
              .inputs = head.inputs,
              .outputs = columns,
              .panels = forward_panels(head).from(column / kernels_.panel_width() * panel_numbers(head.inputs)),
              .y = tile,
              .y_stride = columns_per_tile,
              .bias = nullptr,
              .accumulate = false});
}

void XsmmEngine::head_log_probs(const Tensor& h_RH, const PackedWeight& head, std::span<const std::int32_t> targets,
                                std::span<float> log_probs, std::span<float> lse)
{
    const std::int64_t rows = h_RH.rows, vocabulary = head.outputs;
    SELM_EXPECT(h_RH.columns == head.inputs && static_cast<std::int64_t>(targets.size()) == rows);
    SELM_EXPECT(log_probs.size() == targets.size() && lse.size() == targets.size());
    check_targets(targets, vocabulary);
    float* const tile = logit_tile_.get(rows_per_sweep * columns_per_tile);
    const float* const rounded = rounded_for_head(h_RH);
    std::vector<RowState> states(static_cast<std::size_t>(rows));
    const std::int64_t sweep_rows = even_block(rows, rows_per_sweep, rows_per_call);
    for (std::int64_t column = 0; column < vocabulary; column += columns_per_tile) {
        const std::int64_t columns = std::min(columns_per_tile, vocabulary - column);
        for (std::int64_t sweep = 0; sweep < rows; sweep += sweep_rows) {
            const std::int64_t count = std::min(sweep_rows, rows - sweep);
            multiply_head_tile(h_RH, rounded, head, sweep, count, column, columns, tile);
            for (std::int64_t i = 0; i < count; ++i) {
                RowState& state = states[static_cast<std::size_t>(sweep + i)];
                const std::int64_t target = targets[static_cast<std::size_t>(sweep + i)] - column;
                if (target >= 0 && target < columns)
                    state.target = tile[i * columns_per_tile + target];
                add_logits(tile + i * columns_per_tile, columns, state);
            }
        }
    }
    for (std::size_t row = 0; row < states.size(); ++row) {
        const RowState& state = states[row];
        const double log_sum = static_cast<double>(state.max) + std::log(state.sum);
        lse[row] = static_cast<float>(log_sum);
        log_probs[row] = static_cast<float>(static_cast<double>(state.target) - log_sum);
    }
}

void XsmmEngine::head_log_probs_backward(const Tensor& h_RH, const PackedWeight& head,
                                         std::span<const std::int32_t> targets, std::span<const float> lse,
                                         std::span<const float> g, const Tensor& dh_RH, const Tensor& dw_VH)
{
    const std::int64_t rows = h_RH.rows, vocabulary = head.outputs, inputs = head.inputs,
                       width = kernels_.panel_width();
    SELM_EXPECT(h_RH.columns == inputs && dh_RH.rows == rows && dh_RH.columns == inputs);
    const bool wants_weight_gradient = !dw_VH.empty();
    SELM_EXPECT(!wants_weight_gradient || (dw_VH.rows == vocabulary && dw_VH.columns == inputs));
    SELM_EXPECT(static_cast<std::int64_t>(targets.size()) == rows && lse.size() == targets.size());
    SELM_EXPECT(g.size() == targets.size());
    check_targets(targets, vocabulary);
    float* const tile = logit_tile_.get(rows_per_sweep * columns_per_tile);
    const float* const rounded = rounded_for_head(h_RH);
    const std::int64_t sweep_rows = even_block(rows, rows_per_sweep, rows_per_call);
    const std::int64_t sweeps = (rows + sweep_rows - 1) / sweep_rows;
    const std::int64_t block_rows = gradient_rows(sweep_rows), panels = (inputs + width - 1) / width * width * block_rows;
    float* const h_panels = x_panels_.get(wants_weight_gradient ? sweeps * panels : 0);
    float* const tiles_transposed = logit_gradient_.get(wants_weight_gradient ? sweeps * columns_per_tile * block_rows : 0);
    std::vector<GradientBlock> blocks(wants_weight_gradient ? static_cast<std::size_t>(sweeps) : 0);
    for (std::size_t i = 0; i < blocks.size(); ++i) {
        const auto sweep = static_cast<std::int64_t>(i);
        const std::int64_t row = sweep * sweep_rows, count = std::min(sweep_rows, rows - row);
        make_column_panels(h_RH.row_f32(row), h_RH.stride, count, inputs, h_panels + sweep * panels);
        blocks[i] = {tiles_transposed + sweep * columns_per_tile * block_rows, h_panels + sweep * panels, gradient_rows(count)};
    }
    // A tile's panels, and its part of the gradient, serve all rows before the next one is read from memory.
    for (std::int64_t column = 0; column < vocabulary; column += columns_per_tile) {
        const std::int64_t columns = std::min(columns_per_tile, vocabulary - column);
        for (std::int64_t sweep = 0; sweep < sweeps; ++sweep) {
            const std::int64_t row = sweep * sweep_rows, count = std::min(sweep_rows, rows - row);
            const auto row_span = [&](auto values) {
                return values.subspan(static_cast<std::size_t>(row), static_cast<std::size_t>(count));
            };
            multiply_head_tile(h_RH, rounded, head, row, count, column, columns, tile);
            differentiate_tile(tile, column, columns, row_span(targets), row_span(lse), row_span(g));
            multiply({.x = tile,
                      .x_stride = columns_per_tile,
                      .rows = count,
                      .inputs = columns,
                      .outputs = inputs,
                      .panels = backward_panels(head).from(column * width),
                      .panel_elements = panel_numbers(vocabulary),
                      .y = dh_RH.row_f32(row),
                      .y_stride = dh_RH.stride,
                      .accumulate = column > 0});
            if (wants_weight_gradient)
                transpose_gradient(tile, columns_per_tile, count, columns, tiles_transposed + sweep * columns_per_tile * block_rows);
        }
        if (wants_weight_gradient)
            add_weight_gradient({.blocks = blocks,
                                 .outputs = columns,
                                 .inputs = inputs,
                                 .dw = dw_VH.row_f32(column),
                                 .dw_stride = dw_VH.stride});
    }
}

} // namespace selm::xsmm
