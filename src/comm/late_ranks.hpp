#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace selm::comm {

/// What the watchdog of a waiting rank knows of another rank of the communicator.
struct RankState {
    enum class Kind {
        silent,  ///< no answer
        working, ///< answered from its work
        waiting, ///< answered from a wait
    };
    int rank = 0; ///< world rank
    std::string host;
    Kind kind = Kind::silent;
    bool arrived = false;  ///< it has started the collective in question
    std::string label;     ///< of the collective that it waits in
    std::uint64_t number = 0;
    bool same_group = false; ///< that is on the same communicator
};

enum class Verdict {
    all_arrived, ///< nobody is late: the collective itself does not end
    alive,       ///< all that are missing work and answer
    late,        ///< somebody is silent or in another collective
};

Verdict judge(const std::vector<RankState>& others);

/// One message: which collective did not finish, who is late, why it matters, what to do.
std::string late_message(std::string_view label, std::uint64_t number, double seconds, const std::vector<RankState>& others);

} // namespace selm::comm
