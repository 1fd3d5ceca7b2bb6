#pragma once

#include <climits>
#include <cstddef>

#include "selm/base/error.hpp"

namespace selm::comm {

/// MPI counts are int: a larger count is a bug here, never a silent wrap.
inline int to_count(std::size_t count)
{
    SELM_EXPECT(count <= static_cast<std::size_t>(INT_MAX));
    return static_cast<int>(count);
}

/// Largest number of bytes that one MPI call moves; longer transfers are cut into pieces. Tests make it small.
std::size_t max_message_bytes();
void set_max_message_bytes(std::size_t bytes); ///< for tests; the same on all ranks, at least 64

} // namespace selm::comm
