#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "selm/comm/communicator.hpp"

namespace selm {

/// Where a rank runs.
struct RankPlace {
    std::string host;
    std::vector<int> cores; ///< logical CPUs that it may use (its affinity mask), ascending
    std::string device;     ///< "cpu", or the GPU's index, model and PCI address
};

/**
 * @brief Every rank's place, in rank order. On GPUs a rank takes device (its rank on the node) modulo (devices that it
 * sees) and makes it the current one. Collective.
 * @throws Error configuration on all ranks when a rank sees no GPU, or when two ranks would share one.
 */
std::vector<RankPlace> find_places(Communicator& ranks, bool on_gpus);

/// One line for each group of hosts that are alike: ranks, hosts, cores and devices of each of their ranks.
std::vector<std::string> describe_places(std::span<const RankPlace> places);

/// One line for each group of hosts on which ranks have fewer cores than threads, which take turns then; empty when all
/// is well.
std::vector<std::string> warn_of_shared_cores(std::span<const RankPlace> places, std::int64_t threads_per_rank);

/// "0-3,8" of ascending numbers.
std::string number_ranges(std::span<const int> numbers);

} // namespace selm
