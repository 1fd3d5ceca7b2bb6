#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "avx2_gemm.hpp"
#include "selm/base/error.hpp"
#include "selm/kernels/engine.hpp"
#include "xsmm_engine.hpp"

namespace selm {
namespace {

class Avx2GemmTest : public ::testing::Test {
  protected:
    void SetUp() override
    {
        if (!avx2::is_supported())
            GTEST_SKIP() << "this CPU has no AVX2 and FMA";
    }

    std::vector<float> random_floats(std::int64_t count)
    {
        std::vector<float> out(static_cast<std::size_t>(count));
        for (float& value : out)
            value = normal_(generator_);
        return out;
    }

    Tensor random(Engine& engine, std::int64_t rows, std::int64_t columns)
    {
        const Tensor out = engine.allocate(rows, columns, DType::f32);
        const std::vector<float> values = random_floats(rows * columns);
        std::memcpy(out.f32(), values.data(), values.size() * sizeof(float));
        return out;
    }

  private:
    std::mt19937 generator_{1};
    std::normal_distribution<float> normal_;
};

/// One chain of fused multiply-adds in order of k, then what is added.
float chain(const avx2::PanelTile& t, const std::vector<float>& panel, std::int64_t row, std::int64_t column)
{
    float sum = 0;
    for (std::int64_t k = 0; k < t.depth; ++k)
        sum = std::fma(t.x[row * t.x_stride + k], panel[static_cast<std::size_t>(k * avx2::panel_width + column)], sum);
    return t.add == nullptr ? sum : sum + t.add[row * t.add_stride + column];
}

// All counts of rows to 20 and some more: each is cut into groups in another way.
TEST_F(Avx2GemmTest, tiles_have_the_bits_of_a_chain_of_multiply_adds)
{
    for (std::int64_t rows = 1; rows <= 25; ++rows) {
        for (const std::int64_t depth : {1, 3, 64}) {
            const std::vector<float> x = random_floats(rows * (depth + 5)), add = random_floats(rows * 40);
            std::vector<float> panel = random_floats(depth * avx2::panel_width);
            std::vector<std::uint32_t> words(panel.size() / 2);
            for (std::size_t i = 0; i < panel.size(); ++i) {
                const std::uint32_t bits = float_to_bf16(panel[i]);
                panel[i] = bf16_to_float(static_cast<std::uint16_t>(bits));
                words[i / 16 * 8 + i % 8] |= i % 16 < 8 ? bits : bits << 16;
            }
            for (const bool is_bf16 : {false, true}) {
                for (const bool adds : {false, true}) {
                    std::vector<float> out(static_cast<std::size_t>(rows * 37), -7.0f);
                    const avx2::PanelTile tile{.panel = is_bf16 ? nullptr : panel.data(),
                                               .bf16_panel = is_bf16 ? words.data() : nullptr,
                                               .x = x.data(),
                                               .x_stride = depth + 5,
                                               .rows = rows,
                                               .depth = depth,
                                               .add = adds ? add.data() : nullptr,
                                               .add_stride = 40,
                                               .out = out.data(),
                                               .out_stride = 37,
                                               .next_panel = nullptr};
                    avx2::multiply(tile);
                    for (std::int64_t row = 0; row < rows; ++row)
                        for (std::int64_t column = 0; column < 37; ++column)
                            ASSERT_EQ(out[static_cast<std::size_t>(row * 37 + column)],
                                      column < avx2::panel_width ? chain(tile, panel, row, column) : -7.0f)
                                << "rows " << rows << " depth " << depth << " row " << row << " column " << column;
                }
            }
        }
    }
}

void expect_same(const Tensor& a, const Tensor& b, const std::string& what)
{
    for (std::int64_t row = 0; row < a.rows; ++row)
        ASSERT_EQ(std::memcmp(a.row_f32(row), b.row_f32(row), static_cast<std::size_t>(a.columns) * sizeof(float)), 0)
            << what << ", row " << row;
}

// The twin of LIBXSMM's products in all uses (the engine takes LIBXSMM's anyway where that has AVX-512).
TEST_F(Avx2GemmTest, engine_has_the_bits_of_libxsmm)
{
    xsmm::XsmmEngine own, libxsmm(xsmm::XsmmEngine::Products::libxsmm);
    for (const auto& [outputs, inputs] : {std::pair<std::int64_t, std::int64_t>{5, 3}, {99, 130}, {96, 576}, {310, 65}}) {
        const Tensor weight = random(own, outputs, inputs), bias = random(own, 1, outputs);
        for (std::int64_t i = 0; i < 64 && i < outputs * inputs; ++i)
            weight.f32()[i] *= 1000;
        for (const bool with_backward : {true, false}) {
            if (!with_backward) // panels of bf16 numbers
                round_to_bf16({weight.f32(), static_cast<std::size_t>(outputs * inputs)});
            const PackedWeight w = own.pack(weight, with_backward, {}, false);
            for (const std::int64_t rows : {1, 4, 7, 16, 97, 200}) {
                const std::string what = cat(outputs, " x ", inputs, ", ", rows, " rows");
                const Tensor x = random(own, rows, inputs), before = random(own, rows, outputs);
                const auto both = [&](const Tensor& start, const auto& operation) {
                    Tensor results[2];
                    for (const bool is_own : {false, true}) {
                        Tensor& y = results[is_own] = own.allocate(rows, start.columns, DType::f32);
                        std::memcpy(y.f32(), start.f32(), static_cast<std::size_t>(rows * start.columns) * sizeof(float));
                        operation(is_own ? static_cast<Engine&>(own) : libxsmm, y);
                    }
                    expect_same(results[0], results[1], what);
                };
                both(before, [&](Engine& e, const Tensor& y) { e.linear(x, w, y); });
                both(before, [&](Engine& e, const Tensor& y) { e.linear_add(x, w, y); });
                both(before, [&](Engine& e, const Tensor& y) { e.linear_bias(x, w, bias, y); });
                const std::vector<std::int32_t> targets(static_cast<std::size_t>(rows), 2);
                std::vector<float> log_probs(targets.size()), lse(targets.size()), g(targets.size(), 0.5f);
                own.head_log_probs(x, w, targets, log_probs, lse);
                if (!with_backward)
                    continue;
                both(x, [&](Engine& e, const Tensor& y) { e.linear_backward_input(before, w, y); });
                both(x, [&](Engine& e, const Tensor& y) {
                    e.head_log_probs_backward(x, w, targets, lse, g, y, Tensor());
                });
            }
        }
    }
}

} // namespace
} // namespace selm
