#include <algorithm>
#include <cstring>

#include "avx2_gemm.hpp"
#include "bf16_rows.hpp"
#include "selm/base/error.hpp"
#include "simd.hpp"
#include "xsmm_blocks.hpp"
#include "xsmm_engine.hpp"

// Products of rows with panels: by the kernels of avx2_gemm.hpp, or by LIBXSMM's. In f32 both take the same sums in the same
// order, so that their results have the same bits. Weight gradients need no sums apart and few panels: LIBXSMM's kernels, which are
// near the peak there, compute them on every CPU.
namespace selm::xsmm {
namespace {

/// Inputs per slice, at most. Each slice's sums are computed apart and then added: the activations of real models have a few
/// huge entries, and a long chain of sums loses the small products behind them. SmolLM2's training gradients are 1e-5 away
/// from float64 with 64 inputs per slice, and 5e-4 with 384.
constexpr std::int64_t depth_per_slice = 64;
/// With the kernels of avx2_gemm.hpp: rows that share a slice of a panel, at most. Their sums and the slice fit the L1 cache,
/// and a slice read from memory serves so many rows that arithmetic hides the reading.
constexpr std::int64_t rows_per_block = 96;
/// With LIBXSMM: rows of x per sweep over the panels, at most (a panel then serves several calls from the L2 cache), and
/// outputs per block of a weight gradient.
constexpr std::int64_t rows_per_sweep = 256, outputs_per_block = 256;

void expand(const std::uint32_t* from, std::int64_t count, float* to)
{
    for (std::int64_t i = 0; i < count; i += 16, from += 8) {
        simd::Uint8 words;
        std::memcpy(&words, from, sizeof words);
        const simd::Uint8 low = words << 16, high = words & 0xffff0000u;
        std::memcpy(to + i, &low, sizeof low);
        std::memcpy(to + i + 8, &high, sizeof high);
    }
}

} // namespace

void XsmmEngine::multiply(const PanelProduct& p)
{
    if (p.panels.pairs != nullptr) {
        multiply_bf16(p);
        return;
    }
    if (!uses_avx2_) {
        multiply_libxsmm(p);
        return;
    }
    const std::int64_t block_rows = even_block(p.rows, rows_per_block, 6);
    for (std::int64_t row = 0; row < p.rows; row += block_rows)
        for (std::int64_t output = 0; output < p.outputs; output += avx2::panel_width)
            multiply_block(p, row, std::min(block_rows, p.rows - row), output);
}

/// Slice by slice of the inputs: the slice, the sums of the block and its part of x stay in the caches.
void XsmmEngine::multiply_block(const PanelProduct& p, std::int64_t row, std::int64_t rows, std::int64_t output)
{
    constexpr std::int64_t width = avx2::panel_width;
    alignas(64) float sums[rows_per_block * width], bias[width] = {};
    const std::int64_t depth = even_block(p.inputs, depth_per_slice, 32); // of p.inputs alone: rows keep their bits
    const std::int64_t outputs = std::min(width, p.outputs - output);
    const std::int64_t panel_elements = p.panel_elements == 0 ? p.inputs * width : p.panel_elements;
    const Panels panel = p.panels.from(output / width * panel_elements);
    float* const y = p.y + row * p.y_stride + output;
    // Kernels read and write whole rows of a panel's width: the last columns go by way of the sums.
    const bool is_whole = outputs == width;
    const float* before = is_whole ? y : sums;
    std::int64_t before_stride = is_whole ? p.y_stride : width;
    if (p.bias != nullptr) {
        std::copy(p.bias + output, p.bias + output + outputs, bias);
        before = bias;
        before_stride = 0;
    } else if (!p.accumulate) {
        before = nullptr;
    } else if (!is_whole) {
        std::fill(sums, sums + rows * width, 0.0f);
        place_tile(y, p.y_stride, rows, outputs, false, sums, width);
    }
    for (std::int64_t input = 0; input < p.inputs; input += depth) {
        const Panels slice = panel.from(input * width);
        const Panels next = panel.from(input + depth < p.inputs ? (input + depth) * width : panel_elements);
        avx2::PanelTile tile{.panel = slice.f32,
                             .bf16_panel = slice.bf16,
                             .x = p.x + row * p.x_stride + input,
                             .x_stride = p.x_stride,
                             .rows = rows,
                             .depth = std::min(depth, p.inputs - input),
                             .add = before,
                             .add_stride = before_stride,
                             .next_panel = next.f32 != nullptr ? static_cast<const void*>(next.f32) : next.bf16};
        const bool to_y = is_whole && input + tile.depth == p.inputs;
        tile.out = to_y ? y : sums;
        tile.out_stride = to_y ? p.y_stride : width;
        avx2::multiply(tile);
        before = sums;
        before_stride = width;
    }
    if (!is_whole)
        place_tile(sums, width, rows, outputs, false, y, p.y_stride);
}

void XsmmEngine::multiply_libxsmm(const PanelProduct& p)
{
    const std::int64_t width = kernels_.panel_width();
    const std::int64_t sweep_rows = even_block(p.rows, rows_per_sweep, rows_per_call);
    const std::int64_t depth = even_block(p.inputs, depth_per_slice, 32); // of p.inputs alone: rows keep their bits
    const bool is_bf16 = p.panels.bf16 != nullptr;
    float* const expanded = is_bf16 ? expanded_.get(depth * width) : nullptr;
    alignas(64) float tile[rows_per_call * most_panel_width];
    // Rows of y lie far apart, often by a multiple of 4096 bytes, and so share few lines of the L1 cache: sums that go on from slice to
    // slice wait in rows one behind the other.
    float* const sums = p.inputs > depth ? row_sums_.get(std::min(sweep_rows, p.rows) * width) : nullptr;
    const std::int64_t panel_elements = p.panel_elements == 0 ? p.inputs * width : p.panel_elements;
    SELM_EXPECT(width <= most_panel_width);
    for (std::int64_t sweep = 0; sweep < p.rows; sweep += sweep_rows) {
        const std::int64_t sweep_end = std::min(p.rows, sweep + sweep_rows);
        for (std::int64_t output = 0; output < p.outputs; output += width) {
            const std::int64_t outputs = std::min(width, p.outputs - output);
            for (std::int64_t input = 0; input < p.inputs; input += depth) {
                const std::int64_t count = std::min(depth, p.inputs - input);
                const Panels slice = p.panels.from(output / width * panel_elements + input * width);
                if (is_bf16)
                    expand(slice.bf16, count * width, expanded);
                const float* const panel = is_bf16 ? expanded : slice.f32;
                const bool is_last = input + count == p.inputs, add = p.accumulate || p.bias != nullptr || input > 0;
                const std::int64_t to_stride = is_last ? p.y_stride : width;
                GemmShape shape{.m = narrow(outputs),
                                .n = 0,
                                .k = narrow(count),
                                .lda = narrow(width),
                                .ldb = narrow(p.x_stride),
                                .ldc = narrow(add ? width : to_stride),
                                .accumulate = false};
                GemmKernel kernel;
                for (std::int64_t row = sweep; row < sweep_end; row += rows_per_call) {
                    const std::int32_t rows = narrow(std::min(rows_per_call, sweep_end - row));
                    if (rows != shape.n) {
                        shape.n = rows;
                        kernel = kernels_.find(shape);
                    }
                    float* const y = p.y + row * p.y_stride + output;
                    float* const own_sums = sums == nullptr ? nullptr : sums + (row - sweep) * width;
                    float* const to = is_last ? y : own_sums;
                    kernel(panel, p.x + row * p.x_stride + input, add ? tile : to);
                    if (input > 0)
                        place_tile_on(own_sums, width, tile, width, rows, outputs, to, to_stride);
                    else if (p.bias != nullptr)
                        place_tile_on(p.bias + output, 0, tile, width, rows, outputs, to, to_stride);
                    else if (p.accumulate)
                        place_tile_on(y, p.y_stride, tile, width, rows, outputs, to, to_stride);
                }
            }
        }
    }
}

void XsmmEngine::multiply_bf16(const PanelProduct& p)
{
    const std::int64_t width = kernels_.panel_width(), pairs = pairs_of(p.inputs);
    const std::int64_t panel_numbers = p.panel_elements == 0 ? this->panel_numbers(p.inputs) : p.panel_elements;
    const std::int64_t sweep_rows = even_block(p.rows, rows_per_sweep, rows_per_call);
    float* const rounded_here = p.rounded_x != nullptr ? nullptr : rounded_rows_.get(std::min(sweep_rows, p.rows) * pairs);
    GemmShape shape{.lda = narrow(width), .ldb = narrow(2 * pairs), .ldc = narrow(p.y_stride), .bf16 = true};
    shape.k = shape.ldb;
    shape.accumulate = p.accumulate || p.bias != nullptr;
    GemmKernel kernel;
    for (std::int64_t sweep = 0; sweep < p.rows; sweep += sweep_rows) {
        const std::int64_t count = std::min(sweep_rows, p.rows - sweep);
        const float* const rounded = p.rounded_x != nullptr ? p.rounded_x + sweep * pairs : rounded_here;
        if (rounded_here != nullptr)
            pair_columns(p.x + sweep * p.x_stride, p.x_stride, count, p.inputs, rounded_here, pairs);
        for (std::int64_t output = 0; output < p.outputs; output += width) {
            const float* const panel = p.panels.from(output / width * panel_numbers).pairs;
            for (std::int64_t row = 0; row < count; row += rows_per_call) {
                const std::int32_t rows = narrow(std::min(rows_per_call, count - row));
                const std::int32_t outputs = narrow(std::min(width, p.outputs - output));
                if (rows != shape.n || outputs != shape.m) {
                    shape.n = rows;
                    shape.m = outputs;
                    kernel = kernels_.find(shape);
                }
                float* const y = p.y + (sweep + row) * p.y_stride + output;
                for (std::int64_t r = 0; p.bias != nullptr && r < rows; ++r)
                    std::copy_n(p.bias + output, outputs, y + r * p.y_stride);
                kernel(panel, rounded + row * pairs, y);
            }
        }
    }
}

void XsmmEngine::add_weight_gradient(const WeightGradient& g)
{
    const std::int64_t width = kernels_.panel_width(), numbers = uses_bf16_ ? 2 : 1; // per row of the operands
    for (std::int64_t outputs_begin = 0; outputs_begin < g.outputs; outputs_begin += outputs_per_block) {
        const std::int64_t outputs_end = std::min(g.outputs, outputs_begin + outputs_per_block);
        for (std::int64_t input = 0; input < g.inputs; input += width) {
            for (std::int64_t output = outputs_begin; output < outputs_end; output += rows_per_call) {
                GemmShape shape{.m = narrow(std::min(width, g.inputs - input)),
                                .n = narrow(std::min(rows_per_call, outputs_end - output)),
                                .k = 0,
                                .lda = narrow(width),
                                .ldb = 0,
                                .ldc = narrow(g.dw_stride),
                                .accumulate = true,
                                .bf16 = uses_bf16_};
                GemmKernel kernel;
                for (const GradientBlock& block : g.blocks) {
                    if (shape.k != numbers * block.rows) {
                        shape.k = shape.ldb = narrow(numbers * block.rows);
                        kernel = kernels_.find(shape);
                    }
                    kernel(block.x_panels + input * block.rows, block.dy_transposed + output * block.rows,
                           g.dw + output * g.dw_stride + input);
                }
            }
        }
    }
}

} // namespace selm::xsmm
