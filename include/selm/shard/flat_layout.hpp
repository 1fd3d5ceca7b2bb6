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
 * zero), total cut into equal aligned shards (the last ones may be smaller or empty). Pure arithmetic; no
 * communication.
 *
 * Where a parameter stands does not depend on the number of ranks, so a flat buffer saved by N ranks is read by M.
 */
class FlatLayout {
  public:
    FlatLayout(std::span<const ParameterSpec> parameters, int ranks, std::size_t alignment = 64);
    std::size_t total() const { return total_; }
    std::size_t alignment() const { return alignment_; }
    std::size_t parameters() const { return offsets_.size(); }
    std::size_t offset(std::size_t parameter) const { return offsets_[parameter]; }
    int ranks() const { return static_cast<int>(shard_offsets_.size()) - 1; }
    ShardInfo shard(int rank) const;
    /// ranks+1 offsets, as Communicator::reduce_scatter_sum wants them.
    const std::vector<std::size_t>& shard_offsets() const { return shard_offsets_; }

  private:
    std::vector<std::size_t> offsets_;
    std::vector<std::size_t> shard_offsets_;
    std::size_t total_ = 0;
    std::size_t alignment_ = 0;
};

/// The elements of one checkpoint tensor (ParameterSpec::Part) that lie in a shard.
struct PartSlice {
    const ParameterSpec::Part* part = nullptr; ///< borrowed from the parameters
    std::size_t part_begin = 0;                ///< first element within the part, row-major
    std::size_t shard_begin = 0;               ///< where it stands in the shard's buffer
    std::size_t count = 0;                     ///< 0: the shard holds nothing of this part
};

/// One entry per part of every parameter, in order, also where the shard holds nothing of it (collective writers need
/// the same sequence on every rank). A part is a block of whole rows, so its elements are contiguous.
std::vector<PartSlice> part_slices(std::span<const ParameterSpec> parameters, const FlatLayout& layout,
                                   ShardInfo shard);

} // namespace selm
