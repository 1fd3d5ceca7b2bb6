#include <Kokkos_Core.hpp>

#include "selm/base/error.hpp"
#include "selm/kernels/engine.hpp"

namespace selm {

KernelRuntime::KernelRuntime(int threads)
{
    SELM_VALIDATE(threads >= 1, ExitCode::usage, "threads is " << threads << ". Pass --threads 1 or more");
    if (Kokkos::is_initialized())
        return;
#if KOKKOS_VERSION >= 30700
    Kokkos::initialize(Kokkos::InitializationSettings().set_num_threads(threads));
#else
    Kokkos::InitArguments arguments;
    arguments.num_threads = threads;
    Kokkos::initialize(arguments);
#endif
    owns_kokkos_ = true;
}

KernelRuntime::~KernelRuntime()
{
    if (owns_kokkos_)
        Kokkos::finalize();
}

} // namespace selm
