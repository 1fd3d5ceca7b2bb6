#include "selm/shard/shared_weights.hpp"

#include <deque>

#include "selm/comm/agree.hpp"

namespace selm {

namespace {

/// Units whose exchange is under way at once.
constexpr std::size_t most_exchanges = 4;

} // namespace

SharedWeights::SharedWeights(const FlatLayout& layout, Communicator& comm, Communicator& node)
    : layout_(layout), node_(node), exchange_(layout, comm, NodeMap(comm, node))
{
    // NodeSharedMemory fails alike on all ranks of a node; agree() is for the other nodes.
    agree(comm, "memory for the weights", [&] {
        memory_ = std::make_unique<NodeSharedMemory>(node, layout.total() * sizeof(float), "weights");
    });
    values_ = {reinterpret_cast<float*>(memory_->data()), layout.total()};
}

void SharedWeights::spread(bool bf16)
{
    std::deque<std::unique_ptr<PendingCollective>> under_way;
    const auto finish_front = [&] {
        under_way.front()->wait();
        under_way.pop_front();
    };
    for (std::size_t u = 0; u < layout_.units(); ++u) {
        const ShardInfo unit = layout_.unit(u).flat;
        if (auto pending = exchange_.start(u, values_.subspan(unit.offset, unit.size), bf16, "updated weights"))
            under_way.push_back(std::move(pending));
        while (under_way.size() > most_exchanges)
            finish_front();
    }
    while (!under_way.empty())
        finish_front();
    memory_->fence();
}

std::int64_t SharedWeights::bytes() const
{
    return static_cast<std::int64_t>(values_.size_bytes()) / node_.size();
}

} // namespace selm
