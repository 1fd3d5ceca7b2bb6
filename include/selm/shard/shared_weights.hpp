#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "selm/comm/communicator.hpp"
#include "selm/shard/flat_layout.hpp"
#include "selm/shard/node_exchange.hpp"

namespace selm {

/**
 * @brief Flat weights [total], zero at first, of which every node holds one copy that its ranks share.
 *
 * A rank writes its pieces of all units, then all call spread().
 */
class SharedWeights {
  public:
    /// @param node ranks that share memory (Communicator::split_node), or a communicator of one rank: a copy per rank.
    /// All borrowed. Collective over comm. @throws Error io on every rank when a node has no room.
    SharedWeights(const FlatLayout& layout, Communicator& comm, Communicator& node);

    std::span<float> values() { return values_; }
    std::span<const float> values() const { return values_; }
    /// Every rank's shards become visible on all ranks: within a node as they are, between nodes they are sent. Nobody may
    /// read values() meanwhile. @param bf16 the values are bf16 numbers. Collective over comm.
    void spread(bool bf16);
    /// Bytes of the copy that fall to this rank: the whole over the ranks of its node.
    std::int64_t bytes() const;

  private:
    const FlatLayout& layout_;
    Communicator& node_;
    NodeExchange exchange_;
    std::unique_ptr<NodeSharedMemory> memory_;
    std::span<float> values_;
};

} // namespace selm
