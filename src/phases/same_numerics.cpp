#include "same_numerics.hpp"

#include <cstddef>
#include <span>
#include <string_view>
#include <vector>

#include "selm/base/error.hpp"
#include "selm/base/provenance.hpp"

namespace selm {

void check_same_numerics(const std::string& own, Communicator& comm)
{
    const std::string mine = cat(own, " (", host_name(), ")");
    const auto gathered = comm.all_gather_ragged(std::as_bytes(std::span<const char>(mine)), "engines of the ranks");
    const auto text_of = [&](std::size_t rank) {
        return std::string_view(reinterpret_cast<const char*>(gathered[rank].data()), gathered[rank].size());
    };
    const auto numerics_of = [&](std::size_t rank) { return text_of(rank).substr(0, text_of(rank).rfind(" (")); };
    for (std::size_t rank = 1; rank < gathered.size(); ++rank)
        SELM_VALIDATE(numerics_of(rank) == numerics_of(0), ExitCode::configuration,
                      "rank 0 multiplies with " << text_of(0) << ", rank " << rank << " with " << text_of(rank)
                                                << " (results would depend on which rank takes which row). Run on nodes of one kind "
                                                   "(SLURM: --constraint), or with --dtype fp32");
}

} // namespace selm
