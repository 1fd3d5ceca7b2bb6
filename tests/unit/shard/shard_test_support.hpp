#pragma once

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include <unistd.h>

#include "selm/base/rng.hpp"
#include "selm/comm/communicator.hpp"
#include "selm/model/decoder_config.hpp"
#include "selm/shard/optimizer.hpp"

namespace selm::test {

/// Parameters of a tiny decoder with odd sizes, so that parts, parameters and shards begin at different places.
inline std::vector<ParameterSpec> toy_parameters()
{
    DecoderConfig config;
    config.model_type = "llama";
    config.vocabulary = 37;
    config.hidden = 12;
    config.intermediate = 20;
    config.layers = 2;
    config.heads = 3;
    config.kv_heads = 1;
    config.head_dim = 4;
    config.tied_embeddings = true;
    return decoder_parameters(config);
}

/// Value i of a buffer named by `purpose`: the same for any cut into shards.
inline float toy_value(std::uint32_t purpose, std::size_t element)
{
    return static_cast<float>(RandomStream(7, purpose, 0, element).next_normal());
}

/// A flat buffer of the layout with values in parameters and zeros in the padding.
inline std::vector<float> toy_flat(const std::vector<ParameterSpec>& parameters, const FlatLayout& layout,
                                   std::uint32_t purpose, float scale = 1)
{
    std::vector<float> flat(layout.total(), 0.0F);
    for (std::size_t p = 0; p < parameters.size(); ++p)
        for (std::size_t i = 0; i < static_cast<std::size_t>(parameters[p].elements()); ++i)
            flat[layout.offset(p) + i] = scale * toy_value(purpose, layout.offset(p) + i);
    return flat;
}

/// Groups of toy_parameters(): the embedding, each layer, the final norm.
inline std::vector<std::int64_t> toy_groups()
{
    return {1, 7, 13, 14};
}

/// A training without a model: gradients are given.
class ToyTraining {
  public:
    struct Options {
        ShardedAdamW::Options optimizer;
        FlatLayoutOptions layout{.group_ends = toy_groups()};
        DType accumulate = DType::f32;
    };
    /// @param node ranks that share the weights; null: every rank has its own. At stage 3 without compute weights.
    ToyTraining(Communicator& comm, const Options& options, Communicator* node = nullptr)
        : parameters(toy_parameters()), layout(parameters, comm.size(), options.layout), comm_(comm),
          alone_(make_single_communicator()),
          shared(options.optimizer.stage == 3
                     ? nullptr
                     : std::make_unique<SharedWeights>(layout, comm, node != nullptr ? *node : *alone_)),
          gradient(parameters, layout, comm,
                   {.stage = options.optimizer.stage, .accumulate = options.accumulate}),
          optimizer(layout, comm, options.optimizer, shared.get())
    {
    }

    /// Copies what belongs to this rank's state from a flat buffer of master weights, and publishes them.
    void fill(const std::vector<float>& master)
    {
        for (std::size_t u = 0; u < layout.units(); ++u)
            std::copy_n(master.begin() + static_cast<std::ptrdiff_t>(optimizer.pieces()[u].offset),
                        optimizer.pieces()[u].size, optimizer.master(u).begin());
        optimizer.publish();
    }

    /// The sums of this rank's flat gradient over all ranks, each split evenly over `passes` passes. @return the norm.
    double reduce(const std::vector<float>& flat, int passes = 1)
    {
        gradient.begin_step();
        for (int pass = 0; pass < passes; ++pass) {
            gradient.begin_pass(pass + 1 == passes);
            for (std::size_t p = parameters.size(); p-- > 0;) {
                const Tensor to = gradient.gradient(static_cast<std::int64_t>(p));
                for (std::size_t i = 0; !to.empty() && i < static_cast<std::size_t>(parameters[p].elements()); ++i)
                    to.f32()[i] += flat[layout.offset(p) + i] / static_cast<float>(passes);
                gradient.ready(static_cast<std::int64_t>(p));
            }
            gradient.end_pass();
        }
        return norm_ = gradient.finish();
    }
    double step(double rate, const std::vector<float>& flat, int passes = 1)
    {
        reduce(flat, passes);
        optimizer.apply(rate, gradient, norm_);
        return norm_;
    }

    /// One kind of state of all ranks, flat; zeros where there is none. Collective.
    std::vector<float> gathered(std::span<float> (ShardedAdamW::*state)(std::size_t))
    {
        std::vector<float> full(layout.total(), 0.0F);
        for (std::size_t u = 0; u < layout.units(); ++u) {
            const ShardInfo own = layout.shard(u, comm_.rank());
            const auto values = (optimizer.*state)(u);
            if (values.empty() && layout.unit(u).frozen)
                continue;
            comm_.all_gather_shards(values.subspan(own.offset - optimizer.pieces()[u].offset, own.size),
                                    layout.shard_offsets(u),
                                    std::span(full).subspan(layout.unit(u).flat.offset, layout.unit(u).flat.size), "state");
        }
        return full;
    }
    std::vector<float> master() { return gathered(&ShardedAdamW::master); }
    std::vector<float> compute() const { return {shared->values().begin(), shared->values().end()}; }

    const std::vector<ParameterSpec> parameters;
    const FlatLayout layout;

  private:
    Communicator& comm_;
    std::unique_ptr<Communicator> alone_;

  public:
    std::unique_ptr<SharedWeights> shared;
    ShardedGradient gradient;
    ShardedAdamW optimizer;

  private:
    double norm_ = 0;
};

/// Flips one bit of a file.
inline void flip_bit(const std::string& path, std::size_t byte, std::size_t bit)
{
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(static_cast<std::streamoff>(byte));
    const int value = file.get();
    file.seekp(static_cast<std::streamoff>(byte));
    file.put(static_cast<char>(value ^ (1 << bit)));
}

/// A directory that goes away with the object.
class TemporaryDirectory {
  public:
    explicit TemporaryDirectory(const std::string& name)
        : path_(std::filesystem::temp_directory_path() / (name + "-" + std::to_string(::getpid())))
    {
        std::filesystem::remove_all(path_);
        std::filesystem::create_directories(path_);
    }
    ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
    TemporaryDirectory(const TemporaryDirectory&) = delete;
    TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
    std::string path() const { return path_.string(); }

  private:
    std::filesystem::path path_;
};

} // namespace selm::test
