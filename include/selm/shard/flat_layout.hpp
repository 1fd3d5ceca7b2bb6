#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "selm/model/decoder_config.hpp"

namespace selm {

/// The one sharding primitive: elements [offset, offset+size) of the flat parameter space.
struct ShardInfo {
    std::size_t offset = 0;
    std::size_t size = 0;
};

/// Consecutive parameters that are reduced and gathered together, cut evenly over the ranks.
struct FlatUnit {
    std::size_t first = 0;      ///< its first parameter
    std::size_t parameters = 0; ///< how many
    ShardInfo flat;             ///< where it lies in the flat space
    bool frozen = false;        ///< not trained: no gradient, no moments
};

/// How the flat space is cut.
struct FlatLayoutOptions {
    std::size_t alignment = 64;          ///< elements; parameters and shards begin at multiples of it
    std::size_t bucket = 0;              ///< elements of a unit at most, unless one parameter is larger; 0: no limit
    std::vector<std::int64_t> group_ends = {}; ///< parameters (ascending): a unit never crosses one; empty: one group
    std::vector<bool> frozen = {};            ///< by parameter; empty: none
};

/**
 * @brief Flat f32 parameter space: parameters one after another, each start aligned (padding is zero), grouped into units;
 * every unit is cut over the ranks into equal aligned shards (the last ones may be smaller or empty). Pure arithmetic; no
 * communication.
 *
 * Where a parameter stands depends neither on the number of ranks nor on the units. Cutting unit by unit, not the whole
 * space at once, is what lets all ranks take part in reducing or gathering a single layer.
 */
class FlatLayout {
  public:
    FlatLayout(std::span<const ParameterSpec> parameters, int ranks, const FlatLayoutOptions& options = {});
    std::size_t total() const { return total_; }
    std::size_t alignment() const { return alignment_; }
    int ranks() const { return ranks_; }

    std::size_t parameters() const { return offsets_.size(); }
    std::size_t offset(std::size_t parameter) const { return offsets_[parameter]; }
    std::size_t unit_of(std::size_t parameter) const { return unit_of_[parameter]; }

    std::size_t units() const { return units_.size(); }
    const FlatUnit& unit(std::size_t index) const { return units_[index]; }
    /// Units whose parameters lie in [first, end): their indices are [result.offset, result.offset + result.size).
    ShardInfo units_of_parameters(std::size_t first, std::size_t end) const;

    /// This rank's part of a unit, in the flat space.
    ShardInfo shard(std::size_t unit, int rank) const;
    /// ranks+1 offsets from the unit's beginning, as Communicator::reduce_scatter_sum wants them.
    std::vector<std::size_t> shard_offsets(std::size_t unit) const;
    /// Elements of all units' shards of a rank; @param trained_only without frozen units.
    std::size_t shard_elements(int rank, bool trained_only) const;

  private:
    std::size_t shard_size(std::size_t unit) const;

    std::vector<std::size_t> offsets_;
    std::vector<std::size_t> unit_of_;
    std::vector<FlatUnit> units_;
    std::size_t total_ = 0;
    std::size_t alignment_ = 0;
    int ranks_ = 1;
};

/// What a rank holds of each unit: one piece per unit, in order.
std::vector<ShardInfo> rank_pieces(const FlatLayout& layout, int rank);
/// The same for a rank that holds everything (ZeRO-0).
std::vector<ShardInfo> whole_pieces(const FlatLayout& layout);

/// Elements of one parameter that lie in the pieces.
struct ParameterSlice {
    std::size_t parameter = 0;
    std::size_t unit = 0;            ///< whose piece they are in
    std::size_t piece_begin = 0;     ///< where they stand in that piece
    std::size_t parameter_begin = 0; ///< first element within the parameter, row-major
    std::size_t count = 0;           ///< 0: the pieces hold nothing of it
};

/// One entry per parameter, in order.
std::vector<ParameterSlice> parameter_slices(std::span<const ParameterSpec> parameters, const FlatLayout& layout,
                                             std::span<const ShardInfo> pieces);

/// The elements of one checkpoint tensor (ParameterSpec::Part) that lie in the pieces.
struct PartSlice {
    const ParameterSpec::Part* part = nullptr; ///< borrowed from the parameters
    std::size_t unit = 0;                      ///< whose piece they are in
    std::size_t piece_begin = 0;               ///< where they stand in that piece
    std::size_t part_begin = 0;                ///< first element within the part, row-major
    std::size_t count = 0;                     ///< 0: the pieces hold nothing of it
};

/// One entry per part of every parameter, in order, also where the pieces hold nothing of it (collective writers need
/// the same sequence on every rank). A part is a block of whole rows, so its elements are contiguous.
std::vector<PartSlice> part_slices(std::span<const ParameterSpec> parameters, const FlatLayout& layout,
                                   std::span<const ShardInfo> pieces);

} // namespace selm
