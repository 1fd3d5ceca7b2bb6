#include <algorithm>
#include <cmath>
#include <vector>

#include <Kokkos_Core.hpp>

#include "adamw.hpp"
#include "selm/base/error.hpp"
#include "selm/kernels/engine.hpp"

namespace selm {
namespace {

using HostSpace = Kokkos::DefaultHostExecutionSpace;

/// Elements per work item: fixed, because sums of squares are added per block and must not depend on threads.
constexpr std::int64_t block_elements = sum_block_elements;

template<typename Body>
void for_blocks(const char* label, std::int64_t elements, const Body& body)
{
    const std::int64_t blocks = (elements + block_elements - 1) / block_elements;
    Kokkos::parallel_for(label, Kokkos::RangePolicy<HostSpace, Kokkos::IndexType<std::int64_t>>(0, blocks),
                         [&](std::int64_t i) {
                             const std::int64_t begin = i * block_elements;
                             body(i, begin, std::min(block_elements, elements - begin));
                         });
    HostSpace().fence();
}

enum class Output { f32, f32_rounded, bf16 };

template<Output output, typename Compute>
void adamw_block(const AdamWFactors& f, std::int64_t count, const float* gradient, float* master, float* exp_avg,
                 float* exp_avg_sq, Compute* compute)
{
#pragma GCC ivdep
    for (std::int64_t i = 0; i < count; ++i) {
        float m = exp_avg[i], v = exp_avg_sq[i];
        const float w = adamw_element(f, gradient[i], master[i], m, v);
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        master[i] = w;
        if constexpr (output == Output::bf16)
            compute[i] = bf16_of(w);
        else
            compute[i] = output == Output::f32_rounded ? float_of_bf16(bf16_of(w)) : w;
    }
}

template<typename Compute, typename Block>
void step_in_blocks(const AdamWOptions& options, const Block& block, std::span<const float> gradient, std::span<float> master,
                    std::span<float> exp_avg, std::span<float> exp_avg_sq, std::span<Compute> compute)
{
    const std::size_t size = gradient.size();
    SELM_EXPECT(master.size() == size && exp_avg.size() == size && exp_avg_sq.size() == size && compute.size() == size);
    const AdamWFactors factors = adamw_factors(options);
    for_blocks("adamw_step", static_cast<std::int64_t>(size),
               [&](std::int64_t, std::int64_t begin, std::int64_t count) {
                   block(factors, count, gradient.data() + begin, master.data() + begin, exp_avg.data() + begin,
                         exp_avg_sq.data() + begin, compute.data() + begin);
               });
}

} // namespace

AdamWFactors adamw_factors(const AdamWOptions& options)
{
    SELM_EXPECT(options.step_count >= 1);
    const double count = static_cast<double>(options.step_count);
    const double bias1 = 1 - std::pow(options.beta1, count), bias2 = 1 - std::pow(options.beta2, count);
    return {.gradient_scale = static_cast<float>(options.gradient_scale),
            .decay = static_cast<float>(1 - options.learning_rate * options.weight_decay),
            .one_minus_beta1 = static_cast<float>(1 - options.beta1),
            .beta2 = static_cast<float>(options.beta2),
            .one_minus_beta2 = static_cast<float>(1 - options.beta2),
            .step_size = static_cast<float>(options.learning_rate / bias1),
            .inverse_root_bias2 = static_cast<float>(1 / std::sqrt(bias2)),
            .epsilon = static_cast<float>(options.epsilon)};
}

void adamw_step(const AdamWOptions& options, std::span<const float> gradient, std::span<float> master,
                std::span<float> exp_avg, std::span<float> exp_avg_sq, std::span<float> compute)
{
    const auto block = options.round_bf16 ? adamw_block<Output::f32_rounded, float> : adamw_block<Output::f32, float>;
    step_in_blocks(options, block, gradient, master, exp_avg, exp_avg_sq, compute);
}

void adamw_step_bf16(const AdamWOptions& options, std::span<const float> gradient, std::span<float> master,
                     std::span<float> exp_avg, std::span<float> exp_avg_sq, std::span<std::uint16_t> compute)
{
    step_in_blocks(options, adamw_block<Output::bf16, std::uint16_t>, gradient, master, exp_avg, exp_avg_sq, compute);
}

double sum_of_squares(std::span<const float> values)
{
    const auto size = static_cast<std::int64_t>(values.size());
    std::vector<double> sums(static_cast<std::size_t>((size + block_elements - 1) / block_elements));
    for_blocks("sum_of_squares", size, [&](std::int64_t block, std::int64_t begin, std::int64_t count) {
        constexpr std::int64_t lanes = sum_lanes;
        double partial[lanes] = {};
        const float* x = values.data() + begin;
        const std::int64_t whole = count - count % lanes;
        for (std::int64_t i = 0; i < whole; i += lanes)
            for (std::int64_t lane = 0; lane < lanes; ++lane)
                partial[lane] += static_cast<double>(x[i + lane]) * static_cast<double>(x[i + lane]);
        for (std::int64_t i = whole; i < count; ++i)
            partial[i - whole] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
        double sum = 0;
        for (const double value : partial)
            sum += value;
        sums[static_cast<std::size_t>(block)] = sum;
    });
    double total = 0;
    for (const double sum : sums)
        total += sum;
    return total;
}

} // namespace selm
