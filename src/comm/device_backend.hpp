#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "selm/comm/device_communicator.hpp"

namespace selm::comm {

/// Where a rank's GPU is. Two ranks with equal machine and bus share a GPU, whatever index each of them calls it by.
struct DevicePlace {
    std::string host;
    std::string machine; ///< equal for processes of one kernel, also in containers with host names of their own
    std::string bus;     ///< PCI domain, bus, device
    std::string name;    ///< of the model
};

/// @throws Error configuration that names ranks, GPU and host when two ranks share a GPU.
void check_one_rank_per_device(const std::vector<DevicePlace>& places);

/**
 * @brief What DeviceCommunicator needs of a GPU library, one call each: NCCL and CUDA (nccl_backend.cpp). Nothing here
 * waits for another rank; calls throw Error internal with the library's reason. Streams and events are opaque.
 */
class DeviceBackend {
  public:
    enum class Progress { ready, in_progress, failed };
    struct State {
        Progress progress = Progress::ready;
        std::string reason; ///< when failed
    };

    virtual ~DeviceBackend() = default;

    virtual std::string version() const = 0;
    virtual int visible_devices() = 0; ///< @throws Error configuration when there is none
    virtual DevicePlace use_device(int index) = 0;

    // One communicator per purpose. close() and abort() also end one that is not connected yet.
    virtual std::vector<std::byte> unique_id() = 0;
    virtual void start_connect(DevicePurpose purpose, const std::vector<std::byte>& id, int rank, int size) = 0;
    virtual State state(DevicePurpose purpose) = 0;
    virtual void start_close(DevicePurpose purpose) = 0; ///< then state(), then finish_close()
    virtual void finish_close(DevicePurpose purpose) = 0;
    virtual void abort(DevicePurpose purpose) noexcept = 0;

    virtual void* stream(DevicePurpose purpose) = 0;
    virtual void* create_event() = 0;
    virtual void destroy_event(void* event) noexcept = 0;
    virtual void record(void* event, void* stream) = 0;
    virtual bool is_done(void* event) = 0;
    virtual void stream_waits(void* stream, void* event) = 0;
    virtual void* allocate(std::size_t bytes) = 0;
    virtual void free(void* memory) noexcept = 0;
    virtual void copy(DevicePurpose purpose, void* to, const void* from, std::size_t bytes) = 0; ///< queued on the stream

    virtual void all_reduce(DevicePurpose purpose, void* data, std::size_t count, DeviceElement element) = 0;
    virtual void broadcast(DevicePurpose purpose, void* data, std::size_t count, DeviceElement element, int root) = 0;
    virtual void all_gather(DevicePurpose purpose, const void* shard, void* full, std::size_t count, DeviceElement element) = 0;
    virtual void reduce_scatter(DevicePurpose purpose, const void* full, void* shard, std::size_t count,
                                DeviceElement element) = 0;
    /// Calls of broadcast, send and receive within @p body become one operation.
    virtual void group(DevicePurpose purpose, const std::function<void()>& body) = 0;
    virtual void send(DevicePurpose purpose, const void* data, std::size_t bytes, int destination) = 0;
    virtual void receive(DevicePurpose purpose, void* data, std::size_t bytes, int source) = 0;
};

struct DeviceChoice {
    int index; ///< among the devices that this rank sees
    DevicePlace place;
};
/// The rank takes device (its rank on the node) modulo (devices that it sees), and makes it the current one. Collective.
/// @throws Error configuration on all ranks when a rank sees none, or two share one.
DeviceChoice choose_device(Communicator& ranks, DeviceBackend& backend);

#ifdef SELM_ENABLE_CUDA
std::unique_ptr<DeviceBackend> make_nccl_backend();
#endif

} // namespace selm::comm
