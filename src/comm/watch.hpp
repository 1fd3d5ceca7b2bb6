#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include <mpi.h>

namespace selm::comm {

/// One call on a communicator, as the watchdog names it.
struct Call {
    MPI_Comm comm;
    std::uint64_t group;  ///< the communicator's name, the same on its ranks
    std::uint64_t number; ///< how many collectives were started on it, with this one; 0: not counted
    std::string_view label;
};

/// Names a communicator and counts the collectives started on it; known to the watchdog while it exists.
class CallCounter {
  public:
    /// @p name: the same on all ranks of the communicator, another one for every communicator that a rank is in.
    CallCounter(MPI_Comm comm, std::uint64_t name);
    ~CallCounter();
    CallCounter(const CallCounter&) = delete;
    CallCounter& operator=(const CallCounter&) = delete;
    Call collective(std::string_view label);
    /// A call that not all ranks make, or not at the same place among the others.
    Call uncounted(std::string_view label) const { return {comm_, name_, 0, label}; }
    /// A name for a communicator that is made of this one; @p first is the rank (in this one) of its first rank.
    std::uint64_t name_of_child(int first);
    std::uint64_t started() const { return started_; }

  private:
    MPI_Comm comm_;
    std::uint64_t name_;
    std::uint64_t started_ = 0;
    std::uint64_t children_ = 0;
};

/// How a wait pauses: `brief` sleeps soon (little data: latency matters, then the core is free for others), `bulk` keeps
/// calling MPI, which moves data only then, `sleeping` sleeps from the start.
enum class Pausing { brief, bulk, sleeping };

/// Calls @p done until it is true; meanwhile moves pending operations on, calls @p poll (may be empty), answers the
/// watchdogs of other ranks, and is watched: see set_collective_timeout.
void wait_until(const Call& call, Pausing pausing, const std::function<bool()>& done, const std::function<void()>& poll = {});
/// Waits for the request of @p call, which moves @p bytes.
void wait_for(MPI_Request& request, const Call& call, std::size_t bytes);

/// Answers other ranks' watchdogs now and then: a sign of life of a rank that works.
void answer_watchdogs();

/// Host names by world rank. Empty before start_watch().
const std::vector<std::string>& host_names();
/// Collective over MPI_COMM_WORLD.
void start_watch();
void end_watch();

} // namespace selm::comm
