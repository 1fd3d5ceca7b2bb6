#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include "selm/comm/communicator.hpp"

namespace selm {

/**
 * @brief Why a run may have to stop early: SIGTERM, SIGUSR1 or SIGINT to any rank, a stop file, a newer attempt
 * at the same output (base/attempt.hpp), or the end of the batch job coming near. The one place where all phases ask.
 *
 * Rank 0 looks at files and at the clock; signals count wherever they arrive.
 */
class StopCondition {
  public:
    /// @param stop_file its appearance is a request; empty: none.
    /// @param walltime_margin_s stop when less than this is left of the job (base/stop.hpp: job_end_time()); 0: never.
    /// Collective over comm (borrowed). @throws Error usage on every rank: a margin, but no end is known.
    StopCondition(std::string stop_file, double walltime_margin_s, Communicator& comm);

    /// Does this rank know a reason? The file is looked for twice a second. Not collective.
    /// @param needed_s seconds that the next piece of work and saving it take: must fit before the margin.
    bool here(double needed_s = 0);
    /// Does any rank know a reason? The same answer on every rank; rank 0's @p needed_s counts. Collective over comm.
    bool agreed(double needed_s = 0);

  private:
    using Clock = std::chrono::steady_clock;
    bool time_is_up(double needed_s);

    std::string stop_file_;
    double margin_s_;
    Communicator& comm_;
    std::optional<std::int64_t> end_; ///< of the job; rank 0 with a margin only
    std::optional<Clock::time_point> looked_;
    bool told_ = false;
};

} // namespace selm
