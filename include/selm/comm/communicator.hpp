#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace selm {

enum class ReduceOp { sum, min, max };

/// A collective under way. Its buffers belong to it until wait() returned or test() was true. Destroying it unfinished
/// waits; while an exception unwinds it waits two seconds at most, then the process must end without using the buffers.
class PendingCollective {
  public:
    virtual ~PendingCollective() = default;
    /// True when the collective is complete on this rank. Not collective; also moves other collectives under way on.
    virtual bool test() = 0;
    virtual void wait() = 0;
};

/**
 * @brief A group of ranks. Implementations: MPI (world, split, node), Single (one rank, no MPI), DryRun (pretends to be
 * rank r of n, moves nothing: partition logic for thousands of ranks on a laptop).
 *
 * Every method without "not collective" in its comment is collective over the communicator; `label` names the call in
 * errors. All buffers are host memory. @throws Error internal when MPI reports an error.
 */
class Communicator {
  public:
    virtual ~Communicator() = default;

    virtual int rank() const = 0; ///< not collective
    virtual int size() const = 0; ///< not collective
    bool is_root() const { return rank() == 0; }

    virtual void barrier(std::string_view label) = 0;
    /// Barrier whose waiting ranks sleep between tests and call @p poll (may be empty) while they wait. It meets no other
    /// collective: a rank may come here while the others are in one, and wait.
    virtual void sleeping_barrier(std::string_view label, const std::function<void()>& poll) = 0;

    virtual void broadcast(std::span<std::byte> data, int root, std::string_view label) = 0;
    /// Fixed-size all-gather: recv holds size() blocks of send.size() bytes, in rank order.
    virtual void all_gather(std::span<const std::byte> send, std::span<std::byte> recv, std::string_view label) = 0;
    /// Ragged all-gather: element r = rank r's bytes.
    virtual std::vector<std::vector<std::byte>> all_gather_ragged(std::span<const std::byte> send, std::string_view label) = 0;
    /// Ragged all-to-all: send[r] goes to rank r; result[r] came from rank r. Totals beyond 2 GiB are split.
    virtual std::vector<std::vector<std::byte>> all_to_all_ragged(const std::vector<std::vector<std::byte>>& send,
                                                                  std::string_view label) = 0;

    /// In place. Sums are taken in rank order on every rank (deterministic for a given size()).
    virtual void all_reduce(std::span<double> data, ReduceOp op, std::string_view label) = 0;
    virtual void all_reduce(std::span<std::int64_t> data, ReduceOp op, std::string_view label) = 0;

    /**
     * @brief shard = sum over ranks, in rank order, of full[offsets[rank], offsets[rank+1]) (fp32).
     * @param offsets size()+1 ascending element offsets into full; shards may be empty or unequal.
     */
    virtual void reduce_scatter_sum(std::span<const float> full, std::span<const std::size_t> offsets, std::span<float> shard,
                                    std::string_view label) = 0;
    /// full[offsets[r], offsets[r+1]) = rank r's shard.
    virtual void all_gather_shards(std::span<const float> shard, std::span<const std::size_t> offsets, std::span<float> full,
                                   std::string_view label) = 0;

    // Collectives under way. All ranks start collectives (these and the blocking ones above) in the same order; they may
    // wait for them in any order, and other collectives may run before wait(). MPI moves data only inside MPI calls:
    // call test() between pieces of work. The pending objects must be gone before their communicator.

    /// As reduce_scatter_sum and with the same bits. At most the size of `full` is allocated beside. `shard` may be the
    /// rank's own part of `full`; `full` is unchanged otherwise.
    virtual std::unique_ptr<PendingCollective> start_reduce_scatter_sum(std::span<const float> full,
                                                                        std::span<const std::size_t> offsets,
                                                                        std::span<float> shard, std::string_view label) = 0;
    /// The same for bf16 values (their upper 16 bits of fp32): bf16 on the wire, summed in fp32 in rank order.
    virtual std::unique_ptr<PendingCollective> start_reduce_scatter_sum_bf16(std::span<const std::uint16_t> full,
                                                                             std::span<const std::size_t> offsets,
                                                                             std::span<float> shard,
                                                                             std::string_view label) = 0;
    /// As all_gather_shards; `shard` may be the rank's own part of `full`.
    virtual std::unique_ptr<PendingCollective> start_all_gather_shards(std::span<const float> shard,
                                                                       std::span<const std::size_t> offsets,
                                                                       std::span<float> full, std::string_view label) = 0;
    struct Outgoing {
        int rank;
        std::span<const std::byte> data;
    };
    struct Incoming {
        int rank;
        std::span<std::byte> data;
    };
    /**
     * @brief Point-to-point exchange in which every message that one rank lists is listed by its partner with the same
     * size, in the same order per pair and direction; ranks without messages need not call (so: not collective). Any size.
     * In a dry run messages from other ranks are zeros.
     */
    virtual std::unique_ptr<PendingCollective> start_exchange(std::span<const Outgoing> outgoing,
                                                              std::span<const Incoming> incoming, std::string_view label) = 0;
    virtual std::unique_ptr<PendingCollective> start_barrier(std::string_view label) = 0;

    // Point to point (not collective), for hand-out of work; `tag` >= 0. The message is at most 64 KiB.
    virtual void send(int destination, int tag, std::span<const std::byte> data) = 0; ///< buffered: does not wait for the receiver
    struct Message {
        int source;
        std::vector<std::byte> data;
    };
    virtual std::optional<Message> try_receive(int tag) = 0; ///< any source; nullopt when nothing has come

    /**
     * @brief Ranks that share memory with this one, ordered by rank.
     * @param ranks_at_most above 0: consecutive ranks of a host in groups of at most so many (NUMA domains; emulated nodes
     * in tests). A dry run takes all its ranks as one host then, and the rank alone as its node otherwise.
     */
    virtual std::unique_ptr<Communicator> split_node(std::string_view label, int ranks_at_most = 0) = 0;
    virtual std::unique_ptr<Communicator> duplicate(std::string_view label) = 0;

    /// Address of the MPI_Comm, or nullptr where there is none (single, dry run); for h5 and comm only. Not collective.
    virtual const void* native_handle() const { return nullptr; }
};

std::unique_ptr<Communicator> make_single_communicator();
std::unique_ptr<Communicator> make_dry_run_communicator(int rank, int size);

// Typed helpers.
template<typename T>
void broadcast_value(Communicator& comm, T& value, int root, std::string_view label)
{
    static_assert(std::is_trivially_copyable_v<T>);
    comm.broadcast(std::as_writable_bytes(std::span<T>(&value, 1)), root, label);
}
void broadcast_string(Communicator& comm, std::string& value, int root, std::string_view label);
double all_reduce_value(Communicator& comm, double value, ReduceOp op, std::string_view label);
std::int64_t all_reduce_value(Communicator& comm, std::int64_t value, ReduceOp op, std::string_view label);
template<typename T>
std::vector<T> all_gather_value(Communicator& comm, const T& value, std::string_view label)
{
    static_assert(std::is_trivially_copyable_v<T>);
    std::vector<T> all(static_cast<std::size_t>(comm.size()));
    comm.all_gather(std::as_bytes(std::span<const T>(&value, 1)), std::as_writable_bytes(std::span<T>(all)), label);
    return all;
}

/**
 * @brief Memory that the ranks of a node share, zero on creation, one copy per node: an MPI shared window where /dev/shm
 * has room, else a mapped file in TMPDIR (said in the log). On a communicator of one rank: private memory.
 */
class NodeSharedMemory {
  public:
    /// Collective over @p node (a split_node communicator). @throws Error io when neither store has room.
    NodeSharedMemory(Communicator& node, std::size_t bytes, std::string_view label);
    ~NodeSharedMemory(); ///< collective where it is a window; tolerates a finalised MPI
    NodeSharedMemory(const NodeSharedMemory&) = delete;
    NodeSharedMemory& operator=(const NodeSharedMemory&) = delete;
    std::byte* data() const noexcept { return data_; }
    std::size_t bytes() const noexcept { return bytes_; }
    /// Makes writes of one rank visible to the others. Collective over the node.
    void fence();

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
    std::byte* data_ = nullptr;
    std::size_t bytes_ = 0;
};

} // namespace selm
