// The aten engine of the CPU build is a library of its own, loaded by the first call here: loading LibTorch takes about half
// a second and 80 MB in every process, and programs that compute with the xsmm engine use nothing of it.
#include <filesystem>
#include <string>
#include <system_error>

#include <dlfcn.h>

#include "engines.hpp"
#include "selm/base/error.hpp"

namespace selm {
namespace {

constexpr const char* library_name = "libselm_aten.so";
constexpr const char* factory_name = "selm_make_aten_engine";

/// lib/ beside the directory of the running program holds it in build directories and installed prefixes. Elsewhere, as in
/// programs of other projects, the name alone: the run path is searched. (Only then: a sanitizer's dlopen searches its own.)
std::string library_path()
{
    std::error_code ignored;
    const auto program = std::filesystem::read_symlink("/proc/self/exe", ignored);
    const auto beside = program.parent_path().parent_path() / "lib" / library_name;
    return !program.empty() && std::filesystem::exists(beside, ignored) ? beside.string() : library_name;
}

} // namespace

std::unique_ptr<Engine> make_aten_engine(const EngineOptions& options)
{
    // Never unloaded: LibTorch registers itself in tables that outlive it.
    void* library = ::dlopen(library_path().c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (library == nullptr)
        throw config_error(cat("engine aten cannot be loaded (", ::dlerror(), "). Put ", library_name,
                               " into lib/ beside the programs' bin/ or into LD_LIBRARY_PATH, or choose --engine xsmm"));
    const auto factory = reinterpret_cast<AtenEngineFactory*>(::dlsym(library, factory_name));
    if (factory == nullptr)
        throw config_error(cat(library_name, " is of another version (it lacks ", factory_name, "). Install the programs anew"));
    return std::unique_ptr<Engine>(factory(options));
}

} // namespace selm
