#include <fstream>
#include <nlohmann/json.hpp>

#include "engine_test_support.hpp"

namespace selm {
namespace {

using Floats = std::vector<float>;

struct State {
    Floats master, exp_avg, exp_avg_sq, compute;

    explicit State(Floats initial)
        : master(std::move(initial)), exp_avg(master.size()), exp_avg_sq(master.size()), compute(master.size(), -1.0f)
    {
    }
    void step(const AdamWOptions& options, const Floats& gradient)
    {
        adamw_step(options, gradient, master, exp_avg, exp_avg_sq, compute);
    }
};

Floats random_floats(std::size_t count, unsigned seed, double deviation)
{
    const Matrix m = random_matrix(1, static_cast<std::int64_t>(count), seed, deviation);
    return Floats(m.values.begin(), m.values.end());
}

AdamWOptions options_of(const nlohmann::json& one)
{
    AdamWOptions options;
    options.learning_rate = one.at("learning_rate");
    options.beta1 = one.at("beta1");
    options.beta2 = one.at("beta2");
    options.epsilon = one.at("epsilon");
    options.weight_decay = one.at("weight_decay");
    options.gradient_scale = one.at("gradient_scale");
    return options;
}

// Both compute in f32; orders of operations differ, so each step may differ by a few 2^-24 = 6e-8 relatively.
constexpr double relative = 6e-7;

TEST(AdamWTest, steps_as_torch_does)
{
    std::ifstream file(std::string(SELM_SOURCE_DIR) + "/tests/unit/kernels/adamw_golden.json");
    const nlohmann::json golden = nlohmann::json::parse(file);
    ASSERT_EQ(golden.at("cases").size(), 3u);
    for (const nlohmann::json& one : golden.at("cases")) {
        AdamWOptions options = options_of(one);
        const Floats initial = one.at("initial").get<Floats>();
        State state(initial);
        for (const nlohmann::json& step : one.at("steps")) {
            state.step(options, step.at("gradient").get<Floats>());
            const Floats master = step.at("master").get<Floats>(), exp_avg = step.at("exp_avg").get<Floats>();
            const Floats exp_avg_sq = step.at("exp_avg_sq").get<Floats>();
            double largest_exp_avg = 0;
            for (std::size_t i = 0; i < initial.size(); ++i) {
                const std::string at =
                    cat("rate ", options.learning_rate, " step ", options.step_count, " element ", i);
                EXPECT_NEAR(state.master[i], master[i],
                            relative * std::abs(double{master[i]}) + relative * options.learning_rate)
                    << at;
                EXPECT_NEAR(state.exp_avg_sq[i], exp_avg_sq[i], relative * double{exp_avg_sq[i]}) << at;
                // exp_avg is a sum with cancellation: relative to the largest gradient so far
                const double scaled = std::abs(step.at("gradient")[i].get<double>()) * options.gradient_scale;
                largest_exp_avg =
                    std::max({std::abs(double{exp_avg[i]}), scaled, 10 * std::sqrt(double{exp_avg_sq[i]})});
                EXPECT_NEAR(state.exp_avg[i], exp_avg[i], relative * largest_exp_avg) << at;
                EXPECT_EQ(state.compute[i], state.master[i]) << at;
            }
            ++options.step_count;
        }
        ASSERT_NE(state.master, initial);
    }
}

// Sizes around the kernel's blocks; the reference is the definition in double.
TEST(AdamWTest, any_length_as_defined)
{
    for (const std::size_t size : {0u, 1u, 7u, 16u, 4095u, 4096u, 4097u, 10000u}) {
        AdamWOptions options;
        options.learning_rate = 1e-3;
        options.weight_decay = 0.1;
        options.gradient_scale = 0.5;
        State state(random_floats(size, 1, 0.02));
        std::vector<double> master(state.master.begin(), state.master.end()), exp_avg(size), exp_avg_sq(size);
        for (options.step_count = 1; options.step_count <= 3; ++options.step_count) {
            const Floats gradient = random_floats(size, static_cast<unsigned>(options.step_count) + 1, 1);
            state.step(options, gradient);
            for (std::size_t i = 0; i < size; ++i) {
                reference::adamw(options, double{gradient[i]}, master[i], exp_avg[i], exp_avg_sq[i]);
                // the update, a few times 1e-3, is off by some u of itself, the weight by u of itself per step
                ASSERT_NEAR(state.master[i], master[i], 3e-7 * std::abs(master[i]) + 2e-6 * options.learning_rate)
                    << size << " " << i;
                ASSERT_NEAR(state.exp_avg_sq[i], exp_avg_sq[i], relative * exp_avg_sq[i]);
                ASSERT_NEAR(state.exp_avg[i], exp_avg[i], 1e-6);
            }
        }
    }
}

TEST(AdamWTest, bf16_rounds_what_is_computed_with_not_the_master)
{
    AdamWOptions options;
    options.learning_rate = 5e-7;
    State rounded(random_floats(5000, 1, 0.02)), exact(rounded.master);
    const Floats gradient = random_floats(5000, 2, 1);
    exact.step(options, gradient);
    options.round_bf16 = true;
    rounded.step(options, gradient);
    EXPECT_EQ(rounded.master, exact.master);
    EXPECT_EQ(rounded.exp_avg, exact.exp_avg);
    EXPECT_EQ(rounded.exp_avg_sq, exact.exp_avg_sq);
    for (std::size_t i = 0; i < 5000; ++i)
        ASSERT_EQ(rounded.compute[i], bf16_to_float(float_to_bf16(rounded.master[i])));
}

// ZeRO shards cut the parameters anywhere: a shard's bits are those of the whole.
TEST(AdamWTest, bits_do_not_depend_on_the_shard)
{
    AdamWOptions options;
    options.learning_rate = 1e-3;
    const Floats initial = random_floats(9001, 1, 0.02), gradient = random_floats(9001, 2, 1);
    State whole(initial);
    whole.step(options, gradient);
    for (const std::size_t cut : {1u, 15u, 4096u, 4100u, 8999u}) {
        const auto at = static_cast<std::ptrdiff_t>(cut);
        State left(Floats(initial.begin(), initial.begin() + at)), right(Floats(initial.begin() + at, initial.end()));
        left.step(options, Floats(gradient.begin(), gradient.begin() + at));
        right.step(options, Floats(gradient.begin() + at, gradient.end()));
        left.master.insert(left.master.end(), right.master.begin(), right.master.end());
        left.exp_avg_sq.insert(left.exp_avg_sq.end(), right.exp_avg_sq.begin(), right.exp_avg_sq.end());
        EXPECT_EQ(left.master, whole.master) << "cut at " << cut;
        EXPECT_EQ(left.exp_avg_sq, whole.exp_avg_sq) << "cut at " << cut;
    }
}

TEST(SumOfSquaresTest, sums_in_double)
{
    for (const std::size_t size : {0u, 1u, 9u, 4096u, 4097u, 100001u}) {
        const Floats x = random_floats(size, 1, 1);
        double expected = 0;
        for (const float value : x)
            expected += double{value} * double{value};
        EXPECT_NEAR(sum_of_squares(x), expected, 1e-11 * expected); // 1e5 additions of 1e-16 each at the very most
        EXPECT_EQ(sum_of_squares(x), sum_of_squares(x));
    }
    const Floats large(100, 3e38f); // overflows f32
    EXPECT_NEAR(sum_of_squares(large) / 9e78, 1, 1e-6);
}

TEST(SumOfSquaresTest, non_finite_values_show)
{
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        for (const std::size_t at : {0u, 4096u, 4999u}) {
            Floats x(5000, 1.0f);
            x[at] = bad;
            EXPECT_FALSE(std::isfinite(sum_of_squares(x)));
        }
    }
}

TEST(Bf16Test, every_bf16_value_survives)
{
    for (unsigned bits = 0; bits < 0x10000; ++bits) {
        const float value = bf16_to_float(static_cast<std::uint16_t>(bits));
        if (std::isnan(value))
            EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(value)))) << bits;
        else
            EXPECT_EQ(float_to_bf16(value), bits);
    }
}

TEST(Bf16Test, rounds_to_nearest_even)
{
    // bf16 has 7 fraction bits: its step at 1 is 2^-7
    const double step = 1.0 / 128;
    const auto rounded = [](double value) {
        return static_cast<double>(bf16_to_float(float_to_bf16(static_cast<float>(value))));
    };
    EXPECT_EQ(rounded(1 + step / 2), 1);                   // a tie: to the even fraction
    EXPECT_EQ(rounded(1 + 3 * step / 2), 1 + 2 * step);    // a tie: up to the even one
    EXPECT_EQ(rounded(1 + step / 2 + 1e-6), 1 + step);     // just above
    EXPECT_EQ(rounded(1 + 3 * step / 2 - 1e-6), 1 + step); // just below
    EXPECT_EQ(rounded(-(1 + 3 * step / 2)), -(1 + 2 * step));
    EXPECT_TRUE(std::isinf(bf16_to_float(float_to_bf16(3.4e38f)))) << "beyond the largest bf16";
    EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(std::bit_cast<float>(0x7f800001u)))))
        << "a NaN whose payload is cut off";
    EXPECT_TRUE(std::signbit(bf16_to_float(float_to_bf16(-0.0f))));
}

TEST(Bf16Test, spans_are_rounded_like_values)
{
    Floats x = random_floats(1003, 1, 1), y = x;
    round_to_bf16(x);
    for (std::size_t i = 0; i < x.size(); ++i)
        ASSERT_EQ(x[i], bf16_to_float(float_to_bf16(y[i])));
}

} // namespace
} // namespace selm
