#include <algorithm>
#include <array>
#include <bit>
#include <span>

#include "bf16_rows.hpp"
#include "elementwise.hpp"
#include "selm/base/error.hpp"
#include "simd.hpp"
#include "xsmm_blocks.hpp"
#include "xsmm_engine.hpp"

namespace selm::xsmm {
namespace {

/// Of a weight gradient: tokens per block, at most, and blocks that are added to a tile one after the other while it stays in the L1
/// cache; outputs of which dy is transposed at a time, so that it stays in the L2 cache.
constexpr std::int64_t tokens_per_block = 256, blocks_at_once = 4, outputs_per_block = 256;

std::int64_t panels_of(std::int64_t columns, std::int64_t width)
{
    return (columns + width - 1) / width;
}

/// to [count][columns] = rows of a weight from `begin` on, as floats.
void copy_weight_rows(const Tensor& weight, std::int64_t begin, std::int64_t count, float* to)
{
    for (std::int64_t row = begin; row < begin + count; ++row, to += weight.columns) {
        if (weight.dtype == DType::f32)
            std::copy_n(weight.row_f32(row), weight.columns, to);
        else
            std::transform(weight.bf16() + row * weight.stride, weight.bf16() + row * weight.stride + weight.columns, to,
                           elementwise::from_bf16);
    }
}

/// In front of the forward panels, as the first of `header_elements` floats.
constexpr std::int64_t header_elements = 16;
enum class PanelKind : std::uint32_t { f32 = 0x5e1f0032, bf16 = 0x5e1f0016, pairs = 0x5e1f0216 };

bool is_bf16(float value)
{
    return (std::bit_cast<std::uint32_t>(value) & 0xffffu) == 0;
}

bool all_are_bf16(const Tensor& weight)
{
    if (weight.dtype == DType::bf16)
        return true;
    for (std::int64_t row = 0; row < weight.rows; ++row)
        if (!std::all_of(weight.row_f32(row), weight.row_f32(row) + weight.columns, is_bf16))
            return false;
    return true;
}

/// bf16 panels hold 16 numbers as eight words, number i in the low and i + 8 in the high half of word i: two operations
/// then make 16 floats. @param count a multiple of 16.
void compress(const float* from, std::int64_t count, std::uint32_t* to)
{
    for (std::int64_t i = 0; i < count; i += 16, to += 8)
        for (std::int64_t word = 0; word < 8; ++word)
            to[word] =
                std::bit_cast<std::uint32_t>(from[i + word]) >> 16 | std::bit_cast<std::uint32_t>(from[i + word + 8]);
}

} // namespace

std::int64_t XsmmEngine::panel_numbers(std::int64_t depth) const
{
    return kernels_.panel_width() * (uses_bf16_ ? 2 * pairs_of(depth) : depth);
}

std::int64_t XsmmEngine::packed_elements(std::int64_t outputs, std::int64_t inputs, bool with_backward) const
{
    const std::int64_t width = kernels_.panel_width(), numbers_per_element = uses_bf16_ ? 2 : 1;
    const std::int64_t forward = header_elements + panels_of(outputs, width) * panel_numbers(inputs) / numbers_per_element;
    return forward + (with_backward ? panels_of(inputs, width) * panel_numbers(outputs) / numbers_per_element : 0);
}

PackedWeight XsmmEngine::pack(const Tensor& weight, bool with_backward, const Tensor& storage, bool already_packed)
{
    const std::int64_t outputs = weight.rows, inputs = weight.columns;
    const std::int64_t elements = packed_elements(outputs, inputs, with_backward);
    const std::int64_t forward_elements = packed_elements(outputs, inputs, false);
    const Tensor all = storage.empty() ? allocate(1, elements, DType::f32) : storage;
    SELM_EXPECT(all.rows == 1 && all.columns >= elements && !(already_packed && storage.empty()));
    PackedWeight out;
    out.outputs = outputs;
    out.inputs = inputs;
    out.forward = all.slice_columns(0, forward_elements);
    if (with_backward)
        out.backward = all.slice_columns(forward_elements, elements - forward_elements);
    if (already_packed)
        return out;
    if (uses_bf16_)
        pack_pairs(weight, out);
    else
        pack_panels(weight, !with_backward && all_are_bf16(weight), out);
    return out;
}

void XsmmEngine::pack_pairs(const Tensor& weight, const PackedWeight& out)
{
    const std::int64_t width = kernels_.panel_width(), outputs = out.outputs, inputs = out.inputs, pairs = pairs_of(inputs);
    std::fill_n(out.forward.f32(), header_elements, 0.0f);
    out.forward.f32()[0] = std::bit_cast<float>(PanelKind::pairs);
    float* const rows = x_panels_.get(width * inputs);
    float* const rounded = rounded_rows_.get(width * pairs);
    for (std::int64_t begin = 0; begin < outputs; begin += width) {
        const std::int64_t count = std::min(width, outputs - begin);
        copy_weight_rows(weight, begin, count, rows);
        float* const panel = out.forward.f32() + header_elements + begin * pairs;
        if (count < width)
            std::fill(panel, panel + pairs * width, 0.0f);
        pair_columns(rows, inputs, count, inputs, rounded, pairs);
        simd::transpose(rounded, pairs, count, pairs, panel, width);
        for (std::int64_t column = 0; !out.backward.empty() && column < inputs; column += width) {
            const std::int64_t columns = std::min(width, inputs - column);
            float* const to = out.backward.f32() + (column / width * pairs_of(outputs) + begin / 2) * width;
            if (columns < width)
                std::fill(to, to + pairs_of(count) * width, 0.0f);
            pair_rows(rows + column, inputs, count, columns, to, width);
        }
    }
}

void XsmmEngine::pack_panels(const Tensor& weight, bool is_bf16, const PackedWeight& out)
{
    const std::int64_t width = kernels_.panel_width(), outputs = out.outputs, inputs = out.inputs;
    std::fill_n(out.forward.f32(), header_elements, 0.0f);
    out.forward.f32()[0] = std::bit_cast<float>(is_bf16 ? PanelKind::bf16 : PanelKind::f32);
    float* const panels = out.forward.f32() + header_elements;
    // A panel's rows of the weight, expanded to f32, then turned around (forward) or copied slice by slice (backward).
    float* const rows = x_panels_.get(width * inputs);
    for (std::int64_t begin = 0; begin < outputs; begin += width) {
        const std::int64_t count = std::min(width, outputs - begin);
        copy_weight_rows(weight, begin, count, rows);
        float* const panel = is_bf16 ? expanded_.get(width * inputs) : panels + begin * inputs;
        if (count < width)
            std::fill(panel, panel + inputs * width, 0.0f);
        simd::transpose(rows, inputs, count, inputs, panel, width);
        if (is_bf16)
            compress(panel, inputs * width, reinterpret_cast<std::uint32_t*>(panels) + begin * inputs / 2);
        for (std::int64_t column = 0; !out.backward.empty() && column < inputs; column += width) {
            const std::int64_t columns = std::min(width, inputs - column);
            for (std::int64_t row = 0; row < count; ++row) {
                float* to = out.backward.f32() + (column / width * outputs + begin + row) * width;
                std::copy(rows + row * inputs + column, rows + row * inputs + column + columns, to);
                std::fill(to + columns, to + width, 0.0f);
            }
        }
    }
}

XsmmEngine::Panels XsmmEngine::forward_panels(const PackedWeight& w)
{
    const float* const panels = w.forward.f32() + header_elements;
    switch (std::bit_cast<PanelKind>(w.forward.f32()[0])) {
    case PanelKind::f32: return {.f32 = panels};
    case PanelKind::bf16: return {.bf16 = reinterpret_cast<const std::uint32_t*>(panels)};
    case PanelKind::pairs: return {.pairs = panels};
    }
    SELM_EXPECT(false); // the rank that packs them has not done so
    return {};
}

XsmmEngine::Panels XsmmEngine::backward_panels(const PackedWeight& w) const
{
    SELM_EXPECT(!w.backward.empty()); // packed without backward
    return uses_bf16_ ? Panels{.pairs = w.backward.f32()} : Panels{.f32 = w.backward.f32()};
}

void XsmmEngine::multiply_linear(const Tensor& x_TK, const PackedWeight& w, const Tensor& y_TN, const float* bias,
                                 bool accumulate)
{
    SELM_EXPECT(x_TK.rows == y_TN.rows && x_TK.columns == w.inputs && y_TN.columns == w.outputs);
    SELM_EXPECT(x_TK.stride >= x_TK.columns && y_TN.stride >= y_TN.columns);
    multiply({.x = x_TK.f32(),
              .x_stride = x_TK.stride,
              .rows = x_TK.rows,
              .inputs = w.inputs,
              .outputs = w.outputs,
              .panels = forward_panels(w),
              .y = y_TN.f32(),
              .y_stride = y_TN.stride,
              .bias = bias,
              .accumulate = accumulate});
}

void XsmmEngine::linear(const Tensor& x_TK, const PackedWeight& w, const Tensor& y_TN)
{
    multiply_linear(x_TK, w, y_TN, nullptr, false);
}

void XsmmEngine::linear_add(const Tensor& x_TK, const PackedWeight& w, const Tensor& y_TN)
{
    multiply_linear(x_TK, w, y_TN, nullptr, true);
}

void XsmmEngine::linear_bias(const Tensor& x_TK, const PackedWeight& w, const Tensor& bias, const Tensor& y_TN)
{
    SELM_EXPECT(bias.rows == 1 && bias.columns == w.outputs);
    multiply_linear(x_TK, w, y_TN, bias.f32(), false);
}

void XsmmEngine::linear_backward_input(const Tensor& dy_TN, const PackedWeight& w, const Tensor& dx_TK)
{
    SELM_EXPECT(dy_TN.rows == dx_TK.rows && dy_TN.columns == w.outputs && dx_TK.columns == w.inputs);
    multiply({.x = dy_TN.f32(),
              .x_stride = dy_TN.stride,
              .rows = dy_TN.rows,
              .inputs = w.outputs,
              .outputs = w.inputs,
              .panels = backward_panels(w),
              .y = dx_TK.f32(),
              .y_stride = dx_TK.stride,
              .bias = nullptr,
              .accumulate = false});
}

std::int64_t XsmmEngine::gradient_rows(std::int64_t rows) const
{
    return uses_bf16_ ? pairs_of(rows) : rows;
}

void XsmmEngine::make_column_panels(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns,
                                    float* panels) const
{
    const std::int64_t width = kernels_.panel_width(), panel_rows = gradient_rows(rows);
    for (std::int64_t begin = 0; begin < columns; begin += width) {
        const std::int64_t count = std::min(width, columns - begin);
        float* const panel = panels + begin * panel_rows;
        if (uses_bf16_)
            pair_rows(from + begin, from_stride, rows, count, panel, width);
        for (std::int64_t row = 0; row < panel_rows; ++row) {
            float* const to = panel + row * width;
            if (!uses_bf16_)
                std::copy_n(from + row * from_stride + begin, count, to);
            std::fill(to + count, to + width, 0.0f);
        }
    }
}

void XsmmEngine::transpose_gradient(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns,
                                    float* to)
{
    if (!uses_bf16_) {
        simd::transpose(from, from_stride, rows, columns, to, rows);
        return;
    }
    pair_rows_transposed(from, from_stride, rows, columns, to, pairs_of(rows));
}

void XsmmEngine::linear_backward_weight(const Tensor& dy_TN, const Tensor& x_TK, const Tensor& dw_NK)
{
    const std::int64_t width = kernels_.panel_width(), outputs = dw_NK.rows, inputs = dw_NK.columns;
    SELM_EXPECT(dy_TN.rows == x_TK.rows && dy_TN.columns == outputs && x_TK.columns == inputs);
    const std::int64_t block_tokens = even_block(x_TK.rows, tokens_per_block, 16), block_rows = gradient_rows(block_tokens);
    const std::int64_t panel_columns = panels_of(inputs, width) * width;
    std::array<GradientBlock, blocks_at_once> blocks;
    for (std::int64_t begin = 0; begin < x_TK.rows; begin += blocks_at_once * block_tokens) {
        const std::int64_t end = std::min(x_TK.rows, begin + blocks_at_once * block_tokens);
        const std::int64_t count = (end - begin + block_tokens - 1) / block_tokens;
        float* const x_panels = x_panels_.get(count * panel_columns * block_rows);
        float* const dy_transposed = dy_transposed_.get(count * std::min(outputs, outputs_per_block) * block_rows);
        const auto for_each_block = [&](const auto& prepare) {
            for (std::int64_t i = 0; i < count; ++i) {
                const std::int64_t token = begin + i * block_tokens;
                prepare(blocks[static_cast<std::size_t>(i)], i, token, std::min(block_tokens, end - token));
            }
        };
        for_each_block([&](GradientBlock& block, std::int64_t i, std::int64_t token, std::int64_t tokens) {
            block.rows = gradient_rows(tokens);
            float* const panels = x_panels + i * panel_columns * block_rows;
            make_column_panels(x_TK.row_f32(token), x_TK.stride, tokens, inputs, panels);
            block.x_panels = panels;
        });
        for (std::int64_t output = 0; output < outputs; output += outputs_per_block) {
            const std::int64_t columns = std::min(outputs_per_block, outputs - output);
            for_each_block([&](GradientBlock& block, std::int64_t i, std::int64_t token, std::int64_t tokens) {
                float* const transposed = dy_transposed + i * columns * block_rows;
                transpose_gradient(dy_TN.row_f32(token) + output, dy_TN.stride, tokens, columns, transposed);
                block.dy_transposed = transposed;
            });
            add_weight_gradient({.blocks = std::span(blocks).first(static_cast<std::size_t>(count)),
                                 .outputs = columns,
                                 .inputs = inputs,
                                 .dw = dw_NK.row_f32(output),
                                 .dw_stride = dw_NK.stride});
        }
    }
}

} // namespace selm::xsmm
