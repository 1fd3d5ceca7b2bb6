#include "selm/shard/node_exchange.hpp"

#include <algorithm>
#include <map>
#include <utility>

#include "selm/base/error.hpp"
#include "selm/kernels/engine.hpp"

namespace selm {

namespace {

/// An exchange in bf16: holds the halves until they have been sent, and expands what came.
class HalfExchange final : public PendingCollective {
  public:
    struct Shard {
        int rank;
        std::vector<std::uint16_t> halves;
        std::span<float> values;
    };
    std::vector<std::uint16_t> sent;
    std::vector<Shard> received;
    std::unique_ptr<PendingCollective> pending;

    bool test() override
    {
        if (pending && pending->test())
            expand();
        return !pending;
    }
    void wait() override
    {
        if (!pending)
            return;
        pending->wait();
        expand();
    }

  private:
    void expand()
    {
        for (const Shard& shard : received)
            std::transform(shard.halves.begin(), shard.halves.end(), shard.values.begin(), bf16_to_float);
        pending.reset();
    }
};

} // namespace

NodeMap::NodeMap(std::span<const int> node_of_rank) : node_of_rank_(node_of_rank.begin(), node_of_rank.end())
{
    fill();
}

NodeMap::NodeMap(Communicator& comm, Communicator& node)
{
    int first = comm.rank();
    broadcast_value(node, first, 0, "first rank of the node");
    node_of_rank_ = all_gather_value(comm, first, "first ranks of the nodes");
    fill();
}

void NodeMap::fill()
{
    std::map<int, int> number;
    for (int& node : node_of_rank_) {
        node = number.emplace(node, static_cast<int>(number.size())).first->second;
        ranks_of_node_.resize(number.size());
        auto& ranks = ranks_of_node_[static_cast<std::size_t>(node)];
        ranks_before_.push_back(static_cast<int>(ranks.size()));
        ranks.push_back(static_cast<int>(ranks_before_.size()) - 1);
    }
}

int NodeMap::receiver(int sender, int node) const
{
    const auto& ranks = ranks_of(node);
    return ranks[static_cast<std::size_t>(ranks_before_[static_cast<std::size_t>(sender)]) % ranks.size()];
}

NodeExchange::NodeExchange(const FlatLayout& layout, Communicator& comm, NodeMap map)
    : layout_(layout), comm_(comm), map_(std::move(map))
{
}

std::unique_ptr<PendingCollective> NodeExchange::start(std::size_t unit, std::span<float> values, bool bf16,
                                                       std::string_view label)
{
    const ShardInfo whole = layout_.unit(unit).flat;
    SELM_EXPECT(values.size() == whole.size);
    if (map_.nodes() == 1)
        return nullptr;
    const auto shard_values = [&](int rank) {
        const ShardInfo shard = layout_.shard(unit, rank);
        return values.subspan(shard.offset - whole.offset, shard.size);
    };
    const int own_node = map_.node_of(comm_.rank());
    const auto own = shard_values(comm_.rank());
    auto halves = std::make_unique<HalfExchange>();
    if (bf16) {
        halves->sent.resize(own.size());
        std::transform(own.begin(), own.end(), halves->sent.begin(), float_to_bf16);
    }
    std::vector<Communicator::Outgoing> outgoing;
    for (int node = 0; node < map_.nodes() && !own.empty(); ++node)
        if (node != own_node)
            outgoing.push_back({map_.receiver(comm_.rank(), node),
                                bf16 ? std::as_bytes(std::span(std::as_const(halves->sent)))
                                     : std::as_bytes(std::span<const float>(own))});
    std::vector<Communicator::Incoming> incoming;
    for (int rank = 0; rank < comm_.size(); ++rank) {
        const auto theirs = shard_values(rank);
        if (theirs.empty() || map_.node_of(rank) == own_node || map_.receiver(rank, own_node) != comm_.rank())
            continue;
        if (bf16)
            halves->received.push_back({rank, std::vector<std::uint16_t>(theirs.size()), theirs});
        else
            incoming.push_back({rank, std::as_writable_bytes(theirs)});
    }
    for (HalfExchange::Shard& shard : halves->received)
        incoming.push_back({shard.rank, std::as_writable_bytes(std::span(shard.halves))});
    auto pending = comm_.start_exchange(outgoing, incoming, label);
    if (!bf16)
        return pending;
    halves->pending = std::move(pending);
    return halves;
}

} // namespace selm
