#include "selm/base/rng.hpp"

#include <cmath>
#include <numbers>

#include "selm/base/error.hpp"

namespace selm {

namespace {

constexpr std::uint32_t low_word(std::uint64_t value)
{
    return static_cast<std::uint32_t>(value);
}

constexpr std::uint32_t high_word(std::uint64_t value)
{
    return static_cast<std::uint32_t>(value >> 32);
}

} // namespace

std::array<std::uint32_t, 4> philox4x32_10(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key)
{
    constexpr std::uint64_t multiplier_0 = 0xD2511F53U;
    constexpr std::uint64_t multiplier_1 = 0xCD9E8D57U;
    constexpr std::uint32_t weyl_0 = 0x9E3779B9U; // golden ratio
    constexpr std::uint32_t weyl_1 = 0xBB67AE85U; // sqrt(3) - 1
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t product_0 = multiplier_0 * counter[0];
        const std::uint64_t product_1 = multiplier_1 * counter[2];
        counter = {high_word(product_1) ^ counter[1] ^ key[0], low_word(product_1),
                   high_word(product_0) ^ counter[3] ^ key[1], low_word(product_0)};
        key[0] += weyl_0;
        key[1] += weyl_1;
    }
    return counter;
}

// (seed, purpose, iteration) make the stream's key by one Philox block, because the counter has room for the row and the
// draw number only.
RandomStream::RandomStream(std::uint64_t seed, std::uint32_t purpose, std::uint64_t iteration, std::uint64_t row)
{
    const auto mixed = philox4x32_10({purpose, low_word(iteration), high_word(iteration), 0x53454C4DU},
                                     {low_word(seed), high_word(seed)});
    key_ = {mixed[0], mixed[1]};
    counter_ = {0, 0, low_word(row), high_word(row)};
}

std::uint32_t RandomStream::next_u32()
{
    if (used_ == block_.size()) {
        block_ = philox4x32_10(counter_, key_);
        used_ = 0;
        if (++counter_[0] == 0)
            ++counter_[1];
    }
    return block_[used_++];
}

std::uint64_t RandomStream::next_u64()
{
    const std::uint64_t high = next_u32();
    return (high << 32) | next_u32();
}

double RandomStream::next_double()
{
    return static_cast<double>(next_u64() >> 11) * 0x1.0p-53;
}

double RandomStream::next_normal()
{
    const double radius = std::sqrt(-2.0 * std::log(1.0 - next_double())); // 1 - u lies in (0, 1]
    return radius * std::cos(2.0 * std::numbers::pi * next_double());
}

// Lemire, "Fast random integer generation in an interval", ACM TOMACS 2019: multiply, reject the biased low part.
std::uint64_t RandomStream::next_below(std::uint64_t bound)
{
    SELM_EXPECT(bound > 0);
    __extension__ using Wide = unsigned __int128;
    const std::uint64_t threshold = (0 - bound) % bound;
    while (true) {
        const Wide product = static_cast<Wide>(next_u64()) * bound;
        if (static_cast<std::uint64_t>(product) >= threshold)
            return static_cast<std::uint64_t>(product >> 64);
    }
}

} // namespace selm
