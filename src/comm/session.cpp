#include "selm/comm/session.hpp"

#include <cstdlib>
#include <exception>

#include <mpi.h>

#include "mpi_call.hpp"
#include "mpi_communicator.hpp"
#include "selm/base/error.hpp"
#include "selm/base/log.hpp"
#include "watch.hpp"

namespace selm {

MpiSession::MpiSession(int& argc, char**& argv)
{
    // A program that was started without mpirun is alone: Open MPI need not start its daemon for it (0.2 s). Others ignore this.
    ::setenv("OMPI_MCA_ess_singleton_isolated", "1", 0);
    int provided = MPI_THREAD_SINGLE;
    SELM_MPI("MPI start", MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided));
    SELM_VALIDATE(provided >= MPI_THREAD_FUNNELED, ExitCode::configuration,
                  "this MPI library gives no thread support (kernels use threads). Use an MPI built with MPI_THREAD_FUNNELED");
    SELM_MPI("MPI start", MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
    MPI_Comm copy = MPI_COMM_NULL; // a copy, so that other libraries' messages on MPI_COMM_WORLD never meet ours
    SELM_MPI("MPI start", MPI_Comm_dup(MPI_COMM_WORLD, &copy));
    world_ = std::make_unique<comm::MpiCommunicator>(copy, 1);
    comm::start_watch();
    set_log_rank(world_->rank(), world_->size());
}

MpiSession::~MpiSession()
{
    if (std::uncaught_exceptions() > 0)
        return;
    world_.reset();
    comm::end_watch();
    MPI_Finalize();
}

void MpiSession::abort(int exit_code) const
{
    MPI_Abort(MPI_COMM_WORLD, exit_code);
    std::abort(); // MPI_Abort does not return; this tells the compiler
}

} // namespace selm
