#include <algorithm>
#include <cstring>
#include <deque>
#include <utility>

#include "bf16_wire.hpp"
#include "selm/base/error.hpp"
#include "selm/comm/communicator.hpp"

namespace selm {

namespace {

class DoneCollective final : public PendingCollective {
  public:
    bool test() override { return true; }
    void wait() override {}
};

/// Rank r of n without any peer: with n = 1 a complete communicator, with n > 1 a dry run, in which the contributions of
/// the others are empty or zero and messages to them vanish.
class LocalCommunicator final : public Communicator {
  public:
    LocalCommunicator(int rank, int size) : rank_(rank), size_(size)
    {
        SELM_EXPECT(size >= 1 && rank >= 0 && rank < size);
    }

    int rank() const override { return rank_; }
    int size() const override { return size_; }
    void barrier(std::string_view) override {}
    void sleeping_barrier(std::string_view, const std::function<void()>&) override {}

    void broadcast(std::span<std::byte>, int root, std::string_view) override { SELM_EXPECT(root >= 0 && root < size_); }

    void all_gather(std::span<const std::byte> send, std::span<std::byte> recv, std::string_view) override
    {
        SELM_EXPECT(recv.size() == send.size() * static_cast<std::size_t>(size_));
        std::fill(recv.begin(), recv.end(), std::byte{0});
        std::copy(send.begin(), send.end(), recv.begin() + static_cast<std::ptrdiff_t>(send.size()) * rank_);
    }

    std::vector<std::vector<std::byte>> all_gather_ragged(std::span<const std::byte> send, std::string_view) override
    {
        std::vector<std::vector<std::byte>> result(static_cast<std::size_t>(size_));
        result[own()].assign(send.begin(), send.end());
        return result;
    }

    std::vector<std::vector<std::byte>> all_to_all_ragged(const std::vector<std::vector<std::byte>>& send,
                                                          std::string_view) override
    {
        SELM_EXPECT(send.size() == static_cast<std::size_t>(size_));
        std::vector<std::vector<std::byte>> result(send.size());
        result[own()] = send[own()];
        return result;
    }

    void all_reduce(std::span<double>, ReduceOp, std::string_view) override {}
    void all_reduce(std::span<std::int64_t>, ReduceOp, std::string_view) override {}

    void reduce_scatter_sum(std::span<const float> full, std::span<const std::size_t> offsets, std::span<float> shard,
                            std::string_view) override
    {
        check_offsets(offsets, full.size(), shard.size());
        std::copy_n(full.begin() + static_cast<std::ptrdiff_t>(offsets[own()]), shard.size(), shard.begin());
    }

    void all_gather_shards(std::span<const float> shard, std::span<const std::size_t> offsets, std::span<float> full,
                           std::string_view) override
    {
        check_offsets(offsets, full.size(), shard.size());
        if (!shard.empty())
            std::memmove(full.data() + offsets[own()], shard.data(), shard.size_bytes()); // shard may lie inside full
    }

    std::unique_ptr<PendingCollective> start_reduce_scatter_sum(std::span<const float> full,
                                                                std::span<const std::size_t> offsets,
                                                                std::span<float> shard, std::string_view label) override
    {
        reduce_scatter_sum(full, offsets, shard, label);
        return std::make_unique<DoneCollective>();
    }

    std::unique_ptr<PendingCollective> start_reduce_scatter_sum_bf16(std::span<const std::uint16_t> full,
                                                                     std::span<const std::size_t> offsets,
                                                                     std::span<float> shard, std::string_view) override
    {
        check_offsets(offsets, full.size(), shard.size());
        std::transform(full.begin() + static_cast<std::ptrdiff_t>(offsets[own()]),
                       full.begin() + static_cast<std::ptrdiff_t>(offsets[own() + 1]), shard.begin(), comm::float_of_bf16);
        return std::make_unique<DoneCollective>();
    }

    std::unique_ptr<PendingCollective> start_all_gather_shards(std::span<const float> shard,
                                                               std::span<const std::size_t> offsets, std::span<float> full,
                                                               std::string_view label) override
    {
        all_gather_shards(shard, offsets, full, label);
        return std::make_unique<DoneCollective>();
    }

    std::unique_ptr<PendingCollective> start_exchange(std::span<const Outgoing> outgoing, std::span<const Incoming> incoming,
                                                      std::string_view) override
    {
        std::deque<std::span<const std::byte>> to_self;
        for (const Outgoing& message : outgoing) {
            SELM_EXPECT(message.rank >= 0 && message.rank < size_);
            if (message.rank == rank_)
                to_self.push_back(message.data);
        }
        for (const Incoming& message : incoming) {
            SELM_EXPECT(message.rank >= 0 && message.rank < size_);
            if (message.rank != rank_) {
                std::fill(message.data.begin(), message.data.end(), std::byte{0});
                continue;
            }
            SELM_EXPECT(!to_self.empty() && to_self.front().size() == message.data.size());
            std::copy(to_self.front().begin(), to_self.front().end(), message.data.begin());
            to_self.pop_front();
        }
        SELM_EXPECT(to_self.empty());
        return std::make_unique<DoneCollective>();
    }

    std::unique_ptr<PendingCollective> start_barrier(std::string_view) override { return std::make_unique<DoneCollective>(); }

    void send(int destination, int tag, std::span<const std::byte> data) override
    {
        SELM_EXPECT(destination >= 0 && destination < size_ && tag >= 0);
        if (destination == rank_)
            messages_.emplace_back(tag, Message{rank_, std::vector<std::byte>(data.begin(), data.end())});
    }

    std::optional<Message> try_receive(int tag) override
    {
        const auto found = std::find_if(messages_.begin(), messages_.end(), [&](const auto& m) { return m.first == tag; });
        if (found == messages_.end())
            return std::nullopt;
        Message message = std::move(found->second);
        messages_.erase(found);
        return message;
    }

    std::unique_ptr<Communicator> split_node(std::string_view, int ranks_at_most) override
    {
        SELM_EXPECT(ranks_at_most >= 0);
        if (ranks_at_most == 0)
            return std::make_unique<LocalCommunicator>(0, 1);
        const int first = rank_ / ranks_at_most * ranks_at_most;
        return std::make_unique<LocalCommunicator>(rank_ - first, std::min(ranks_at_most, size_ - first));
    }
    std::unique_ptr<Communicator> duplicate(std::string_view) override
    {
        return std::make_unique<LocalCommunicator>(rank_, size_);
    }

  private:
    std::size_t own() const { return static_cast<std::size_t>(rank_); }
    void check_offsets(std::span<const std::size_t> offsets, std::size_t full, std::size_t shard) const
    {
        SELM_EXPECT(offsets.size() == static_cast<std::size_t>(size_) + 1);
        SELM_EXPECT(std::is_sorted(offsets.begin(), offsets.end()));
        SELM_EXPECT(offsets.back() <= full);
        SELM_EXPECT(shard == offsets[own() + 1] - offsets[own()]);
    }

    int rank_;
    int size_;
    std::deque<std::pair<int, Message>> messages_;
};

} // namespace

std::unique_ptr<Communicator> make_single_communicator()
{
    return std::make_unique<LocalCommunicator>(0, 1);
}

std::unique_ptr<Communicator> make_dry_run_communicator(int rank, int size)
{
    return std::make_unique<LocalCommunicator>(rank, size);
}

void broadcast_string(Communicator& comm, std::string& value, int root, std::string_view label)
{
    std::uint64_t bytes = value.size();
    broadcast_value(comm, bytes, root, label);
    value.resize(bytes);
    comm.broadcast(std::as_writable_bytes(std::span<char>(value)), root, label);
}

double all_reduce_value(Communicator& comm, double value, ReduceOp op, std::string_view label)
{
    comm.all_reduce(std::span<double>(&value, 1), op, label);
    return value;
}

std::int64_t all_reduce_value(Communicator& comm, std::int64_t value, ReduceOp op, std::string_view label)
{
    comm.all_reduce(std::span<std::int64_t>(&value, 1), op, label);
    return value;
}

} // namespace selm
