#include "selm/comm/places.hpp"

#include <algorithm>
#include <map>
#include <optional>
#include <sstream>
#include <utility>

#include <sched.h>

#include "device_backend.hpp"
#include "selm/base/error.hpp"
#include "selm/base/provenance.hpp"

namespace selm {

namespace {

/// Ascending; empty when the system does not tell.
std::vector<int> allowed_cores()
{
    // The kernel refuses sets that are smaller than its own number of CPUs.
    for (int most = CPU_SETSIZE; most <= 64 * CPU_SETSIZE; most *= 2) {
        cpu_set_t* const set = CPU_ALLOC(static_cast<std::size_t>(most));
        const std::size_t bytes = CPU_ALLOC_SIZE(static_cast<std::size_t>(most));
        std::vector<int> cores;
        if (set != nullptr && sched_getaffinity(0, bytes, set) == 0)
            for (int core = 0; core < most; ++core)
                if (CPU_ISSET_S(static_cast<std::size_t>(core), bytes, set))
                    cores.push_back(core);
        CPU_FREE(set);
        if (!cores.empty())
            return cores;
    }
    return {};
}

std::string own_device(Communicator& ranks, bool on_gpus)
{
    if (!on_gpus)
        return "cpu";
#ifdef SELM_ENABLE_CUDA
    const auto backend = comm::make_nccl_backend();
    const comm::DeviceChoice choice = comm::choose_device(ranks, *backend);
    return cat("cuda:", choice.index, " ", choice.place.name, " (", choice.place.bus, ")");
#else
    static_cast<void>(ranks);
    throw config_error("--device cuda: this build has no CUDA (SELM_ENABLE_CUDA is off). Build the preset \"cuda\", or pass --device cpu");
#endif
}

/// A host with its ranks.
struct Host {
    std::string name;
    std::vector<int> ranks;
};

/// In order of their first ranks.
std::vector<Host> hosts_of(std::span<const RankPlace> places)
{
    std::vector<Host> hosts;
    std::map<std::string, std::size_t> index;
    for (std::size_t rank = 0; rank < places.size(); ++rank) {
        const auto [found, is_new] = index.emplace(places[rank].host, hosts.size());
        if (is_new)
            hosts.push_back({places[rank].host, {}});
        hosts[found->second].ranks.push_back(static_cast<int>(rank));
    }
    return hosts;
}

const RankPlace& place_of(std::span<const RankPlace> places, int rank)
{
    return places[static_cast<std::size_t>(rank)];
}

/// The same text for ranks of a host that are alike once: "0-7 each", else one after another.
std::string cores_text(std::span<const RankPlace> places, const Host& host)
{
    const std::vector<int>& first = place_of(places, host.ranks.front()).cores;
    const auto is_like_first = [&](int rank) { return place_of(places, rank).cores == first; };
    if (host.ranks.size() > 1 && std::all_of(host.ranks.begin(), host.ranks.end(), is_like_first))
        return cat(number_ranges(first), " (all of them each)");
    std::string text;
    for (const int rank : host.ranks)
        text += cat(text.empty() ? "" : " | ", number_ranges(place_of(places, rank).cores));
    return text;
}

std::string devices_text(std::span<const RankPlace> places, const Host& host, bool with_addresses)
{
    std::vector<std::string> devices;
    for (const int rank : host.ranks) {
        const std::string& device = place_of(places, rank).device;
        devices.push_back(with_addresses ? device : device.substr(0, device.rfind(" (")));
    }
    if (std::count(devices.begin(), devices.end(), devices.front()) == static_cast<std::ptrdiff_t>(devices.size()))
        return devices.front();
    std::string text;
    for (const std::string& device : devices)
        text += cat(text.empty() ? "" : " | ", device);
    return text;
}

/// Hosts with equal texts, in order of the first of each group.
std::vector<std::vector<const Host*>> alike(const std::vector<Host>& hosts, const std::vector<std::string>& texts)
{
    std::vector<std::vector<const Host*>> groups;
    std::map<std::string, std::size_t> index;
    for (std::size_t i = 0; i < hosts.size(); ++i) {
        const auto [found, is_new] = index.emplace(texts[i], groups.size());
        if (is_new)
            groups.emplace_back();
        groups[found->second].push_back(&hosts[i]);
    }
    return groups;
}

std::string names_of(const std::vector<const Host*>& hosts)
{
    if (hosts.size() == 1)
        return hosts.front()->name;
    return cat(hosts.size(), " hosts (", hosts.front()->name, hosts.size() > 2 ? " ... " : ", ", hosts.back()->name, ")");
}

std::vector<int> ranks_of(const std::vector<const Host*>& hosts)
{
    std::vector<int> ranks;
    for (const Host* host : hosts)
        ranks.insert(ranks.end(), host->ranks.begin(), host->ranks.end());
    std::sort(ranks.begin(), ranks.end());
    return ranks;
}

/// The first ranks of the host that have fewer cores than threads, as positions among the host's ranks, and these cores.
struct Crowd {
    std::vector<int> members;
    std::vector<int> cores;
};
std::optional<Crowd> crowd_of(std::span<const RankPlace> places, const Host& host, std::int64_t threads)
{
    std::vector<std::vector<int>> masks;
    std::vector<int> all;
    for (const int rank : host.ranks) {
        masks.push_back(place_of(places, rank).cores);
        std::vector<int> merged;
        std::set_union(all.begin(), all.end(), masks.back().begin(), masks.back().end(), std::back_inserter(merged));
        all = std::move(merged);
    }
    masks.push_back(all);
    for (const std::vector<int>& cores : masks) {
        Crowd crowd{{}, cores};
        for (std::size_t i = 0; i < host.ranks.size(); ++i)
            if (std::includes(cores.begin(), cores.end(), masks[i].begin(), masks[i].end()))
                crowd.members.push_back(static_cast<int>(i));
        if (!cores.empty() && static_cast<std::int64_t>(crowd.members.size()) * threads > static_cast<std::int64_t>(cores.size()))
            return crowd;
    }
    return std::nullopt;
}

} // namespace

std::vector<RankPlace> find_places(Communicator& ranks, bool on_gpus)
{
    std::string own = cat(host_name(), '\n', own_device(ranks, on_gpus), '\n');
    for (const int core : allowed_cores())
        own += cat(core, ' ');
    std::vector<RankPlace> places;
    for (const auto& bytes : ranks.all_gather_ragged(std::as_bytes(std::span(own.data(), own.size())), "places of ranks")) {
        std::istringstream text(std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
        RankPlace& place = places.emplace_back();
        std::getline(text, place.host);
        std::getline(text, place.device);
        for (int core = 0; text >> core;)
            place.cores.push_back(core);
    }
    return places;
}

std::string number_ranges(std::span<const int> numbers)
{
    std::string text;
    for (std::size_t i = 0; i < numbers.size();) {
        std::size_t end = i + 1;
        while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1)
            ++end;
        text += cat(text.empty() ? "" : ",", numbers[i]);
        if (end > i + 1)
            text += cat(end == i + 2 ? "," : "-", numbers[end - 1]);
        i = end;
    }
    return text;
}

std::vector<std::string> describe_places(std::span<const RankPlace> places)
{
    const std::vector<Host> hosts = hosts_of(places);
    std::vector<std::string> texts;
    for (const Host& host : hosts)
        texts.push_back(cat("cores ", cores_text(places, host), ", device ", devices_text(places, host, false)));
    std::vector<std::string> lines;
    for (const auto& group : alike(hosts, texts)) {
        const std::vector<int> ranks = ranks_of(group);
        const auto index = static_cast<std::size_t>(group.front() - hosts.data());
        lines.push_back(cat(ranks.size() == 1 ? "rank " : "ranks ", number_ranges(ranks), ": ", names_of(group), ", ",
                            group.size() == 1 ? cat("cores ", cores_text(places, hosts[index]), ", device ",
                                                    devices_text(places, hosts[index], true))
                                              : cat("on each ", texts[index])));
    }
    return lines;
}

std::vector<std::string> warn_of_shared_cores(std::span<const RankPlace> places, std::int64_t threads_per_rank)
{
    const std::vector<Host> hosts = hosts_of(places);
    std::vector<std::string> texts;
    for (const Host& host : hosts) {
        const auto crowd = crowd_of(places, host, threads_per_rank);
        texts.push_back(!crowd ? ""
                               : cat(crowd->members.size(), crowd->members.size() == 1 ? " rank x " : " ranks x ", threads_per_rank,
                                     threads_per_rank == 1 ? " thread on " : " threads on ", crowd->cores.size() == 1 ? "core " : "cores ",
                                     number_ranges(crowd->cores)));
    }
    std::vector<std::string> lines;
    for (const auto& group : alike(hosts, texts)) {
        const std::string& text = texts[static_cast<std::size_t>(group.front() - hosts.data())];
        if (!text.empty())
            lines.push_back(cat(names_of(group), ": ", text,
                                " (they take turns, and each wait for a rank costs a time slice). Start one rank per core and bind "
                                "each to its own: srun --cpus-per-task, or mpirun --map-by core --bind-to core"));
    }
    return lines;
}

} // namespace selm
