#include "rope.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace selm {
namespace {

/// a * b rounded to float, whatever the compiler would like to fuse it with.
float product(float a, float b)
{
    return static_cast<float>(static_cast<double>(a) * static_cast<double>(b));
}

/// The operations of transformers' _compute_llama3_parameters, each rounded to float32; torch divides a number by a tensor
/// as number times reciprocal.
float stretched(float frequency, const Llama3RopeScaling& scaling)
{
    const auto original = static_cast<double>(scaling.original_positions);
    const auto factor = static_cast<float>(scaling.factor);
    const auto low = static_cast<float>(scaling.low_frequency_factor);
    const float wavelength = product(1.0F / frequency, static_cast<float>(2 * std::numbers::pi));
    if (wavelength > static_cast<float>(original / scaling.low_frequency_factor))
        return frequency / factor;
    if (wavelength < static_cast<float>(original / scaling.high_frequency_factor))
        return frequency;
    const float smooth = (product(1.0F / wavelength, static_cast<float>(original)) - low) /
                         static_cast<float>(scaling.high_frequency_factor - scaling.low_frequency_factor);
    return product(1.0F - smooth, frequency) / factor + product(smooth, frequency);
}

} // namespace

std::vector<float> rope_inverse_frequencies(double theta, std::int64_t head_dim,
                                            const std::optional<Llama3RopeScaling>& scaling)
{
    std::vector<float> out;
    for (std::int64_t i = 0; i < head_dim; i += 2) {
        const float exponent = static_cast<float>(i) / static_cast<float>(head_dim);
        const auto power = static_cast<float>(std::pow(theta, static_cast<double>(exponent)));
        out.push_back(scaling ? stretched(1.0F / power, *scaling) : 1.0F / power);
    }
    return out;
}

namespace {

std::int64_t table_rows(std::int64_t positions) { return (positions + 255) / 256 * 256; }

} // namespace

std::int64_t RopeTables::bytes(const DecoderConfig& config, std::int64_t positions)
{
    return 2 * table_rows(positions) * (config.head_dim / 2) * static_cast<std::int64_t>(sizeof(float));
}

RopeTables::RopeTables(Engine& engine, const DecoderConfig& config)
    : engine_(engine),
      inverse_frequencies_(rope_inverse_frequencies(config.rope_theta, config.head_dim, config.rope_scaling))
{
}

void RopeTables::cover(std::int64_t positions)
{
    if (positions <= cosines_.rows)
        return;
    const std::int64_t rows = table_rows(positions);
    const auto pairs = static_cast<std::int64_t>(inverse_frequencies_.size());
    std::vector<float> cosines;
    std::vector<float> sines;
    for (std::int64_t position = 0; position < rows; ++position) {
        for (const float frequency : inverse_frequencies_) {
            const float angle = static_cast<float>(position) * frequency;
            cosines.push_back(static_cast<float>(std::cos(static_cast<double>(angle))));
            sines.push_back(static_cast<float>(std::sin(static_cast<double>(angle))));
        }
    }
    cosines_ = sines_ = {}; // the old tables go first
    cosines_ = engine_.allocate(rows, pairs, DType::f32);
    sines_ = engine_.allocate(rows, pairs, DType::f32);
    engine_.copy_from_host(cosines.data(), cosines_);
    engine_.copy_from_host(sines.data(), sines_);
}

} // namespace selm
