#pragma once

#include <array>
#include <cstdint>

namespace selm {

/// One block of Philox-4x32 with 10 rounds (Salmon et al., SC11): four random words from a counter and a key.
std::array<std::uint32_t, 4> philox4x32_10(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key);

/**
 * @brief Counter-based random stream: a pure function of (seed, stream ids) and a draw counter, never of rank or order.
 *
 * Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11).
 */
class RandomStream {
  public:
    /// @param purpose separates users of the same (iteration, row): 1 sampling, 2 shuffling, 3 initialisation.
    RandomStream(std::uint64_t seed, std::uint32_t purpose, std::uint64_t iteration, std::uint64_t row);

    std::uint32_t next_u32();
    std::uint64_t next_u64();
    double next_double(); ///< uniform in [0, 1), 53 bits
    double next_normal(); ///< standard normal (Box-Muller)
    std::uint64_t next_below(std::uint64_t bound); ///< uniform in [0, bound), unbiased; bound > 0

  private:
    std::array<std::uint32_t, 2> key_{};
    std::array<std::uint32_t, 4> counter_{};
    std::array<std::uint32_t, 4> block_{};
    unsigned used_ = 4;
};

} // namespace selm
