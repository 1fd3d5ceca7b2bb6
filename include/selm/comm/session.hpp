#pragma once

#include <memory>

#include "selm/comm/communicator.hpp"

namespace selm {

/**
 * @brief MPI for the life of main: MPI_Init_thread(FUNNELED), error handler MPI_ERRORS_RETURN, the logger's rank.
 * The destructor finalises, except while an exception unwinds (peers may be elsewhere): then the caller aborts.
 */
class MpiSession {
  public:
    MpiSession(int& argc, char**& argv);
    ~MpiSession();
    MpiSession(const MpiSession&) = delete;
    MpiSession& operator=(const MpiSession&) = delete;
    Communicator& world() const { return *world_; }
    [[noreturn]] void abort(int exit_code) const;

  private:
    std::unique_ptr<Communicator> world_;
};

} // namespace selm
