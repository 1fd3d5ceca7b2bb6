#include "engine_test_support.hpp"

namespace selm {
namespace {

struct Shape {
    std::int64_t rows, outputs, inputs;
};

// Tiny, odd, crossing any block size by one, and SmolLM2's.
const std::vector<Shape> shapes = {{1, 1, 1},     {1, 7, 5},      {3, 33, 17},    {5, 99, 33},    {8, 16, 16},
                                   {9, 65, 63},   {63, 31, 65},   {64, 64, 64},   {65, 100, 129}, {130, 17, 257},
                                   {1, 960, 576}, {33, 576, 576}, {70, 48, 1536}, {257, 130, 40}, {2, 1, 576},
                                   {1283, 270, 33}};

class LinearTest : public EngineTest {
  protected:
    /// Exact operands: then the tolerance of f32 sums holds for bf16 products as well.
    static Matrix random_matrix(std::int64_t rows, std::int64_t columns, unsigned seed)
    {
        return operand(selm::random_matrix(rows, columns, seed));
    }
};

std::string text(const Shape& s) { return cat("rows ", s.rows, " outputs ", s.outputs, " inputs ", s.inputs); }

TEST_P(LinearTest, multiplies_as_loops_do)
{
    for (const Shape& s : shapes) {
        for (const std::int64_t extra : {0, 3}) {
            const Matrix x = random_matrix(s.rows, s.inputs, 1), w = random_matrix(s.outputs, s.inputs, 2);
            const PackedWeight weight = packed(w);
            EXPECT_EQ(weight.outputs, s.outputs);
            EXPECT_EQ(weight.inputs, s.inputs);
            const Tensor y = output(s.rows, s.outputs, extra);
            engine().linear(tensor(x, extra), weight, y);
            expect_product(values(y), x, reference::transposed(w), nullptr, text(s));
        }
    }
}

TEST_P(LinearTest, adds_to_the_residual)
{
    for (const Shape& s : shapes) {
        const Matrix x = random_matrix(s.rows, s.inputs, 1), w = random_matrix(s.outputs, s.inputs, 2);
        const Matrix before = random_matrix(s.rows, s.outputs, 3);
        const Tensor y = tensor(before, 5);
        engine().linear_add(tensor(x, 1), packed(w), y);
        expect_product(values(y), x, reference::transposed(w), &before, text(s));
    }
}

TEST_P(LinearTest, backward_to_the_input)
{
    for (const Shape& s : shapes) {
        const Matrix dy = random_matrix(s.rows, s.outputs, 1), w = random_matrix(s.outputs, s.inputs, 2);
        const Tensor dx = output(s.rows, s.inputs, 7);
        engine().linear_backward_input(tensor(dy, 2), packed(w), dx);
        expect_product(values(dx), dy, w, nullptr, text(s));
    }
}

TEST_P(LinearTest, backward_to_the_weight_accumulates)
{
    for (const Shape& s : shapes) {
        const Matrix dy = random_matrix(s.rows, s.outputs, 1), x = random_matrix(s.rows, s.inputs, 2);
        const Matrix before = random_matrix(s.outputs, s.inputs, 3);
        const Tensor dw = tensor(before);
        engine().linear_backward_weight(tensor(dy, 1), tensor(x, 4), dw);
        expect_product(values(dw), reference::transposed(dy), x, &before, text(s));
    }
}

TEST_P(LinearTest, no_rows_change_nothing)
{
    const Matrix w = random_matrix(6, 4, 1), before = random_matrix(6, 4, 2);
    const PackedWeight weight = packed(w);
    const Tensor none_in = engine().allocate(0, 4, DType::f32), none_out = engine().allocate(0, 6, DType::f32);
    engine().linear(none_in, weight, none_out);
    engine().linear_add(none_in, weight, none_out);
    engine().linear_backward_input(none_out, weight, none_in);
    const Tensor dw = tensor(before);
    engine().linear_backward_weight(none_out, none_in, dw);
    EXPECT_EQ(values(dw).values, before.values);
}

TEST_P(LinearTest, bf16_weights_are_multiplied_as_their_f32_values)
{
    const Matrix x = random_matrix(11, 33, 1), w = random_matrix(21, 33, 2);
    const Tensor weight = bf16_tensor(w);
    Matrix rounded = w;
    for (double& value : rounded.values)
        value = static_cast<double>(bf16_to_float(float_to_bf16(static_cast<float>(value))));
    const Tensor y = output(11, 21), same = output(11, 21), dx = output(11, 33);
    engine().linear(tensor(x), engine().pack(weight, false, {}, false), y);
    engine().linear(tensor(x), packed(rounded), same);
    EXPECT_EQ(values(y).values, values(same).values);
    expect_product(values(y), x, reference::transposed(rounded), nullptr, "forward");
    const Matrix dy = random_matrix(11, 21, 3);
    engine().linear_backward_input(tensor(dy), engine().pack(weight, true, {}, false), dx);
    expect_product(values(dx), dy, rounded, nullptr, "backward");
}

// Ranks of a node share one packed copy: one packs, the others only make a handle of the same storage.
TEST_P(LinearTest, storage_packed_by_another_rank_serves)
{
    for (const bool with_backward : {false, true}) {
        const Matrix x = random_matrix(9, 37, 1), w = random_matrix(29, 37, 2);
        const std::int64_t elements = engine().packed_elements(29, 37, with_backward);
        if (elements == 0)
            continue; // this engine multiplies the source itself
        const Tensor weight = tensor(w);
        const Tensor storage = output(1, elements, 16);
        const PackedWeight first = engine().pack(weight, with_backward, storage, false);
        const PackedWeight second = engine().pack(weight, with_backward, storage, true);
        const Tensor y = output(9, 29), again = output(9, 29);
        engine().linear(tensor(x), first, y);
        engine().linear(tensor(x), second, again);
        EXPECT_EQ(values(y).values, values(again).values);
        expect_product(values(again), x, reference::transposed(w), nullptr, "forward");
        if (with_backward) {
            const Matrix dy = random_matrix(9, 29, 3);
            const Tensor dx = output(9, 37);
            engine().linear_backward_input(tensor(dy), second, dx);
            expect_product(values(dx), dy, w, nullptr, "backward");
        }
    }
}

// Operands of any size: with bf16 operands each is off by 2^-8 of itself at most, otherwise the products are those of f32.
TEST_P(LinearTest, operands_are_rounded_to_nearest)
{
    const Matrix x = selm::random_matrix(70, 129, 1), w = selm::random_matrix(33, 129, 2);
    const Matrix dy = selm::random_matrix(70, 33, 3);
    const Tensor y = output(70, 33), dx = output(70, 129), dw = tensor(Matrix(33, 129));
    engine().linear(tensor(x), packed(w), y);
    engine().linear_backward_input(tensor(dy), packed(w), dx);
    engine().linear_backward_weight(tensor(dy), tensor(x), dw);
    expect_product(values(y), operand(x), reference::transposed(operand(w)), nullptr, "forward");
    expect_product(values(dx), operand(dy), operand(w), nullptr, "backward to the input");
    expect_product(values(dw), reference::transposed(operand(dy)), operand(x), nullptr, "backward to the weight");
}

SELM_INSTANTIATE_ENGINES_AND_BF16(LinearTest);

} // namespace
} // namespace selm
