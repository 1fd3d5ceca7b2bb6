#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include "message_limit.hpp"

namespace selm::comm {

/// How a reduce-scatter moves its data; the same on all ranks, since it depends on offsets and limits alone.
struct ReducePlan {
    bool in_rounds = false; ///< point to point in rounds, with a tag of its own; else one MPI call
    std::size_t round = 0;  ///< elements of a shard that a round moves from each other rank, at least 1
};

inline std::size_t elements_of(std::span<const std::size_t> offsets, std::size_t rank)
{
    return offsets[rank + 1] - offsets[rank];
}

/// The buffer for the other ranks' parts is at most as large as all shards together and as @p buffer_bytes (but holds one
/// element of each).
inline ReducePlan plan_reduce(std::span<const std::size_t> offsets, std::size_t element_bytes, std::size_t buffer_bytes)
{
    const std::size_t ranks = offsets.size() - 1;
    const std::size_t others = std::max<std::size_t>(1, ranks - 1);
    const std::size_t total = offsets.back() - offsets.front();
    std::size_t longest = 0;
    for (std::size_t r = 0; r < ranks; ++r)
        longest = std::max(longest, elements_of(offsets, r));
    const std::size_t round = std::min({max_message_bytes() / element_bytes, total / others, buffer_bytes / element_bytes / others});
    const bool one_call = total * element_bytes <= max_message_bytes() && longest <= round;
    return {ranks > 1 && longest > 0 && !one_call, std::max<std::size_t>(1, round)};
}

} // namespace selm::comm
