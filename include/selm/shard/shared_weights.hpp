#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "selm/comm/communicator.hpp"
#include "selm/shard/flat_layout.hpp"

namespace selm {

/**
 * @brief Flat weights [total], zero at first, of which every node holds one copy that its ranks share.
 *
 * A rank writes the elements of its own shard, then all call spread().
 */
class SharedWeights {
  public:
    /// @param node ranks that share memory (Communicator::split_node), or a communicator of one rank: a copy per rank.
    /// All borrowed. Collective over comm. @throws Error io on every rank when a node has no room.
    SharedWeights(const FlatLayout& layout, Communicator& comm, Communicator& node);

    std::span<float> values() { return values_; }
    /// Every rank's shard becomes visible on all ranks: within a node as it is, and the first rank of a node receives the
    /// shards of all other nodes. Nobody may read values() meanwhile. Collective over comm.
    void spread();
    /// Bytes of the copy that fall to this rank: the whole over the ranks of its node.
    std::int64_t bytes() const;

  private:
    void exchange_between_nodes();

    const FlatLayout& layout_;
    Communicator& comm_;
    Communicator& node_;
    std::vector<int> first_of_node_; ///< by rank of comm: the first rank on its node
    std::unique_ptr<NodeSharedMemory> memory_;
    std::span<float> values_;
};

} // namespace selm
