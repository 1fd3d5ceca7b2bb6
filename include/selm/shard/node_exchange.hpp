#pragma once

#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "selm/comm/communicator.hpp"
#include "selm/shard/flat_layout.hpp"

namespace selm {

/// Which ranks share memory, and who receives a rank's shards for each other node. Pure arithmetic once made.
class NodeMap {
  public:
    /// @param node_of_rank a number per rank; ranks with the same number share memory.
    explicit NodeMap(std::span<const int> node_of_rank);
    /// @param node the ranks that share memory with this one. Collective over comm.
    NodeMap(Communicator& comm, Communicator& node);

    int nodes() const { return static_cast<int>(ranks_of_node_.size()); }
    int node_of(int rank) const { return node_of_rank_[static_cast<std::size_t>(rank)]; }
    const std::vector<int>& ranks_of(int node) const { return ranks_of_node_[static_cast<std::size_t>(node)]; }
    /// The rank of `node` that receives shards of `sender`: the ranks of a node share the work.
    int receiver(int sender, int node) const;

  private:
    void fill();
    std::vector<int> node_of_rank_; ///< numbered from 0 in order of their first ranks
    std::vector<int> ranks_before_; ///< of the same node
    std::vector<std::vector<int>> ranks_of_node_;
};

/**
 * @brief Moves the shards of a unit between nodes: afterwards a node's memory holds the whole unit. Every shard crosses to
 * each other node once, whatever the number of ranks there, straight into its place.
 */
class NodeExchange {
  public:
    NodeExchange(const FlatLayout& layout, Communicator& comm, NodeMap map);

    const NodeMap& map() const { return map_; }
    /**
     * @brief Starts the exchange of a unit. Every rank calls it for the same units in the same order.
     * @param values [unit size] the node's memory of the unit; this rank's shard is in place, nobody touches the rest.
     * @param bf16 the values are bf16 numbers: they travel in two bytes.
     * @return nothing where this rank has nothing to send or receive (one node). Other ranks of the node see what arrived
     * after a fence or barrier.
     */
    std::unique_ptr<PendingCollective> start(std::size_t unit, std::span<float> values, bool bf16, std::string_view label);

  private:
    const FlatLayout& layout_;
    Communicator& comm_;
    NodeMap map_;
};

} // namespace selm
