#include "rope.hpp"

#include <algorithm>
#include <cmath>

namespace selm {

std::vector<float> rope_inverse_frequencies(double theta, std::int64_t head_dim)
{
    std::vector<float> out;
    for (std::int64_t i = 0; i < head_dim; i += 2) {
        const float exponent = static_cast<float>(i) / static_cast<float>(head_dim);
        const auto power = static_cast<float>(std::pow(theta, static_cast<double>(exponent)));
        out.push_back(1.0F / power);
    }
    return out;
}

RopeTables::RopeTables(Engine& engine, double theta, std::int64_t head_dim)
    : engine_(engine), inverse_frequencies_(rope_inverse_frequencies(theta, head_dim))
{
}

void RopeTables::cover(std::int64_t positions)
{
    if (positions <= cosines_.rows)
        return;
    const std::int64_t rows = std::max(positions, std::max(std::int64_t{256}, 2 * cosines_.rows));
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
    cosines_ = engine_.allocate(rows, pairs, DType::f32);
    sines_ = engine_.allocate(rows, pairs, DType::f32);
    engine_.copy_from_host(cosines.data(), cosines_);
    engine_.copy_from_host(sines.data(), sines_);
}

} // namespace selm
