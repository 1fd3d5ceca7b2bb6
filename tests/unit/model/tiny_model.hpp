#pragma once

#include <cmath>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "selm/base/error.hpp"
#include "selm/kernels/engine.hpp"
#include "selm/model/decoder.hpp"
#include "selm/model/model_files.hpp"

namespace selm::test {

/// Two layers, grouped-query attention, head_dim * heads != hidden: no two widths are equal.
inline DecoderConfig tiny_config(bool tied)
{
    DecoderConfig config;
    config.model_type = "llama";
    config.vocabulary = 53;
    config.hidden = 20;
    config.intermediate = 28;
    config.layers = 2;
    config.heads = 4;
    config.kv_heads = 2;
    config.head_dim = 6;
    config.max_positions = 400;
    config.tied_embeddings = tied;
    return config;
}

/// Flat parameters of a random model and their tensors.
struct TinyParameters {
    explicit TinyParameters(const DecoderConfig& config, unsigned seed = 1)
    {
        std::mt19937 generator(seed);
        for (const ParameterSpec& spec : decoder_parameters(config)) {
            const bool gain = spec.name.find("norm") != std::string::npos;
            std::normal_distribution<float> normal(gain ? 1.0F : 0.0F, gain ? 0.3F : 0.25F);
            auto& buffer = values.emplace_back(static_cast<std::size_t>(spec.elements()));
            for (float& value : buffer)
                value = normal(generator);
            tensors.push_back(borrow_f32(buffer.data(), spec.rows, spec.columns));
        }
    }
    std::vector<std::vector<float>> values;
    std::vector<Tensor> tensors;
};

/// Also "xsmm-bf16": operands of products in bf16, where the CPU multiplies them.
inline std::unique_ptr<Engine> engine_named(const std::string& name)
{
    const bool bf16 = name == "xsmm-bf16";
    return make_engine({.engine = bf16 ? "xsmm" : name, .products = bf16 ? DType::bf16 : DType::f32});
}

struct TinyModel {
    explicit TinyModel(const DecoderConfig& model, unsigned seed = 1, const std::string& engine_name = "aten")
        : config(model), parameters(model, seed), engine(engine_named(engine_name)),
          weights(config, *engine, parameters.tensors, {.dtype = DType::f32, .with_backward = true}),
          decoder(config, *engine, weights)
    {
    }
    explicit TinyModel(bool tied) : TinyModel(tiny_config(tied)) {}

    DecoderConfig config;
    TinyParameters parameters;
    std::unique_ptr<Engine> engine;
    ResidentWeights weights;
    Decoder decoder;
};

/// The engines that run on this CPU: xsmm needs AVX2 and FMA.
inline std::vector<std::string> usable_engines()
{
    std::vector<std::string> engines;
    for (const char* name : {"xsmm", "aten"}) {
        try {
            make_engine({.engine = name});
            engines.emplace_back(name);
        } catch (const Error& error) {
            if (error.code() != ExitCode::configuration || std::string(name) == "aten") // that one runs everywhere
                throw;
        }
    }
    return engines;
}

/// As usable_engines(), and "xsmm-bf16" where the CPU multiplies bf16 numbers.
inline std::vector<std::string> usable_numerics()
{
    std::vector<std::string> names = usable_engines();
    if (names.front() == "xsmm" && engine_named("xsmm-bf16")->numerics() == "xsmm-bf16")
        names.emplace_back("xsmm-bf16");
    return names;
}

inline std::vector<std::int32_t> random_tokens(unsigned seed, std::size_t count, std::int64_t vocabulary = 53)
{
    std::mt19937 generator(seed);
    std::vector<std::int32_t> tokens(count);
    for (auto& token : tokens)
        token = static_cast<std::int32_t>(generator() % static_cast<std::uint32_t>(vocabulary));
    return tokens;
}

/// Two rows: three branches of different lengths, one of them with an unscored head, and one branch of one token.
inline PackedBatch two_rows()
{
    PackedBatch batch;
    batch.add_scored(random_tokens(1, 9), std::vector<Branch>{{random_tokens(2, 6), 0}, {random_tokens(3, 11), 2}, {{}, 0}});
    batch.add_scored(random_tokens(4, 4), std::vector<Branch>{{random_tokens(5, 1), 0}});
    return batch;
}

/// d(objective)/d(log_prob).
inline std::vector<float> coefficients(std::size_t count)
{
    std::vector<float> g(count);
    for (std::size_t i = 0; i < count; ++i)
        g[i] = std::cos(static_cast<float>(3 * i)) + 0.2F;
    return g;
}

/// Keeps gradients and the order of ready(). Parameters in `frozen` get none.
class RecordingSink final : public GradientSink {
  public:
    explicit RecordingSink(const DecoderConfig& config)
    {
        for (const ParameterSpec& spec : decoder_parameters(config)) {
            auto& buffer = values.emplace_back(static_cast<std::size_t>(spec.elements()));
            tensors.push_back(borrow_f32(buffer.data(), spec.rows, spec.columns));
        }
    }
    Tensor gradient(std::int64_t parameter) override
    {
        return frozen.contains(parameter) ? Tensor{} : tensors[static_cast<std::size_t>(parameter)];
    }
    void ready(std::int64_t parameter) override { order.push_back(parameter); }

    std::vector<std::vector<float>> values;
    std::vector<Tensor> tensors;
    std::vector<std::int64_t> order;
    std::set<std::int64_t> frozen;
};

inline double largest_difference(std::span<const float> a, std::span<const float> b)
{
    double largest = a.size() == b.size() ? 0 : INFINITY;
    for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
        const double difference = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
        largest = difference <= largest ? largest : difference; // NaN counts as a difference
    }
    return largest;
}

} // namespace selm::test
