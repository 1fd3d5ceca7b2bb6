#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "selm/kernels/engine.hpp"

// Rates of the engines' operations at the shapes of SmolLM2-135M: useful floating-point operations per second ("flops":
// attention counts visible scores only; a backward pass counts 2.5 forward passes for attention, and recomputed
// logits too for the head), and bytes per second of operations on rows, DeBERTa-v3-large's too. One thread. Example: kernels_benchmark --benchmark_filter=xsmm
namespace {

using namespace selm;

enum class Tested { aten, xsmm, xsmm_bf16 };

std::unique_ptr<Engine>& engine(Tested tested)
{
    static std::unique_ptr<Engine> engines[3];
    std::unique_ptr<Engine>& wanted = engines[static_cast<int>(tested)];
    if (wanted == nullptr)
        wanted = make_engine({.engine = tested == Tested::aten ? "aten" : "xsmm",
                              .products = tested == Tested::xsmm_bf16 ? DType::bf16 : DType::f32});
    return wanted;
}

Tensor random_tensor(Engine& e, std::int64_t rows, std::int64_t columns, float deviation = 1)
{
    std::mt19937 generator(1);
    std::uniform_real_distribution<float> uniform(-deviation, deviation);
    Tensor out = e.allocate(rows, columns, DType::f32);
    for (std::int64_t i = 0; i < rows * columns; ++i)
        out.f32()[i] = uniform(generator);
    return out;
}

void report(benchmark::State& state, double flop)
{
    state.counters["flops"] = benchmark::Counter(flop, benchmark::Counter::kIsIterationInvariantRate);
}

void report_bytes(benchmark::State& state, double bytes)
{
    state.counters["bytes"] = benchmark::Counter(bytes, benchmark::Counter::kIsIterationInvariantRate);
}

enum class Pass { forward, backward_input, backward_weight };

/// Weights of one shape, so many that none is in a cache (of 32 MiB) when its turn comes again, as in a model's layers.
std::vector<PackedWeight> cold_weights(Engine& e, std::int64_t outputs, std::int64_t inputs, bool is_bf16,
                                       bool with_backward)
{
    constexpr std::int64_t cold_bytes = 96 << 20;
    const Tensor weight = random_tensor(e, outputs, inputs);
    if (is_bf16)
        round_to_bf16({weight.f32(), static_cast<std::size_t>(outputs * inputs)});
    std::vector<PackedWeight> out;
    const std::int64_t bytes = outputs * inputs * (is_bf16 ? 2 : 4);
    for (std::int64_t total = 0; total < cold_bytes; total += bytes)
        out.push_back(e.pack(weight, with_backward, {}, false));
    return out;
}

/// flops, and bytes of weights (or of their gradient, read and written) per second.
void linear(benchmark::State& state, Tested tested, Pass pass, bool is_bf16 = false)
{
    Engine& e = *engine(tested);
    const std::int64_t outputs = state.range(0), inputs = state.range(1), tokens = state.range(2);
    const bool is_dw = pass == Pass::backward_weight;
    const std::vector<PackedWeight> weights =
        is_dw ? std::vector<PackedWeight>(1) : cold_weights(e, outputs, inputs, is_bf16, pass == Pass::backward_input);
    const Tensor x = random_tensor(e, tokens, inputs), y = random_tensor(e, tokens, outputs);
    const Tensor dw = random_tensor(e, is_dw ? outputs : 1, inputs);
    std::size_t turn = 0;
    for (auto _ : state) {
        const PackedWeight& w = weights[turn];
        turn = (turn + 1) % weights.size();
        if (pass == Pass::forward)
            e.linear(x, w, y);
        else if (pass == Pass::backward_input)
            e.linear_backward_input(y, w, x);
        else
            e.linear_backward_weight(y, x, dw);
    }
    report(state, 2.0 * static_cast<double>(outputs * inputs * tokens));
    const double bytes = static_cast<double>(outputs * inputs) * (is_dw ? 8 : is_bf16 || tested == Tested::xsmm_bf16 ? 2 : 4);
    report_bytes(state, bytes);
}

void attention(benchmark::State& state, Tested tested, bool is_backward)
{
    Engine& e = *engine(tested);
    const AttentionShape shape{.heads = 9, .kv_heads = 3, .head_dim = 64, .scale = 0.125f};
    const std::int64_t trunk = state.range(0), first = state.range(1), second = state.range(2);
    const std::vector<Segment> segments = {{0, trunk, -1}, {trunk, first, 0}, {trunk + first, second, 0}};
    const std::int64_t tokens = trunk + first + second;
    const Tensor qkv = random_tensor(e, tokens, 15 * 64), out = e.allocate(tokens, 9 * 64, DType::f32);
    const Tensor lse = e.allocate(9, tokens, DType::f32), dout = random_tensor(e, tokens, 9 * 64);
    const Tensor dqkv = e.allocate(tokens, 15 * 64, DType::f32);
    e.attention(qkv, shape, segments, out, lse);
    for (auto _ : state) {
        if (is_backward)
            e.attention_backward(qkv, shape, segments, out, lse, dout, dqkv);
        else
            e.attention(qkv, shape, segments, out, lse);
    }
    double visible = 0;
    for (const Segment& s : segments)
        visible += 0.5 * static_cast<double>(s.length * (s.length + 1)) +
                   static_cast<double>(s.trunk < 0 ? 0 : s.length * trunk);
    report(state, visible * 9 * 64 * 4 * (is_backward ? 2.5 : 1.0));
}

/// One sequence through the attention of a layer of DeBERTa-v3-large.
void disentangled(benchmark::State& state, Tested tested, bool is_backward)
{
    Engine& e = *engine(tested);
    constexpr std::int64_t heads = 16, dim = 64, span = 256;
    const std::int64_t tokens = state.range(0);
    std::vector<std::int32_t> index; // one relative position per distance near 0, then logarithmic buckets
    for (std::int64_t distance = 1 - tokens; distance < tokens; ++distance) {
        const auto magnitude = static_cast<double>(std::abs(distance));
        const double bucket = magnitude <= span / 2 ? magnitude
                                                    : span / 2 + std::ceil(std::log(magnitude / (span / 2)) /
                                                                           std::log(511.0 / (span / 2)) * (span / 2 - 1));
        const double row = span + (distance < 0 ? -bucket : bucket);
        index.push_back(static_cast<std::int32_t>(std::clamp(row, 0.0, 2.0 * span - 1)));
    }
    const DisentangledShape shape{heads, dim, 1 / std::sqrt(3.0f * dim), index};
    const Tensor qkv = random_tensor(e, tokens, 3 * heads * dim), relative = random_tensor(e, 2 * span, 2 * heads * dim);
    const Tensor out = e.allocate(tokens, heads * dim, DType::f32), lse = e.allocate(heads, tokens, DType::f32);
    const Tensor d_out = random_tensor(e, tokens, heads * dim), d_qkv = e.allocate(tokens, qkv.columns, DType::f32);
    const Tensor d_relative = e.allocate(2 * span, relative.columns, DType::f32);
    const std::vector<Segment> segments = {{0, tokens, -1}};
    e.disentangled_attention(qkv, relative, shape, segments, out, lse);
    for (auto _ : state) {
        if (is_backward)
            e.disentangled_attention_backward(qkv, relative, shape, segments, out, lse, d_out, d_qkv, d_relative);
        else
            e.disentangled_attention(qkv, relative, shape, segments, out, lse);
    }
    report(state, static_cast<double>(tokens * (tokens + 2 * span)) * heads * dim * 4 * (is_backward ? 2.5 : 1.0));
}

/// One decoding step of `slots` sequences, `context` tokens each.
void decode_attention(benchmark::State& state, Tested tested)
{
    Engine& e = *engine(tested);
    const AttentionShape shape{.heads = 9, .kv_heads = 3, .head_dim = 64, .scale = 0.125f};
    const std::int64_t slots = state.range(0), context = state.range(1);
    const auto cache = e.make_cache(1, slots, context + 64, shape);
    const Tensor prompt = random_tensor(e, context, 15 * 64), prompt_out = e.allocate(context, 9 * 64, DType::f32);
    std::vector<CachedSpan> spans;
    for (std::int64_t slot = 0; slot < slots; ++slot) {
        e.attention_cached(prompt, shape, *cache, 0, std::vector<CachedSpan>{{slot, 0, context, 0, true}}, prompt_out);
        spans.push_back({slot, slot, 1, context, false});
    }
    const Tensor qkv = random_tensor(e, slots, 15 * 64), out = e.allocate(slots, 9 * 64, DType::f32);
    for (auto _ : state)
        e.attention_cached(qkv, shape, *cache, 0, spans, out);
    report(state, static_cast<double>(slots * (context + 1)) * 9 * 64 * 4);
}

/// One prompt at once.
void prefill_attention(benchmark::State& state, Tested tested)
{
    Engine& e = *engine(tested);
    const AttentionShape shape{.heads = 9, .kv_heads = 3, .head_dim = 64, .scale = 0.125f};
    const std::int64_t tokens = state.range(0);
    const auto cache = e.make_cache(1, 1, tokens, shape);
    const Tensor qkv = random_tensor(e, tokens, 15 * 64), out = e.allocate(tokens, 9 * 64, DType::f32);
    for (auto _ : state)
        e.attention_cached(qkv, shape, *cache, 0, std::vector<CachedSpan>{{0, 0, tokens, 0, true}}, out);
    report(state, 0.5 * static_cast<double>(tokens * (tokens + 1)) * 9 * 64 * 4);
}

void head(benchmark::State& state, Tested tested, bool is_backward)
{
    Engine& e = *engine(tested);
    const std::int64_t rows = state.range(0), vocabulary = 49152, hidden = 576;
    const PackedWeight w = e.pack(random_tensor(e, vocabulary, hidden, 0.1f), is_backward, {}, false);
    const Tensor h = random_tensor(e, rows, hidden), dh = e.allocate(rows, hidden, DType::f32);
    const Tensor dw = e.allocate(is_backward ? vocabulary : 1, hidden, DType::f32);
    e.fill_zero(dw);
    const auto count = static_cast<std::size_t>(rows);
    const std::vector<std::int32_t> targets(count, 7);
    std::vector<float> log_probs(count), lse(count), g(count, 1.0f);
    e.head_log_probs(h, w, targets, log_probs, lse);
    for (auto _ : state) {
        if (is_backward)
            e.head_log_probs_backward(h, w, targets, lse, g, dh, dw);
        else
            e.head_log_probs(h, w, targets, log_probs, lse);
    }
    report(state, 2.0 * static_cast<double>(rows * vocabulary * hidden) * (is_backward ? 3 : 1));
}

/// One operation on rows; `floats` are those it reads and writes, each once.
struct RowWork {
    std::int64_t floats = 0;
    std::function<void()> run;
    std::function<void()> restore; ///< not timed: inputs that `run` replaces by their gradients
};

RowWork row_work(Engine& e, const std::string& operation, std::int64_t tokens, std::int64_t hidden, std::int64_t inner)
{
    const std::int64_t small = tokens * hidden, large = tokens * inner;
    const auto hidden_rows = [&] { return random_tensor(e, tokens, hidden); };
    const auto copy = [](const Tensor& from, const Tensor& to) {
        std::memcpy(to.data, from.data, static_cast<std::size_t>(from.rows * from.columns) * sizeof(float));
    };
    const Tensor gain = random_tensor(e, 1, hidden), bias = random_tensor(e, 1, hidden), dgain = random_tensor(e, 1, hidden);
    const Tensor mean = random_tensor(e, 1, tokens), rstd = random_tensor(e, 1, tokens);
    if (operation == "embed") {
        const Tensor table = random_tensor(e, 4 * tokens, hidden), x = hidden_rows();
        std::vector<std::int32_t> tokens_of(static_cast<std::size_t>(tokens));
        for (std::size_t i = 0; i < tokens_of.size(); ++i)
            tokens_of[i] = static_cast<std::int32_t>(i * 7919 % static_cast<std::size_t>(4 * tokens));
        return {2 * small, [=, &e] { e.embed(tokens_of, table, x); }, {}};
    }
    if (operation == "rope") {
        const AttentionShape shape{.heads = hidden / 64, .kv_heads = hidden / 192, .head_dim = 64, .scale = 0.125f};
        const std::int64_t turned = (shape.heads + shape.kv_heads) * 64;
        const Tensor qkv = random_tensor(e, tokens, turned + shape.kv_heads * 64);
        const Tensor cos = random_tensor(e, tokens, 32), sin = random_tensor(e, tokens, 32);
        for (std::int64_t i = 0; i < tokens * 32; ++i)
            sin.f32()[i] = std::sqrt(1 - cos.f32()[i] * cos.f32()[i]);
        std::vector<std::int32_t> positions(static_cast<std::size_t>(tokens));
        std::iota(positions.begin(), positions.end(), 0);
        return {tokens * (2 * turned + 64), [=, &e] { e.rope(qkv, shape, positions, cos, sin, false); }, {}};
    }
    const Tensor x = hidden_rows(), y = hidden_rows(), z = hidden_rows();
    if (operation == "rms_norm")
        return {2 * small, [=, &e] { e.rms_norm(x, gain, 1e-5f, y, rstd); }, {}};
    if (operation == "rms_norm_backward")
        return {4 * small, [=, &e] { e.rms_norm_backward(x, gain, rstd, y, z, dgain); }, {}};
    if (operation == "layer_norm") // with the residual: read x and y, write x and z
        return {4 * small, [=, &e] { e.layer_norm(x, y, gain, bias, 1e-7f, z, mean, rstd); }, {}};
    if (operation == "layer_norm_backward")
        return {3 * small, [=, &e] { e.layer_norm_backward(x, gain, mean, rstd, y, z, dgain, bias); }, {}};
    const Tensor a = random_tensor(e, tokens, inner), da = random_tensor(e, tokens, inner);
    const bool is_swiglu = operation == "swiglu" || operation == "swiglu_backward";
    const Tensor in = random_tensor(e, tokens, is_swiglu ? 2 * inner : inner, 4), kept = random_tensor(e, in.rows, in.columns, 4);
    const auto restore = [=] { copy(kept, in); };
    if (operation == "swiglu")
        return {3 * large, [=, &e] { e.swiglu(in, a); }, {}};
    if (operation == "swiglu_backward")
        return {6 * large, [=, &e] { e.swiglu_backward(in, da, a); }, restore};
    if (operation == "gelu")
        return {2 * large, [=, &e] { e.gelu(in, a); }, {}};
    return {4 * large, [=, &e] { e.gelu_backward(in, da, a); }, restore};
}

/// Bytes per second, to be held against a copy that reads and writes as many: see `copy`.
void row_operation(benchmark::State& state, Tested tested, const std::string& operation)
{
    const RowWork work = row_work(*engine(tested), operation, state.range(0), state.range(1), state.range(2));
    for (auto _ : state) {
        if (work.restore) {
            state.PauseTiming();
            work.restore();
            state.ResumeTiming();
        }
        work.run();
    }
    report_bytes(state, 4.0 * static_cast<double>(work.floats));
}

/// Reads and writes so many megabytes together.
void copy(benchmark::State& state)
{
    const auto count = static_cast<std::size_t>(state.range(0)) * 1000000 / (2 * sizeof(float));
    const std::vector<float> from(count, 1.0f);
    std::vector<float> to(count);
    for (auto _ : state) {
        std::memcpy(to.data(), from.data(), count * sizeof(float));
        benchmark::DoNotOptimize(to.data());
        benchmark::ClobberMemory();
    }
    report_bytes(state, 8.0 * static_cast<double>(count));
}

void adamw(benchmark::State& state)
{
    const auto count = static_cast<std::size_t>(state.range(0));
    const std::vector<float> gradient(count, 0.1f);
    std::vector<float> master(count, 1.0f), m(count), v(count), compute(count);
    for (auto _ : state)
        adamw_step({.learning_rate = 1e-4, .round_bf16 = true}, gradient, master, m, v, compute);
    state.SetBytesProcessed(state.iterations() * state.range(0) * 32);
}

/// Of the layers and the head of SmolLM2-135M: a few rows (decoding), then many (prefill).
void layer_shapes(benchmark::internal::Benchmark* b)
{
    for (const auto& [outputs, inputs] :
         {std::pair<int, int>{960, 576}, {576, 576}, {3072, 576}, {576, 1536}, {49152, 576}})
        for (const int tokens : {1, 2, 4, 8, 16, 64})
            b->Args({outputs, inputs, tokens});
}

/// SmolLM2-135M's and DeBERTa-v3-large's.
void training_shapes(benchmark::internal::Benchmark* b)
{
    for (const auto& [outputs, inputs] : {std::pair<int, int>{960, 576}, {576, 576}, {3072, 576}, {576, 1536}})
        for (const int tokens : {128, 1583})
            b->Args({outputs, inputs, tokens});
    for (const auto& [outputs, inputs] : {std::pair<int, int>{1024, 1024}, {4096, 1024}, {1024, 4096}})
        b->Args({outputs, inputs, 900});
}

void register_engine(const char* name, Tested tested)
{
    const auto add = [name](const char* operation, auto&& body) {
        return benchmark::RegisterBenchmark((std::string(name) + "/" + operation).c_str(), body)
            ->Unit(benchmark::kMillisecond);
    };
    add("linear", [=](benchmark::State& s) { linear(s, tested, Pass::forward); })->Apply(layer_shapes);
    add("linear_bf16", [=](benchmark::State& s) { linear(s, tested, Pass::forward, true); })->Apply(layer_shapes);
    add("linear_training", [=](benchmark::State& s) { linear(s, tested, Pass::forward); })->Apply(training_shapes);
    add("linear_dx", [=](benchmark::State& s) { linear(s, tested, Pass::backward_input); })->Apply(training_shapes);
    add("linear_dw", [=](benchmark::State& s) { linear(s, tested, Pass::backward_weight); })->Apply(training_shapes);
    for (const bool is_backward : {false, true})
        add(is_backward ? "attention_backward" : "attention",
            [=](benchmark::State& s) { attention(s, tested, is_backward); })
            ->Args({177, 280, 250})
            ->Args({500, 500, 500});
    for (const bool is_backward : {false, true})
        add(is_backward ? "disentangled_backward" : "disentangled",
            [=](benchmark::State& s) { disentangled(s, tested, is_backward); })
            ->Arg(900);
    add("decode_attention", [=](benchmark::State& s) { decode_attention(s, tested); })
        ->Args({1, 256})
        ->Args({8, 256})
        ->Args({16, 256});
    add("prefill_attention", [=](benchmark::State& s) { prefill_attention(s, tested); })->Arg(177)->Arg(500);
    add("head", [=](benchmark::State& s) { head(s, tested, false); })->Arg(512);
    add("head_backward", [=](benchmark::State& s) { head(s, tested, true); })->Arg(512);
    for (const char* operation : {"embed", "rms_norm", "rms_norm_backward", "rope", "swiglu", "swiglu_backward"})
        add(operation, [=](benchmark::State& s) { row_operation(s, tested, operation); })->Args({1536, 576, 1536});
    for (const char* operation : {"layer_norm", "layer_norm_backward", "gelu", "gelu_backward"})
        add(operation, [=](benchmark::State& s) { row_operation(s, tested, operation); })->Args({1536, 1024, 4096});
}

} // namespace

int main(int argc, char** argv)
{
    const selm::KernelRuntime runtime(1);
    register_engine("xsmm", Tested::xsmm);
    register_engine("xsmm_bf16", Tested::xsmm_bf16);
    register_engine("aten", Tested::aten);
    // as many megabytes as the row operations read and write
    for (const int megabytes : {7, 10, 14, 19, 25, 28, 50, 57, 100})
        benchmark::RegisterBenchmark("copy", copy)->Arg(megabytes)->Unit(benchmark::kMillisecond);
    benchmark::RegisterBenchmark("adamw", adamw)->Arg(8 << 20)->Unit(benchmark::kMillisecond);
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv))
        return 64;
    std::printf("%s\n%s\n", engine(Tested::xsmm)->description().c_str(),
                engine(Tested::xsmm_bf16)->description().c_str());
    benchmark::RunSpecifiedBenchmarks();
    return 0;
}
