#pragma once

#include <bit>
#include <cstdint>

namespace selm::comm {

/// bf16 is the upper half of an fp32 number.
inline float float_of_bf16(std::uint16_t bits)
{
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

} // namespace selm::comm
