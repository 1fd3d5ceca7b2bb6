#pragma once

#include <cstdint>
#include <span>

#include "scalar_functions.hpp"
#include "selm/kernels/engine.hpp"

namespace selm {

AdamWFactors adamw_factors(const AdamWOptions& options);

/// adamw_step of engine.hpp with compute weights stored in bf16.
void adamw_step_bf16(const AdamWOptions& options, std::span<const float> gradient, std::span<float> master,
                     std::span<float> exp_avg, std::span<float> exp_avg_sq, std::span<std::uint16_t> compute);

} // namespace selm
