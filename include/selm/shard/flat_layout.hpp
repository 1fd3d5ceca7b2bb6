#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "selm/model/decoder_config.hpp"

namespace selm {

/// The one sharding primitive: elements [offset, offset+size) of the flat parameter space belong to one rank.
struct ShardInfo {
    std::size_t offset = 0;
    std::size_t size = 0;
};

/**
 * @brief Flat f32 parameter space: parameters one after another, each start aligned to `alignment` elements (padding is
 * zero), total cut into equal aligned shards (the last may be smaller or empty). Pure arithmetic; no communication.
 */
class FlatLayout {
  public:
    FlatLayout(std::span<const ParameterSpec> parameters, int ranks, std::size_t alignment = 64);
    std::size_t total() const { return total_; }
    std::size_t offset(std::size_t parameter) const { return offsets_[parameter]; }
    ShardInfo shard(int rank) const;
    /// ranks+1 offsets, as Communicator::reduce_scatter_sum wants them.
    const std::vector<std::size_t>& shard_offsets() const { return shard_offsets_; }

  private:
    std::vector<std::size_t> offsets_;
    std::vector<std::size_t> shard_offsets_;
    std::size_t total_ = 0;
};

} // namespace selm
