#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "selm/base/error.hpp"
#include "selm/kernels/engine.hpp"

// What is particular to the xsmm engine: bits of rows that do not depend on other rows, panels, memory.
namespace selm {
namespace {

class XsmmEngineTest : public ::testing::Test {
  protected:
    void SetUp() override { set_up(DType::f32); }

    void set_up(DType products)
    {
        try {
            engine_ = make_engine({.engine = "xsmm", .products = products});
        } catch (const Error& error) {
            GTEST_SKIP() << error.what();
        }
    }

    Engine& engine() { return *engine_; }

    Tensor random(std::int64_t rows, std::int64_t columns, unsigned seed)
    {
        std::mt19937 generator(seed);
        std::normal_distribution<float> normal;
        Tensor out = engine_->allocate(rows, columns, DType::f32);
        for (std::int64_t i = 0; i < rows * columns; ++i)
            out.f32()[i] = normal(generator);
        return out;
    }

    Tensor output(std::int64_t rows, std::int64_t columns) { return engine_->allocate(rows, columns, DType::f32); }

    static void expect_same_bits(const Tensor& actual, const Tensor& expected, const std::string& what)
    {
        ASSERT_EQ(actual.rows, expected.rows);
        for (std::int64_t row = 0; row < actual.rows; ++row)
            ASSERT_EQ(std::memcmp(actual.row_f32(row), expected.row_f32(row),
                                  static_cast<std::size_t>(actual.columns) * sizeof(float)),
                      0)
                << what << ", row " << row;
    }

  private:
    std::unique_ptr<Engine> engine_;
};

TEST_F(XsmmEngineTest, says_what_it_runs_on)
{
    EXPECT_NE(engine().description().find("LIBXSMM"), std::string::npos) << engine().description();
    EXPECT_TRUE(engine().row_invariant());
}

TEST_F(XsmmEngineTest, linear_rows_do_not_depend_on_the_other_rows)
{
    for (const auto& [outputs, inputs] : {std::pair<std::int64_t, std::int64_t>{99, 48}, {33, 1536}, {960, 576}}) {
        const PackedWeight w = engine().pack(random(outputs, inputs, 1), true, {}, false);
        const Tensor x = random(330, inputs, 2), dy = random(330, outputs, 3);
        const Tensor y = output(330, outputs), dx = output(330, inputs), sum = random(330, outputs, 4);
        const Tensor sum_alone = random(330, outputs, 4);
        engine().linear(x, w, y);
        engine().linear_backward_input(dy, w, dx);
        engine().linear_add(x, w, sum);
        for (const std::int64_t count : {1, 2, 5, 7, 64, 65, 300})
            for (const std::int64_t begin : {0, 3, 30}) {
                const Tensor some = output(count, outputs), some_dx = output(count, inputs);
                engine().linear(x.slice_rows(begin, count), w, some);
                expect_same_bits(some, y.slice_rows(begin, count),
                                 cat("linear ", outputs, "x", inputs, " rows ", count));
                engine().linear_backward_input(dy.slice_rows(begin, count), w, some_dx);
                expect_same_bits(some_dx, dx.slice_rows(begin, count), cat("backward ", outputs, "x", inputs));
            }
        for (std::int64_t row = 0; row < 330; ++row)
            engine().linear_add(x.slice_rows(row, 1), w, sum_alone.slice_rows(row, 1));
        expect_same_bits(sum_alone, sum, "linear_add");
    }
}

const AttentionShape shape{.heads = 4, .kv_heads = 2, .head_dim = 16, .scale = 0.25f};
constexpr std::int64_t qkv_columns = (4 + 2 * 2) * 16, out_columns = 4 * 16;

/// What holds whatever the operands of products are rounded to.
class XsmmProductsTest : public XsmmEngineTest, public ::testing::WithParamInterface<DType> {
  protected:
    void SetUp() override
    {
        set_up(GetParam());
        if (!IsSkipped() && GetParam() == DType::bf16 &&
            engine().description().find("bf16 products") == std::string::npos)
            GTEST_SKIP() << engine().description();
    }
};

INSTANTIATE_TEST_SUITE_P(Products, XsmmProductsTest, ::testing::Values(DType::f32, DType::bf16),
                         [](const auto& info) { return std::string(info.param == DType::f32 ? "f32" : "bf16"); });

TEST_P(XsmmProductsTest, attention_of_a_segment_does_not_depend_on_the_other_segments)
{
    // A trunk with two branches, between other segments and alone, and with the branches' order changed.
    const Tensor qkv = random(40 + 70 + 100 + 65 + 3, qkv_columns, 1);
    const std::vector<Segment> all = {{0, 40, -1}, {40, 70, -1}, {110, 100, 1}, {210, 65, 1}, {275, 3, -1}};
    const Tensor out = output(278, out_columns), lse = output(4, 278);
    engine().attention(qkv, shape, all, out, lse);

    const std::vector<Segment> alone = {{0, 70, -1}, {70, 65, 0}};
    const Tensor some = output(135, qkv_columns), some_out = output(135, out_columns), some_lse = output(4, 135);
    for (std::int64_t row = 0; row < 135; ++row)
        std::copy_n(qkv.row_f32(row < 70 ? 40 + row : 210 + row - 70), qkv_columns, some.row_f32(row));
    engine().attention(some, shape, alone, some_out, some_lse);
    expect_same_bits(some_out.slice_rows(0, 70), out.slice_rows(40, 70), "trunk");
    expect_same_bits(some_out.slice_rows(70, 65), out.slice_rows(210, 65), "branch");
    expect_same_bits(some_lse.slice_columns(70, 65), lse.slice_columns(210, 65), "lse of the branch");

    // Causal: a prefix of a segment has the bits of the whole.
    const std::vector<Segment> prefix = {{0, 33, -1}};
    const Tensor prefix_out = output(33, out_columns), prefix_lse = output(4, 33);
    engine().attention(qkv.slice_rows(40, 33), shape, prefix, prefix_out, prefix_lse);
    expect_same_bits(prefix_out, out.slice_rows(40, 33), "prefix");
}

TEST_P(XsmmProductsTest, cached_attention_does_not_depend_on_the_step_or_the_slot)
{
    constexpr std::int64_t length = 200;
    const Tensor qkv = random(length, qkv_columns, 1), other = random(length, qkv_columns, 2);
    const auto one = engine().make_cache(2, 3, length, shape);
    const Tensor at_once = output(length, out_columns);
    engine().attention_cached(qkv, shape, *one, 1, std::vector<CachedSpan>{{0, 0, 130, 0, true}}, at_once);
    for (std::int64_t row = 130; row < length; ++row)
        engine().attention_cached(qkv, shape, *one, 1, std::vector<CachedSpan>{{0, row, 1, row, false}}, at_once);

    // In chunks, in another slot that held another sequence before, in steps with rows of another sequence.
    const auto two = engine().make_cache(2, 3, length, shape);
    const Tensor both = output(2 * length, qkv_columns), out = output(2 * length, out_columns);
    engine().attention_cached(other, shape, *two, 1, std::vector<CachedSpan>{{2, 0, length, 0, true}},
                              out.slice_rows(0, length));
    for (std::int64_t row = 0; row < 2 * length; ++row)
        std::copy_n((row < length ? other : qkv).row_f32(row % length), qkv_columns, both.row_f32(row));
    engine().attention_cached(both, shape, *two, 1,
                              std::vector<CachedSpan>{{1, 0, 64, 0, true}, {2, length, 64, 0, true}}, out);
    engine().attention_cached(both, shape, *two, 1,
                              std::vector<CachedSpan>{{2, length + 64, 66, 64, true}, {1, 64, 1, 64, false}}, out);
    for (std::int64_t row = 130; row < length; ++row)
        engine().attention_cached(both, shape, *two, 1,
                                  std::vector<CachedSpan>{{1, row, 1, row, false}, {2, length + row, 1, row, false}},
                                  out);
    expect_same_bits(out.slice_rows(length, length), at_once, "cached");
}

TEST_P(XsmmProductsTest, the_cache_holds_operands_of_products)
{
    EXPECT_EQ(engine().cache_dtype(), GetParam());
}

TEST_F(XsmmEngineTest, panels_hold_the_weight_and_zeros)
{
    constexpr std::int64_t outputs = 41, inputs = 35;
    const Tensor weight = random(outputs, inputs, 1);
    const Tensor storage = output(1, engine().packed_elements(outputs, inputs, true));
    const PackedWeight w = engine().pack(weight, true, storage, false);
    // One product per unit vector reads every element of the panels back, exactly.
    Tensor unit = output(inputs, inputs), rows = output(inputs, outputs);
    engine().fill_zero(unit);
    for (std::int64_t i = 0; i < inputs; ++i)
        unit.row_f32(i)[i] = 1;
    engine().linear(unit, w, rows);
    Tensor unit_back = output(outputs, outputs), rows_back = output(outputs, inputs);
    engine().fill_zero(unit_back);
    for (std::int64_t i = 0; i < outputs; ++i)
        unit_back.row_f32(i)[i] = 1;
    engine().linear_backward_input(unit_back, w, rows_back);
    std::size_t zeros = 0;
    for (std::int64_t n = 0; n < outputs; ++n)
        for (std::int64_t k = 0; k < inputs; ++k) {
            ASSERT_EQ(rows.row_f32(k)[n], weight.row_f32(n)[k]);
            ASSERT_EQ(rows_back.row_f32(n)[k], weight.row_f32(n)[k]);
        }
    for (std::int64_t i = 0; i < storage.columns; ++i)
        zeros += storage.f32()[i] == 0 ? 1 : 0;
    EXPECT_EQ(zeros, static_cast<std::size_t>(storage.columns - 2 * outputs * inputs - 1))
        << "all but the weight, twice, and one word that names the layout is zero";
}

TEST_F(XsmmEngineTest, a_handle_on_panels_that_another_rank_packed)
{
    const Tensor weight = random(50, 40, 1), x = random(3, 40, 2), y = output(3, 50), y_again = output(3, 50);
    const Tensor storage = output(1, engine().packed_elements(50, 40, true));
    engine().linear(x, engine().pack(weight, true, storage, false), y);
    const Tensor only_shape = output(50, 40); // its values are not looked at
    engine().linear(x, engine().pack(only_shape, true, storage, true), y_again);
    expect_same_bits(y_again, y, "shared panels");
}

TEST_F(XsmmEngineTest, numerics_tell_operands_apart)
{
    EXPECT_EQ(engine().numerics(), "xsmm");
    const auto bf16 = make_engine({.engine = "xsmm", .products = DType::bf16});
    EXPECT_EQ(bf16->numerics(), bf16->description().find("bf16 products") == std::string::npos ? "xsmm" : "xsmm-bf16");
}

// Weights that are bf16 numbers are stored as such (when no backward pass needs them): same bits from half the memory.
TEST_F(XsmmEngineTest, bf16_weights_count_as_their_float_values)
{
    for (const auto& [outputs, inputs] : {std::pair<std::int64_t, std::int64_t>{99, 40}, {33, 1536}, {64, 129}}) {
        const Tensor weight = random(outputs, inputs, 1), rounded = engine().allocate(outputs, inputs, DType::bf16);
        for (std::int64_t i = 0; i < outputs * inputs; ++i) {
            rounded.bf16()[i] = float_to_bf16(weight.f32()[i]);
            weight.f32()[i] = bf16_to_float(rounded.bf16()[i]);
        }
        const PackedWeight as_f32 = engine().pack(weight, true, {}, false); // with backward: never bf16
        const Tensor storage = output(1, engine().packed_elements(outputs, inputs, false));
        std::fill_n(storage.f32(), storage.columns, -7.0f);
        const PackedWeight as_bf16 = engine().pack(weight, false, storage, false);
        EXPECT_EQ(storage.f32()[storage.columns - 1], -7.0f) << "the second half of the storage is not touched";
        const PackedWeight from_bf16 = engine().pack(rounded, false, {}, false);
        const PackedWeight shared = engine().pack(output(outputs, inputs), false, storage, true);
        for (const std::int64_t rows : {1, 5, 32, 33, 70}) {
            const Tensor x = random(rows, inputs, 2), y = output(rows, outputs);
            engine().linear(x, as_f32, y);
            for (const PackedWeight* w : {&as_bf16, &from_bf16, &shared}) {
                const Tensor other = output(rows, outputs);
                engine().linear(x, *w, other);
                expect_same_bits(other, y, cat(outputs, "x", inputs, ", ", rows, " rows"));
            }
        }
    }
}

TEST_F(XsmmEngineTest, panels_that_nobody_packed_are_an_error)
{
    const Tensor storage = output(1, engine().packed_elements(5, 4, false));
    engine().fill_zero(storage);
    const PackedWeight w = engine().pack(output(5, 4), false, storage, true);
    EXPECT_THROW(engine().linear(random(1, 4, 1), w, output(1, 5)), Error);
}

TEST_F(XsmmEngineTest, memory_is_counted_and_comes_back)
{
    const std::int64_t before = engine().allocated_bytes();
    {
        const Tensor a = output(1000, 1000), b = output(10, 10);
        EXPECT_GE(engine().allocated_bytes(), before + 4 * (1000 * 1000 + 100));
        EXPECT_LE(engine().allocated_bytes(), before + 4 * (1000 * 1000 + 100) * 5 / 4);
        EXPECT_EQ(reinterpret_cast<std::uintptr_t>(a.data) % 64, 0u);
        EXPECT_EQ(reinterpret_cast<std::uintptr_t>(b.data) % 64, 0u);
    }
    EXPECT_EQ(engine().allocated_bytes(), before);
    EXPECT_GE(engine().peak_allocated_bytes(), before + 4 * 1000 * 1000);
    const void* kept = nullptr;
    {
        const Tensor a = output(1000, 1000);
        kept = a.data;
    }
    EXPECT_EQ(output(1000, 1000).data, kept) << "a large block is used again";
}

TEST_F(XsmmEngineTest, tensors_outlive_the_engine)
{
    Tensor survivor;
    {
        const auto short_lived = make_engine({.engine = "xsmm"});
        survivor = short_lived->allocate(600, 600, DType::f32);
    }
    survivor.f32()[600 * 600 - 1] = 1;
    EXPECT_EQ(survivor.f32()[600 * 600 - 1], 1.0f);
}

TEST_F(XsmmEngineTest, refuses_what_it_cannot_do)
{
    EXPECT_THROW(make_engine({.engine = "xsmm", .device = Device::cuda}), Error);
    EXPECT_THROW(make_engine({.engine = "mkl"}), Error);
    const PackedWeight forward_only = engine().pack(random(5, 4, 1), false, {}, false);
    EXPECT_THROW(engine().linear_backward_input(random(2, 5, 1), forward_only, output(2, 4)), Error);
    EXPECT_THROW(engine().linear(random(2, 3, 1), forward_only, output(2, 5)), Error);
    std::vector<float> log_probs(1), lse(1);
    EXPECT_THROW(engine().head_log_probs(random(1, 4, 1), forward_only, std::vector<std::int32_t>{5}, log_probs, lse),
                 Error);
    const auto cache = engine().make_cache(1, 1, 64, shape);
    const Tensor qkv = random(2, qkv_columns, 1), out = output(2, out_columns);
    EXPECT_THROW(engine().attention_cached(qkv, shape, *cache, 0, std::vector<CachedSpan>{{0, 0, 2, 63, true}}, out),
                 Error);
    // Prefixes: of the sequence itself, of an odd number of tokens, of no slot.
    for (const CachedSpan& span : {CachedSpan{0, 0, 2, 2, true, 0}, CachedSpan{0, 0, 2, 3, true, 1}, CachedSpan{0, 0, 2, 2, true, 2}})
        EXPECT_THROW(engine().attention_cached(qkv, shape, *engine().make_cache(1, 2, 64, shape), 0, std::span(&span, 1), out), Error);
    EXPECT_THROW(engine().attention_cached(qkv, shape, *cache, 0, std::vector<CachedSpan>{{1, 0, 2, 0, true}}, out),
                 Error);
    EXPECT_THROW(engine().attention_cached(qkv, shape, *cache, 0, std::vector<CachedSpan>{{0, 0, 2, 1, true}}, out),
                 Error);
}

TEST_F(XsmmEngineTest, a_large_cache_costs_nothing_until_it_is_used)
{
    // 64 GiB of address space: more than the machines that run this have memory.
    const AttentionShape large{.heads = 8, .kv_heads = 8, .head_dim = 128, .scale = 0.1f};
    const auto cache = engine().make_cache(32, 64, 4096, large);
    EXPECT_EQ(cache->slots(), 64);
    EXPECT_EQ(cache->capacity(), 4096);
}

} // namespace
} // namespace selm
