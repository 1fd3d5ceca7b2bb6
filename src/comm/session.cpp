#include "selm/comm/session.hpp"

#include <cstdlib>
#include <exception>
#include <string_view>

#include <unistd.h>

#include <mpi.h>

#include "mpi_call.hpp"
#include "mpi_communicator.hpp"
#include "selm/base/error.hpp"
#include "selm/base/log.hpp"
#include "watch.hpp"

namespace selm {

bool was_launched()
{
    for (char** variable = environ; *variable != nullptr; ++variable) {
        const std::string_view name(*variable);
        for (const std::string_view of_launchers : {"ALPS_", "FLUX_", "HYDI_", "HYDRA_", "JSM_", "MPI_", "MV2_", "OMPI_COMM_", "PALS_",
                                                    "PMI", "PRTE_", "SLURM_PROCID", "SLURM_STEP"})
            if (name.starts_with(of_launchers))
                return true;
    }
    return false;
}

MpiSession::MpiSession(int& argc, char**& argv, MpiStart start) : with_mpi_(start == MpiStart::always || was_launched())
{
    if (!with_mpi_) {
        world_ = make_single_communicator();
        return;
    }
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
    if (!with_mpi_)
        return;
    comm::end_watch();
    MPI_Finalize();
}

void MpiSession::abort(int exit_code) const
{
    if (!with_mpi_)
        std::_Exit(exit_code);
    MPI_Abort(MPI_COMM_WORLD, exit_code);
    std::abort(); // MPI_Abort does not return; this tells the compiler
}

} // namespace selm
