#pragma once

#include <filesystem>
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

/// Copies a flat buffer's part that belongs to this rank's state into the optimizer.
inline void fill_state(ShardedAdamW& optimizer, const std::vector<float>& master)
{
    const ShardInfo own = optimizer.state_shard();
    for (std::size_t i = 0; i < own.size; ++i)
        optimizer.master()[i] = master[own.offset + i];
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
