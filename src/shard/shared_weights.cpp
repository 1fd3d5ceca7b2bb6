#include "selm/shard/shared_weights.hpp"

#include <algorithm>
#include <cstring>

#include "selm/comm/agree.hpp"

namespace selm {

namespace {

/// Elements that all ranks together send to one node at a time, at most.
constexpr std::size_t most_per_round = std::size_t{1} << 24;

} // namespace

SharedWeights::SharedWeights(const FlatLayout& layout, Communicator& comm, Communicator& node)
    : layout_(layout), comm_(comm), node_(node)
{
    int first = comm.rank();
    broadcast_value(node, first, 0, "first rank of the node");
    first_of_node_ = all_gather_value(comm, first, "first ranks of the nodes");
    // NodeSharedMemory fails alike on all ranks of a node; agree() is for the other nodes.
    agree(comm, "memory for the weights", [&] {
        memory_ = std::make_unique<NodeSharedMemory>(node, layout.total() * sizeof(float), "weights");
    });
    values_ = {reinterpret_cast<float*>(memory_->data()), layout.total()};
}

void SharedWeights::spread()
{
    const bool one_node = std::all_of(first_of_node_.begin(), first_of_node_.end(),
                                      [&](int first) { return first == first_of_node_.front(); });
    if (!one_node)
        exchange_between_nodes();
    memory_->fence();
}

void SharedWeights::exchange_between_nodes()
{
    const auto ranks = static_cast<std::size_t>(comm_.size());
    const auto rank = static_cast<std::size_t>(comm_.rank());
    const std::size_t round = std::max<std::size_t>(1, most_per_round / ranks);
    const auto piece = [&](std::size_t of_rank, std::size_t done) {
        const ShardInfo shard = layout_.shard(static_cast<int>(of_rank));
        const std::size_t begin = std::min(done, shard.size);
        return values_.subspan(shard.offset + begin, std::min(round, shard.size - begin));
    };
    const std::size_t longest = layout_.shard(0).size; // the first is the largest
    for (std::size_t done = 0; done < longest; done += round) {
        std::vector<std::vector<std::byte>> outgoing(ranks);
        const auto own = std::as_bytes(piece(rank, done));
        for (std::size_t r = 0; r < ranks; ++r)
            if (first_of_node_[r] == static_cast<int>(r) && first_of_node_[rank] != first_of_node_[r])
                outgoing[r].assign(own.begin(), own.end());
        const auto incoming = comm_.all_to_all_ragged(outgoing, "updated weights of other nodes");
        for (std::size_t r = 0; r < ranks; ++r) {
            if (incoming[r].empty())
                continue;
            const auto to = piece(r, done);
            SELM_EXPECT(incoming[r].size() == to.size_bytes());
            std::memcpy(to.data(), incoming[r].data(), to.size_bytes());
        }
    }
}

std::int64_t SharedWeights::bytes() const
{
    return static_cast<std::int64_t>(values_.size_bytes()) / node_.size();
}

} // namespace selm
