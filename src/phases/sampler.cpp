#include "selm/phases/sampler.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "selm/base/error.hpp"

namespace selm {
namespace {

constexpr std::size_t lanes = 8;
constexpr std::size_t block = 256;

constexpr float lowest = -87; ///< exp of it is 1.6e-38

/// exp(x) for lowest <= x <= 0 within 2 units in the last place, NaN kept. Written so that compilers vectorise loops over it
/// without relaxed floating-point rules: round to an integer power of two by adding 1.5 * 2^23, then a polynomial on
/// [-ln2/2, ln2/2].
inline float exp_of_negative(float x)
{
    constexpr float log2_e = 1.44269504088896341F;
    constexpr float ln2_high = 0.693359375F, ln2_low = -2.12194440e-4F;
    constexpr float magic = 12582912.0F;
    const float shifted = x * log2_e + magic;
    const float n = shifted - magic;
    const float r = (x - n * ln2_high) - n * ln2_low;
    float p = 1.0F / 5040.0F;
    p = p * r + 1.0F / 720.0F;
    p = p * r + 1.0F / 120.0F;
    p = p * r + 1.0F / 24.0F;
    p = p * r + 1.0F / 6.0F;
    p = p * r + 0.5F;
    p = p * r + 1.0F;
    p = p * r + 1.0F;
    const std::int32_t exponent = std::bit_cast<std::int32_t>(shifted) - std::bit_cast<std::int32_t>(magic);
    return p * std::bit_cast<float>((exponent + 127) << 23);
}

/// out[i] = exp((x[i] - largest) * scale); returns their sum (double, in an order that depends on the size alone).
double exponentials(std::span<const float> x, float largest, float scale, float* out)
{
    std::array<double, lanes> sums{};
    std::array<float, block> buffer;
    for (std::size_t begin = 0; begin < x.size(); begin += block) {
        const std::size_t count = std::min(block, x.size() - begin);
        float* terms = out != nullptr ? out + begin : buffer.data();
        // In a loop of its own: in one with the polynomial compilers make a branch of the bound, and no vector code.
        for (std::size_t i = 0; i < count; ++i) {
            const float value = (x[begin + i] - largest) * scale;
            terms[i] = value < lowest ? lowest : value;
        }
        for (std::size_t i = 0; i < count; ++i)
            terms[i] = exp_of_negative(terms[i]);
        std::size_t i = 0;
        for (; i + lanes <= count; i += lanes) {
            for (std::size_t lane = 0; lane < lanes; ++lane)
                sums[lane] += static_cast<double>(terms[i + lane]);
        }
        for (; i < count; ++i)
            sums[i % lanes] += static_cast<double>(terms[i]);
    }
    double total = 0;
    for (const double sum : sums)
        total += sum;
    return total;
}

float largest_of(std::span<const float> x)
{
    std::array<float, lanes> best;
    best.fill(-std::numeric_limits<float>::infinity());
    std::size_t i = 0;
    for (; i + lanes <= x.size(); i += lanes) {
        for (std::size_t lane = 0; lane < lanes; ++lane)
            best[lane] = x[i + lane] > best[lane] ? x[i + lane] : best[lane];
    }
    for (; i < x.size(); ++i)
        best[0] = x[i] > best[0] ? x[i] : best[0];
    return *std::max_element(best.begin(), best.end());
}

} // namespace

double log_sum_exp(std::span<const float> logits)
{
    const float largest = largest_of(logits);
    const double result = static_cast<double>(largest) + std::log(exponentials(logits, largest, 1.0F, nullptr));
    SELM_VALIDATE(std::isfinite(result), ExitCode::bad_data,
                  "the model's logits are not finite (its weights are damaged or overflow). Check the model");
    return result;
}

Sampler::Sampler(const SamplingOptions& options, std::int64_t allowed)
    : options_(options), allowed_(static_cast<std::size_t>(allowed))
{
    SELM_EXPECT(allowed > 0 && options.temperature >= 0 && options.top_p > 0 && options.top_p <= 1 &&
                options.top_k >= 0);
}

SampledToken Sampler::sample(std::span<const float> logits, RandomStream& stream)
{
    SELM_EXPECT(logits.size() >= allowed_);
    const double lse = log_sum_exp(logits);
    const auto choices = logits.first(allowed_);
    const float largest = largest_of(choices);
    std::int32_t id = 0;
    if (options_.temperature > 0)
        id = draw(choices, largest, stream);
    else
        id = static_cast<std::int32_t>(std::find(choices.begin(), choices.end(), largest) - choices.begin());
    return {id, static_cast<float>(static_cast<double>(logits[static_cast<std::size_t>(id)]) - lse)};
}

std::int32_t Sampler::draw(std::span<const float> logits, float largest, RandomStream& stream)
{
    weights_.resize(allowed_);
    double total = exponentials(logits, largest, static_cast<float>(1.0 / options_.temperature), weights_.data());
    const double u = stream.next_double();
    const auto weight_of = [&](std::int32_t id) { return static_cast<double>(weights_[static_cast<std::size_t>(id)]); };

    const bool by_count = options_.top_k > 0 && static_cast<std::size_t>(options_.top_k) < allowed_;
    if (!by_count && options_.top_p >= 1) {
        double rest = u * total;
        std::int32_t last = 0;
        for (std::size_t i = 0; i < allowed_; ++i) {
            if (weights_[i] <= 0)
                continue;
            last = static_cast<std::int32_t>(i);
            rest -= static_cast<double>(weights_[i]);
            if (rest < 0)
                break;
        }
        return last;
    }

    // Most probable first, from a heap: only as many are sorted as are kept.
    order_.resize(allowed_);
    for (std::size_t i = 0; i < allowed_; ++i)
        order_[i] = static_cast<std::int32_t>(i);
    const auto later = [&](std::int32_t a, std::int32_t b) {
        const float x = logits[static_cast<std::size_t>(a)], y = logits[static_cast<std::size_t>(b)];
        return x != y ? x < y : a > b;
    };
    std::make_heap(order_.begin(), order_.end(), later);
    auto heap_end = order_.end();
    const auto pop = [&] {
        std::pop_heap(order_.begin(), heap_end, later);
        return *--heap_end;
    };
    std::vector<std::int32_t> kept;
    if (by_count) {
        total = 0;
        while (kept.size() < static_cast<std::size_t>(options_.top_k)) {
            kept.push_back(pop());
            total += weight_of(kept.back());
        }
    }
    double mass = 0;
    std::size_t count = 0;
    while (count < allowed_ && (!by_count || count < kept.size())) {
        if (!by_count)
            kept.push_back(pop());
        mass += weight_of(kept[count++]);
        if (options_.top_p < 1 && mass >= options_.top_p * total)
            break;
    }
    double rest = u * mass;
    for (std::size_t i = 0; i < count; ++i) {
        rest -= weight_of(kept[i]);
        if (rest < 0)
            return kept[i];
    }
    return kept[count - 1];
}

} // namespace selm
