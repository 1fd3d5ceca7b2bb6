#include <bit>

#include "elementwise.hpp"
#include "selm/kernels/engine.hpp"

namespace selm {

std::uint16_t float_to_bf16(float value) { return elementwise::to_bf16(value); }

float bf16_to_float(std::uint16_t value) { return elementwise::from_bf16(value); }

void round_to_bf16(std::span<float> values)
{
    for (float& value : values)
        value = elementwise::from_bf16(elementwise::to_bf16(value));
}

} // namespace selm
