#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <span>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "selm/base/error.hpp"
#include "selm/comm/communicator.hpp"
#include "selm/comm/session.hpp"
#include "selm/kernels/engine.hpp"
#include "timed.hpp"

// What the cores that the ranks run on can do, all ranks at once: fused multiply-adds in registers, reading memory, updating
// streams in memory, and the optimizer's kernel on a shard. One line of JSON per measurement with a sample per repetition:
// work of all ranks by the time of the slowest. Usage: selm_roofline_benchmark [REPETITIONS [MIB]]
namespace {

using selm::Communicator;
using selm::benchmark::seconds_of;

/// Keeps a value without storing it in memory.
template <typename T> void keep(T& value)
{
    asm volatile("" : "+m"(value) : : "memory");
}

constexpr std::int64_t fma_rounds = 20'000'000;

/// Twelve independent chains: enough to hide the latency of a fused multiply-add on two ports.
template <typename Vector, typename Fma> void fma_chains(const Vector& factor, Fma fma)
{
    Vector sums[12];
    for (Vector& sum : sums)
        sum = factor;
    for (std::int64_t i = 0; i < fma_rounds; ++i)
        for (Vector& sum : sums)
            sum = fma(sum, factor);
    for (Vector& sum : sums)
        keep(sum);
}

/// fp32 in registers. @return floating-point operations done.
double multiply_add_fp32()
{
#if defined(__AVX512F__)
    fma_chains(_mm512_set1_ps(0.999f), [](__m512 s, __m512 f) { return _mm512_fmadd_ps(s, f, f); });
    constexpr int lanes = 16;
#elif defined(__AVX2__) && defined(__FMA__)
    fma_chains(_mm256_set1_ps(0.999f), [](__m256 s, __m256 f) { return _mm256_fmadd_ps(s, f, f); });
    constexpr int lanes = 8;
#else
    struct Four {
        float values[4];
    };
    fma_chains(Four{{0.999f, 0.999f, 0.999f, 0.999f}}, [](Four s, const Four& f) {
        for (int i = 0; i < 4; ++i)
            s.values[i] = s.values[i] * f.values[i] + f.values[i];
        return s;
    });
    constexpr int lanes = 4;
#endif
    return 2.0 * 12 * lanes * static_cast<double>(fma_rounds);
}

/// bf16 products summed in fp32, where the CPU has instructions for them; else 0.
double multiply_add_bf16()
{
#ifdef __AVX512BF16__
    __m512 sums[12];
    const __m512bh factor = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.5f));
    for (__m512& sum : sums)
        sum = _mm512_setzero_ps();
    for (std::int64_t i = 0; i < fma_rounds; ++i)
        for (__m512& sum : sums)
            sum = _mm512_dpbf16_ps(sum, factor, factor);
    for (__m512& sum : sums)
        keep(sum);
    return 2.0 * 12 * 32 * static_cast<double>(fma_rounds);
#else
    return 0;
#endif
}

double read_sum(std::span<const float> values)
{
    float sums[64] = {};
    for (std::size_t i = 0; i + 64 <= values.size(); i += 64)
        for (std::size_t j = 0; j < 64; ++j)
            sums[j] += values[i + j];
    for (float& sum : sums)
        keep(sum);
    return static_cast<double>(values.size() * sizeof(float));
}

/// The optimizer's streams without its arithmetic: gradient read, master weights and both moments read and written in place.
double update_streams(std::span<const float> g, std::span<float> w, std::span<float> m, std::span<float> v)
{
    for (std::size_t i = 0; i < g.size(); ++i) {
        w[i] += g[i];
        m[i] += g[i];
        v[i] += g[i];
    }
    return static_cast<double>(g.size() * 7 * sizeof(float));
}

void measure(Communicator& comm, const char* what, const char* unit, int repetitions, const std::function<double()>& work)
{
    double amount = work(); // warm-up: pages, clock rate
    std::vector<double> rates;
    for (int i = 0; i < repetitions; ++i) {
        const double seconds = seconds_of(comm, [&] { amount = work(); });
        rates.push_back(amount * comm.size() / seconds / 1e9);
    }
    if (!comm.is_root())
        return;
    std::cout << "{\"what\": \"" << what << "\", \"unit\": \"" << unit << "\", \"ranks\": " << comm.size() << ", \"samples\": [";
    for (std::size_t i = 0; i < rates.size(); ++i)
        std::cout << (i == 0 ? "" : ", ") << rates[i];
    std::cout << "]}" << std::endl;
}

void run(Communicator& comm, int repetitions, std::size_t mebibytes)
{
    SELM_VALIDATE(repetitions > 0 && mebibytes > 0, selm::ExitCode::usage, "usage: selm_roofline_benchmark [REPETITIONS [MIB]]");
    measure(comm, "fma_fp32", "GF/s", repetitions, multiply_add_fp32);
    if (multiply_add_bf16() > 0)
        measure(comm, "fma_bf16", "GF/s", repetitions, multiply_add_bf16);
    const std::size_t count = (mebibytes << 20) / sizeof(float);
    {
        const std::vector<float> values(count, 1.0f);
        measure(comm, "read", "GB/s", repetitions, [&] { return read_sum(values); });
    }
    const std::size_t piece = count / 4;
    const std::vector<float> gradient(piece, 0.1f);
    std::vector<float> master(piece, 1.0f), m(piece), v(piece), compute(piece);
    measure(comm, "update", "GB/s", repetitions, [&] { return update_streams(gradient, master, m, v); });
    // adamw: compute weights of their own, so one stream more is written.
    measure(comm, "adamw", "GB/s", repetitions, [&] {
        selm::adamw_step({.learning_rate = 1e-4, .round_bf16 = true}, gradient, master, m, v, compute);
        return static_cast<double>(piece * 8 * sizeof(float));
    });
    measure(comm, "adamw_in_place", "GB/s", repetitions, [&] {
        selm::adamw_step({.learning_rate = 1e-4}, gradient, master, m, v, master);
        return static_cast<double>(piece * 7 * sizeof(float));
    });
}

} // namespace

int main(int argc, char** argv)
{
    selm::MpiSession session(argc, argv);
    try {
        const selm::KernelRuntime runtime(1);
        run(session.world(), argc > 1 ? std::atoi(argv[1]) : 10, static_cast<std::size_t>(argc > 2 ? std::max(0, std::atoi(argv[2])) : 512));
    } catch (const std::exception& error) {
        std::cerr << "selm_roofline_benchmark: " << error.what() << "\n";
        session.abort(70);
    }
    return 0;
}
