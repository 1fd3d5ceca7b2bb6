#pragma once

#include <chrono>
#include <functional>

#include "selm/comm/communicator.hpp"

namespace selm::benchmark {

/// Seconds that the slowest rank takes, from a barrier on. Collective.
inline double seconds_of(Communicator& comm, const std::function<void()>& work)
{
    comm.barrier("before a measurement");
    const auto start = std::chrono::steady_clock::now();
    work();
    const double mine = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return all_reduce_value(comm, mine, ReduceOp::max, "slowest rank");
}

} // namespace selm::benchmark
