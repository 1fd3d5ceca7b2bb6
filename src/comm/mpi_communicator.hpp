#pragma once

#include <list>
#include <memory>
#include <vector>

#include <mpi.h>

#include "pending_operation.hpp"
#include "selm/comm/communicator.hpp"

namespace selm::comm {

/// A communicator over MPI; owns its MPI_Comm.
class MpiCommunicator final : public Communicator {
  public:
    /// Takes ownership of @p comm. Not collective. @p name: see CallCounter.
    MpiCommunicator(MPI_Comm comm, std::uint64_t name);
    ~MpiCommunicator() override;
    MpiCommunicator(const MpiCommunicator&) = delete;
    MpiCommunicator& operator=(const MpiCommunicator&) = delete;

    int rank() const override { return rank_; }
    int size() const override { return size_; }
    void barrier(std::string_view label) override;
    void sleeping_barrier(std::string_view label, const std::function<void()>& poll) override;
    void broadcast(std::span<std::byte> data, int root, std::string_view label) override;
    void all_gather(std::span<const std::byte> send, std::span<std::byte> recv, std::string_view label) override;
    std::vector<std::vector<std::byte>> all_gather_ragged(std::span<const std::byte> send, std::string_view label) override;
    std::vector<std::vector<std::byte>> all_to_all_ragged(const std::vector<std::vector<std::byte>>& send,
                                                          std::string_view label) override;
    void all_reduce(std::span<double> data, ReduceOp op, std::string_view label) override;
    void all_reduce(std::span<std::int64_t> data, ReduceOp op, std::string_view label) override;
    void reduce_scatter_sum(std::span<const float> full, std::span<const std::size_t> offsets, std::span<float> shard,
                            std::string_view label) override;
    void all_gather_shards(std::span<const float> shard, std::span<const std::size_t> offsets, std::span<float> full,
                           std::string_view label) override;
    std::unique_ptr<PendingCollective> start_reduce_scatter_sum(std::span<const float> full,
                                                                std::span<const std::size_t> offsets,
                                                                std::span<float> shard, std::string_view label) override;
    std::unique_ptr<PendingCollective> start_reduce_scatter_sum_bf16(std::span<const std::uint16_t> full,
                                                                     std::span<const std::size_t> offsets,
                                                                     std::span<float> shard, std::string_view label) override;
    std::unique_ptr<PendingCollective> start_all_gather_shards(std::span<const float> shard,
                                                               std::span<const std::size_t> offsets, std::span<float> full,
                                                               std::string_view label) override;
    std::unique_ptr<PendingCollective> start_exchange(std::span<const Outgoing> outgoing, std::span<const Incoming> incoming,
                                                      std::string_view label) override;
    std::unique_ptr<PendingCollective> start_barrier(std::string_view label) override;
    void send(int destination, int tag, std::span<const std::byte> data) override;
    std::optional<Message> try_receive(int tag) override;
    std::unique_ptr<Communicator> split_node(std::string_view label, int ranks_at_most) override;
    std::unique_ptr<Communicator> duplicate(std::string_view label) override;
    const void* native_handle() const override { return &comm_; }

  private:
    struct PendingSend {
        MPI_Request request;
        std::vector<std::byte> data;
    };

    void check_offsets(std::span<const std::size_t> offsets, std::size_t full, std::size_t shard) const;
    void forget_finished_sends();
    /// A tag for a reduce-scatter in rounds, -1 where it needs none. The same on all ranks.
    int tag_for(const ReducePlan& plan);
    static void finish(const std::unique_ptr<Operation>& operation, const Call& call);
    void broadcast_pieces(std::span<std::byte> data, int root, const Call& call);
    /// recv.size() within the message limit.
    void gather_blocks(std::span<const std::byte> send, std::span<std::byte> recv, const Call& call);
    int first_rank_of(MPI_Comm part, std::string_view label) const;

    MPI_Comm comm_;
    CallCounter calls_;
    int rank_ = 0;
    int size_ = 1;
    int next_reduce_ = 0;
    int exceptions_at_start_;
    std::list<PendingSend> pending_sends_;
};

} // namespace selm::comm
