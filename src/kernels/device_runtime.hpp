#pragma once

#include <cstddef>
#include <string>

#include "selm/kernels/tensor.hpp"

namespace selm {

/**
 * @brief Memory, streams, events and copies of a device. Streams and events are opaque handles; on the CPU they are null
 * and everything is done when a call returns. @throws Error internal with the runtime's reason.
 */
class DeviceRuntime {
  public:
    virtual ~DeviceRuntime() = default;

    virtual std::string problem() const = 0; ///< why the device cannot be used; empty when it can
    virtual void* allocate(std::size_t bytes) = 0;
    virtual void free(void* memory) noexcept = 0;
    virtual void* allocate_pinned(std::size_t bytes) = 0;
    virtual void free_pinned(void* memory) noexcept = 0;

    virtual void* create_stream() = 0; ///< one that does not wait for the default stream
    virtual void destroy_stream(void* stream) noexcept = 0;
    virtual void* create_event() = 0;
    virtual void destroy_event(void* event) noexcept = 0;
    virtual void record(void* event, void* stream) = 0;
    virtual void wait_on_device(void* stream, void* event) = 0; ///< later work of the stream waits
    virtual void wait_on_host(void* event) = 0;                 ///< returns at once for an event never recorded
    virtual void finish(void* stream) = 0;                      ///< waits for all work of the stream
    virtual void copy_to_host(void* host, const void* device, std::size_t bytes, void* stream) = 0;
    virtual void copy_to_device(void* device, const void* host, std::size_t bytes, void* stream) = 0;
};

/// @throws Error configuration when the device cannot be used here.
DeviceRuntime& device_runtime(Device device);

#ifdef SELM_ENABLE_CUDA
DeviceRuntime& cuda_device_runtime(); ///< usable or not
#endif

} // namespace selm
