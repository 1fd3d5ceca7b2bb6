#include "selm/kernels/engine.hpp"

#include "engines.hpp"
#include "selm/base/error.hpp"

namespace selm {
namespace {

bool cpu_has_avx2_and_fma()
{
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return false;
#endif
}

} // namespace

std::unique_ptr<Engine> make_engine(const EngineOptions& options)
{
    const bool is_known = options.engine == "auto" || options.engine == "xsmm" || options.engine == "aten";
    SELM_VALIDATE(is_known, ExitCode::configuration,
                  "engine '" << options.engine << "' does not exist. Choose auto, xsmm or aten");
    if (options.engine == "aten" || (options.engine == "auto" && options.device == Device::cuda))
        return make_aten_engine(options);
    SELM_VALIDATE(options.device == Device::cpu, ExitCode::configuration,
                  "engine xsmm computes on CPUs only, not on cuda. Choose --engine aten or --device cpu");
    if (cpu_has_avx2_and_fma())
        return make_xsmm_engine(options);
    SELM_VALIDATE(options.engine == "auto", ExitCode::configuration,
                  "engine xsmm needs a CPU with AVX2 and FMA, which this one lacks. Choose --engine aten");
    return make_aten_engine(options);
}

} // namespace selm
