#include <map>
#include <utility>

#include "device_backend.hpp"
#include "selm/base/error.hpp"

namespace selm::comm {

void check_one_rank_per_device(const std::vector<DevicePlace>& places)
{
    std::map<std::pair<std::string, std::string>, std::size_t> first_rank;
    for (std::size_t rank = 0; rank < places.size(); ++rank) {
        const DevicePlace& place = places[rank];
        const auto [found, is_new] = first_rank.emplace(std::pair(place.machine, place.bus), rank);
        if (!is_new)
            throw config_error(cat("ranks ", found->second, " and ", rank, " would share the GPU ", place.bus, " (", place.name,
                                   ") of ", place.host, ": NCCL needs one GPU per rank. Start at most one rank per GPU on each "
                                   "node (SLURM: --ntasks-per-node and --gpus-per-node equal)"));
    }
}

} // namespace selm::comm
