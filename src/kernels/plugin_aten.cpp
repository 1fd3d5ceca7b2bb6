// The aten engine of the CPU build is a library of its own, loaded by the first call here: loading LibTorch takes about half
// a second and 80 MB in every process, and programs that compute with the xsmm engine use nothing of it.
#include <dlfcn.h>

#include "engines.hpp"
#include "selm/base/error.hpp"

namespace selm {
namespace {

constexpr const char* library_name = "libselm_aten.so";
constexpr const char* factory_name = "selm_make_aten_engine";

} // namespace

std::unique_ptr<Engine> make_aten_engine(const EngineOptions& options)
{
    // Found by the program's run path; never unloaded: LibTorch registers itself in tables that outlive it.
    void* library = ::dlopen(library_name, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (library == nullptr)
        throw config_error(cat("engine aten cannot be loaded (", ::dlerror(), "). Put ", library_name,
                               " into lib/ beside the programs' bin/ or into LD_LIBRARY_PATH, or choose --engine xsmm"));
    const auto factory = reinterpret_cast<AtenEngineFactory*>(::dlsym(library, factory_name));
    if (factory == nullptr)
        throw config_error(cat(library_name, " is of another version (it lacks ", factory_name, "). Install the programs anew"));
    return std::unique_ptr<Engine>(factory(options));
}

} // namespace selm
