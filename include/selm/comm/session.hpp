#pragma once

#include <memory>

#include "selm/comm/communicator.hpp"

namespace selm {

/// Whether a launcher (mpirun, srun, aprun, ...) started this process: any variable of those that launchers leave in the
/// environment is enough.
bool was_launched();

/// `when_launched`: for programs in which one rank works; by themselves they need no MPI, whose start takes 0.25 s.
enum class MpiStart { always, when_launched };

/**
 * @brief MPI for the life of main: MPI_Init_thread(FUNNELED), error handler MPI_ERRORS_RETURN, the logger's rank.
 * The destructor finalises, except while an exception unwinds (peers may be elsewhere): then the caller aborts.
 * Without MPI the world is a single communicator.
 */
class MpiSession {
  public:
    MpiSession(int& argc, char**& argv, MpiStart start = MpiStart::always);
    ~MpiSession();
    MpiSession(const MpiSession&) = delete;
    MpiSession& operator=(const MpiSession&) = delete;
    Communicator& world() const { return *world_; }
    [[noreturn]] void abort(int exit_code) const;

  private:
    bool with_mpi_;
    std::unique_ptr<Communicator> world_;
};

} // namespace selm
