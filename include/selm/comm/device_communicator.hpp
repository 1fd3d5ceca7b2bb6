#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "selm/comm/communicator.hpp"

namespace selm {

namespace comm {
class DeviceBackend;
}

enum class DeviceElement { f32, bf16 };

/// Each purpose has a stream and an NCCL communicator of its own, so that a gather of parameters need not queue behind a
/// reduction of gradients.
enum class DevicePurpose { gradients, parameters };

/// sum[i] = parts[0 * count + i] + parts[1 * count + i] + ... in that order, in fp32, queued on the stream: ordered_sum of
/// selm/kernels/device_kernels.hpp, handed in because this module knows no kernels.
using DeviceOrderedSum = std::function<void(const void* parts, DeviceElement element, std::int64_t number_of_parts,
                                            std::int64_t count, float* sum, void* stream)>;

/**
 * @brief Collectives between the GPUs of a group of ranks, one GPU per rank, on device memory (NCCL).
 *
 * Operations are queued and return at once; all ranks queue the same operations of both purposes in the same order. An
 * operation reads and writes device memory after what the compute stream held at the last wait_for_compute() of its purpose,
 * and its result is there for what a compute stream gets after compute_waits_for(), or for the host after wait(). Counts are
 * elements and may exceed 2^31; 0 is fine. Not thread safe.
 *
 * Order of sums: NCCL chooses its algorithm by size and topology, so the order of its sums is its own: the same on another
 * set of nodes, another number of channels or another version is not promised, and in bf16 partial sums may be rounded on
 * the way. reduce_scatter_sum() therefore does not let NCCL add: the parts are exchanged and every rank adds its own in
 * rank order in fp32, as Communicator::reduce_scatter_sum does; it moves as many bytes as a ring. The `_unordered` operations
 * leave the sum to NCCL.
 *
 * Errors: NCCL's asynchronous errors are looked for while an operation is queued and in wait(). When one shows, or an
 * operation makes no progress for the time-out, both communicators are aborted (which ends the kernels that wait on the
 * device) and an Error internal names the operation's label; every later call throws that error again.
 */
class DeviceCommunicator {
  public:
    struct Options {
        double timeout_s = 1800;                         ///< without progress, in wait() and while connecting; 0: for ever
        std::size_t scratch_bytes = std::size_t{64} << 20; ///< device memory for reduce_scatter_sum; the same on all ranks
        /// Operations of the two purposes may run at the same time. Needs NCCL 2.26 with NCCL_LAUNCH_ORDER_IMPLICIT=1 in the
        /// environment: without it two communicators on one GPU can deadlock. Off: each waits for the other on the device.
        bool concurrent = false;
    };

    /// As make_device_communicator, on a given back end (tests have one of their own). Collective over @p ranks.
    DeviceCommunicator(Communicator& ranks, const Options& options, std::unique_ptr<comm::DeviceBackend> backend);
    /// Waits for the other ranks where all is well, for the time-out at most; aborts while an exception unwinds.
    ~DeviceCommunicator();
    DeviceCommunicator(const DeviceCommunicator&) = delete;
    DeviceCommunicator& operator=(const DeviceCommunicator&) = delete;

    int rank() const { return rank_; }
    int size() const { return size_; }
    int device() const { return device_; }                      ///< index among the devices that this rank sees
    const std::string& description() const { return description_; } ///< library, GPU and host, for the log

    void* stream(DevicePurpose purpose) const; ///< cudaStream_t
    /// Later operations of @p purpose start after what is on @p compute_stream now.
    void wait_for_compute(DevicePurpose purpose, void* compute_stream);
    /// What is put on @p compute_stream from now on starts after the operations of @p purpose so far.
    void compute_waits_for(void* compute_stream, DevicePurpose purpose);

    /// shard = sum over ranks, in rank order, of full[offsets[rank], offsets[rank+1]), added in fp32. Offsets as in
    /// Communicator::reduce_scatter_sum. @p full is bf16 or f32. With Options::concurrent only for purpose `gradients`.
    void reduce_scatter_sum(DevicePurpose purpose, const void* full, DeviceElement element, std::span<const std::size_t> offsets,
                            float* shard, const DeviceOrderedSum& sum, std::string_view label);
    /// shard [count] = NCCL's sum of the ranks' full[rank * count, (rank+1) * count), in the elements' type.
    void reduce_scatter_sum_unordered(DevicePurpose purpose, const void* full, void* shard, std::size_t count,
                                      DeviceElement element, std::string_view label);
    /// In place; NCCL's sum.
    void all_reduce_sum_unordered(DevicePurpose purpose, void* data, std::size_t count, DeviceElement element,
                                  std::string_view label);
    /// full[offsets[r], offsets[r+1]) = rank r's shard, which may be the rank's own part of full.
    void all_gather_shards(DevicePurpose purpose, const void* shard, std::span<const std::size_t> offsets, void* full,
                           DeviceElement element, std::string_view label);
    void broadcast(DevicePurpose purpose, void* data, std::size_t count, DeviceElement element, int root, std::string_view label);

    struct Outgoing {
        int rank;
        const void* data;
        std::size_t bytes;
    };
    struct Incoming {
        int rank;
        void* data;
        std::size_t bytes;
    };
    /// Messages that both partners list with the same size, in the same order per pair and direction; none to itself. Called
    /// by all ranks, also those without messages.
    void exchange(DevicePurpose purpose, std::span<const Outgoing> outgoing, std::span<const Incoming> incoming,
                  std::string_view label);

    /// Returns when the operations of @p purpose on all ranks have reached it. The host waits.
    void barrier(DevicePurpose purpose, std::string_view label);
    /// Returns when all operations of @p purpose are done on this rank's device. @throws Error internal (above).
    void wait(DevicePurpose purpose);

  private:
    struct Pending {
        std::string label;
        void* event;
    };
    struct Channel {
        std::deque<Pending> pending; ///< oldest first
        void* last_event = nullptr;  ///< of the newest operation queued
    };

    std::array<std::vector<std::byte>, 2> prepare(Communicator& ranks);
    void connect(DevicePurpose purpose, const std::vector<std::byte>& id);
    void close() noexcept;
    void release() noexcept;
    void launch(DevicePurpose purpose, std::string_view label, const std::function<void()>& operation);
    void wait_until_ready(DevicePurpose purpose, std::string_view label);
    bool forget_finished(Channel& channel, std::string_view label);
    void* take_event();
    [[noreturn]] void fail(std::string_view label, const std::string& reason);
    Channel& channel(DevicePurpose purpose) { return channels_[static_cast<std::size_t>(purpose)]; }

    Options options_;
    std::unique_ptr<comm::DeviceBackend> backend_;
    int rank_;
    int size_;
    int device_ = 0;
    int exceptions_at_start_;
    std::string description_;
    std::string broken_; ///< message of the first failure
    std::array<Channel, 2> channels_;
    std::vector<void*> events_;       ///< all of them
    std::vector<void*> idle_events_;  ///< those that no pending operation holds
    void* compute_event_ = nullptr;
    void* scratch_ = nullptr;
};

/**
 * @brief GPUs for the ranks of @p ranks: local rank (of the ranks that share memory) modulo the devices that the rank sees,
 * made current; then NCCL between them, its id broadcast over @p ranks. Call it before the engine is used. Collective.
 * @throws Error configuration on all ranks when the build has no NCCL, a rank sees no device, or two ranks would share one.
 */
std::unique_ptr<DeviceCommunicator> make_device_communicator(Communicator& ranks, const DeviceCommunicator::Options& options);

} // namespace selm
