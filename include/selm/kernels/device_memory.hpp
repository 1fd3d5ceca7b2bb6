#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <utility>

#include "selm/kernels/tensor.hpp"

namespace selm {

/// Why this process cannot use @p device ("no CUDA device is visible ..."); empty when it can.
std::string device_problem(Device device);

/**
 * @brief Uninitialised memory of one device, 256-byte aligned. Device::cuda: of the device that is current on creation.
 *
 * The copies are for set-up, checkpoints and tests: they wait for all work of the device before and until they are done
 * (offload.hpp has the ones that overlap). @throws Error configuration when the device cannot be used, Error internal when
 * its memory is used up.
 */
class DeviceBuffer {
  public:
    DeviceBuffer() = default;
    DeviceBuffer(Device device, std::size_t bytes);

    Device device() const { return device_; }
    std::size_t bytes() const { return bytes_; }
    void* data() const { return data_.get(); }
    template<typename T>
    T* as() const
    {
        return static_cast<T*>(data_.get());
    }
    void copy_from_host(const void* host, std::size_t bytes);
    void copy_to_host(void* host, std::size_t bytes) const;

  private:
    Device device_ = Device::cpu;
    std::size_t bytes_ = 0;
    std::shared_ptr<void> data_;
};

/// Host memory that a device reads and writes directly (page-locked for Device::cuda, plain for Device::cpu): only copies
/// to and from such memory run beside computation. Scarce: it cannot be swapped out.
class PinnedBuffer {
  public:
    PinnedBuffer() = default;
    PinnedBuffer(Device device, std::size_t bytes);

    std::size_t bytes() const { return bytes_; }
    std::byte* data() const { return static_cast<std::byte*>(data_.get()); }

  private:
    std::size_t bytes_ = 0;
    std::shared_ptr<void> data_;
};

} // namespace selm
