#include <map>
#include <utility>

#include "device_backend.hpp"
#include "selm/base/error.hpp"
#include "selm/base/provenance.hpp"
#include "selm/comm/agree.hpp"

namespace selm::comm {

namespace {

/// Strings of all ranks, in rank order. Collective.
std::vector<std::string> gather_strings(Communicator& ranks, const std::string& own, std::string_view label)
{
    std::vector<std::string> all;
    for (const auto& bytes : ranks.all_gather_ragged(std::as_bytes(std::span(own.data(), own.size())), label))
        all.emplace_back(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    return all;
}

} // namespace

void check_one_rank_per_device(const std::vector<DevicePlace>& places)
{
    std::map<std::pair<std::string, std::string>, std::size_t> first_rank;
    for (std::size_t rank = 0; rank < places.size(); ++rank) {
        const DevicePlace& place = places[rank];
        const auto [found, is_new] = first_rank.emplace(std::pair(place.machine, place.bus), rank);
        if (!is_new)
            throw config_error(cat("ranks ", found->second, " and ", rank, " would share the GPU ", place.bus, " (", place.name,
                                   ") of ", place.host, ": every rank needs a GPU of its own. Start at most one rank per GPU on each "
                                   "node (SLURM: --ntasks-per-node and --gpus-per-node equal)"));
    }
}

DeviceChoice choose_device(Communicator& ranks, DeviceBackend& backend)
{
    const auto node = ranks.split_node("device map");
    DeviceChoice own{};
    agree(ranks, "device map", [&] {
        with_context(cat("rank ", ranks.rank(), " on ", host_name()), [&] {
            own.index = node->rank() % backend.visible_devices();
            own.place = backend.use_device(own.index);
        });
    });
    const auto hosts = gather_strings(ranks, own.place.host, "device map");
    const auto machines = gather_strings(ranks, own.place.machine, "device map");
    const auto buses = gather_strings(ranks, own.place.bus, "device map");
    const auto names = gather_strings(ranks, own.place.name, "device map");
    agree(ranks, "device map", [&] {
        std::vector<DevicePlace> places;
        for (std::size_t r = 0; r < hosts.size(); ++r)
            places.push_back({hosts[r], machines[r], buses[r], names[r]});
        check_one_rank_per_device(places);
    });
    return own;
}

} // namespace selm::comm
