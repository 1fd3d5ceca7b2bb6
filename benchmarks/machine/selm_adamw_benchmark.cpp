// How near the fused AdamW step is to the bandwidth of memory.
//
//   selm_adamw_benchmark [--elements N] [--processes P] [--repeat R] [--dtype fp32|bf16]
//
// P processes (default 1; as many as cores for the machine's limit) work at once on N elements each (default 32 Mi: far beyond
// the caches), R rounds (default 10) after a warm-up; a round's time is that of the slowest process. Per round, in turns:
//   read    sums an array (4 B per element)
//   triad   a = b + s c, ordinary stores (12 B per element counted; the line that is written is read first: 16 B move)
//   adamw   adamw_step: reads gradient, master, exp_avg, exp_avg_sq, writes the last three (28 B per element) and the
//           compute weights (fp32 4 B, bf16 2 B)
//   update  reads and writes as adamw does, with one addition per value: what memory alone lets such a loop reach
// One JSON object is printed: seconds ("read_s", ...: R samples each), bytes per element ("adamw_bytes": 32 or 30), and medians
// of all processes together in GB/s ("read_gbs", "triad_gbs", "adamw_gbs", "update_gbs").
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <iostream>
#include <map>
#include <new>
#include <span>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../src/kernels/adamw.hpp"
#include "selm/base/error.hpp"
#include "selm/kernels/engine.hpp"

namespace {

struct Arguments {
    std::size_t elements = std::size_t{32} << 20;
    int processes = 1;
    int repeat = 10;
    bool bf16 = false;
};

Arguments arguments_of(int argc, char** argv)
{
    Arguments found;
    for (int i = 1; i + 1 < argc; i += 2) {
        const std::string name = argv[i], value = argv[i + 1];
        if (name == "--elements")
            found.elements = std::stoul(value);
        else if (name == "--processes")
            found.processes = std::stoi(value);
        else if (name == "--repeat")
            found.repeat = std::stoi(value);
        else if (name == "--dtype")
            found.bf16 = value == "bf16";
        else
            throw selm::usage_error("usage: selm_adamw_benchmark [--elements N] [--processes P] [--repeat R] [--dtype fp32|bf16]");
    }
    return found;
}

/// Meeting point of the processes and the seconds of each, in memory that they share.
struct Shared {
    std::atomic<int> arrived;
    std::atomic<int> generation;
    double seconds[64];

    void meet(int processes)
    {
        const int now = generation.load();
        if (arrived.fetch_add(1) + 1 == processes) {
            arrived.store(0);
            generation.fetch_add(1);
            return;
        }
        while (generation.load() == now) {
        }
    }
};

/// The arrays of one process, and one round of each kind.
class Work {
  public:
    explicit Work(const Arguments& arguments)
        : bf16_(arguments.bf16), gradient_(arguments.elements, 0.1f), master_(arguments.elements, 1.0f), exp_avg_(arguments.elements, 0.01f),
          exp_avg_sq_(arguments.elements, 0.02f), compute_(bf16_ ? 0 : arguments.elements, 1.0f), rounded_(bf16_ ? arguments.elements : 0)
    {
    }

    void read()
    {
        float sums[64] = {};
        const float* x = gradient_.data();
        for (std::size_t i = 0; i + 64 <= gradient_.size(); i += 64)
            for (std::size_t lane = 0; lane < 64; ++lane)
                sums[lane] += x[i + lane];
        for (const float sum : sums)
            sink_ = sink_ + sum;
    }

    void triad()
    {
        float* a = exp_avg_sq_.data();
        const float* b = exp_avg_.data();
        const float* c = gradient_.data();
#pragma GCC ivdep
        for (std::size_t i = 0; i < gradient_.size(); ++i)
            a[i] = b[i] + 0.25f * c[i];
    }

    void adamw()
    {
        const selm::AdamWOptions options{.learning_rate = 1e-4};
        if (bf16_)
            selm::adamw_step_bf16(options, gradient_, master_, exp_avg_, exp_avg_sq_, rounded_);
        else
            selm::adamw_step(options, gradient_, master_, exp_avg_, exp_avg_sq_, compute_);
    }

    void update()
    {
        const float* g = gradient_.data();
        float *w = master_.data(), *m = exp_avg_.data(), *v = exp_avg_sq_.data();
        if (bf16_)
            update(g, w, m, v, rounded_.data());
        else
            update(g, w, m, v, compute_.data());
    }

  private:
    template<typename Compute>
    void update(const float* g, float* __restrict w, float* __restrict m, float* __restrict v, Compute* __restrict c)
    {
        for (std::size_t i = 0; i < gradient_.size(); ++i) {
            const float d = 1e-6f * g[i];
            w[i] += d;
            m[i] += d;
            v[i] += d;
            c[i] = static_cast<Compute>(d);
        }
    }

    bool bf16_;
    std::vector<float> gradient_, master_, exp_avg_, exp_avg_sq_, compute_;
    std::vector<std::uint16_t> rounded_;
    volatile float sink_ = 0;
};

double median(std::vector<double> values)
{
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

void run(const Arguments& arguments, Shared& shared, int process)
{
    const selm::KernelRuntime runtime(1);
    Work work(arguments);
    const std::vector<std::pair<std::string, std::function<void()>>> kinds{
        {"read", [&] { work.read(); }}, {"triad", [&] { work.triad(); }}, {"adamw", [&] { work.adamw(); }}, {"update", [&] { work.update(); }}};
    std::map<std::string, std::vector<double>> samples;
    for (int round = -1; round < arguments.repeat; ++round)
        for (const auto& [name, body] : kinds) {
            shared.meet(arguments.processes);
            const auto start = std::chrono::steady_clock::now();
            body();
            shared.seconds[process] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
            shared.meet(arguments.processes);
            if (round >= 0)
                samples[name].push_back(*std::max_element(shared.seconds, shared.seconds + arguments.processes));
        }
    if (process != 0)
        return;
    const int adamw_bytes = arguments.bf16 ? 30 : 32;
    const std::map<std::string, int> bytes{{"read", 4}, {"triad", 12}, {"adamw", adamw_bytes}, {"update", adamw_bytes}};
    nlohmann::json result{{"elements", arguments.elements}, {"processes", arguments.processes}, {"adamw_bytes", adamw_bytes}};
    for (const auto& [name, seconds] : samples) {
        result[name + "_s"] = seconds;
        const double moved = static_cast<double>(bytes.at(name)) * static_cast<double>(arguments.elements) * arguments.processes;
        result[name + "_gbs"] = moved / median(seconds) / 1e9;
    }
    std::cout << result.dump() << '\n';
}

} // namespace

int main(int argc, char** argv)
{
    try {
        const Arguments arguments = arguments_of(argc, argv);
        void* memory = ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED || arguments.processes < 1 || arguments.processes > 64)
            throw selm::usage_error("--processes is 1 to 64");
        auto* shared = new (memory) Shared{};
        int process = 0;
        for (int i = 1; i < arguments.processes && process == 0; ++i)
            if (::fork() == 0)
                process = i;
        run(arguments, *shared, process);
        if (process == 0)
            while (::wait(nullptr) > 0) {
            }
    } catch (const std::exception& error) {
        std::cerr << "selm_adamw_benchmark: " << error.what() << '\n';
        return 1;
    }
    return 0;
}
