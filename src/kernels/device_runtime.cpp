#include "device_runtime.hpp"

#include <cstring>
#include <new>

#include "selm/base/error.hpp"
#include "selm/kernels/device_memory.hpp"

namespace selm {
namespace {

constexpr std::align_val_t alignment{256};

class HostRuntime final : public DeviceRuntime {
  public:
    std::string problem() const override { return {}; }
    void* allocate(std::size_t bytes) override { return ::operator new(bytes, alignment); }
    void free(void* memory) noexcept override { ::operator delete(memory, alignment); }
    void* allocate_pinned(std::size_t bytes) override { return allocate(bytes); }
    void free_pinned(void* memory) noexcept override { free(memory); }
    void* create_stream() override { return nullptr; }
    void destroy_stream(void*) noexcept override {}
    void* create_event() override { return nullptr; }
    void destroy_event(void*) noexcept override {}
    void record(void*, void*) override {}
    void wait_on_device(void*, void*) override {}
    void wait_on_host(void*) override {}
    void finish(void*) override {}
    void copy_to_host(void* host, const void* device, std::size_t bytes, void*) override { copy(host, device, bytes); }
    void copy_to_device(void* device, const void* host, std::size_t bytes, void*) override { copy(device, host, bytes); }

  private:
    static void copy(void* to, const void* from, std::size_t bytes)
    {
        if (bytes > 0)
            std::memcpy(to, from, bytes);
    }
};

} // namespace

std::string device_problem(Device device)
{
    if (device == Device::cpu)
        return {};
#ifdef SELM_ENABLE_CUDA
    return cuda_device_runtime().problem();
#else
    return "this build has no CUDA device path (SELM_ENABLE_CUDA is off). Build the preset \"cuda\"";
#endif
}

DeviceRuntime& device_runtime(Device device)
{
    static HostRuntime host;
    if (device == Device::cpu)
        return host;
    const std::string problem = device_problem(device);
    if (!problem.empty())
        throw config_error(problem);
#ifdef SELM_ENABLE_CUDA
    return cuda_device_runtime();
#else
    throw config_error("no CUDA in this build"); // not reached: device_problem has said so
#endif
}

DeviceBuffer::DeviceBuffer(Device device, std::size_t bytes) : device_(device), bytes_(bytes)
{
    DeviceRuntime& runtime = device_runtime(device);
    if (bytes > 0)
        data_ = {runtime.allocate(bytes), [&runtime](void* memory) { runtime.free(memory); }};
}

void DeviceBuffer::copy_from_host(const void* host, std::size_t bytes)
{
    SELM_EXPECT(bytes <= bytes_);
    DeviceRuntime& runtime = device_runtime(device_);
    runtime.copy_to_device(data_.get(), host, bytes, nullptr);
    runtime.finish(nullptr);
}

void DeviceBuffer::copy_to_host(void* host, std::size_t bytes) const
{
    SELM_EXPECT(bytes <= bytes_);
    DeviceRuntime& runtime = device_runtime(device_);
    runtime.copy_to_host(host, data_.get(), bytes, nullptr);
    runtime.finish(nullptr);
}

PinnedBuffer::PinnedBuffer(Device device, std::size_t bytes) : bytes_(bytes)
{
    DeviceRuntime& runtime = device_runtime(device);
    if (bytes > 0)
        data_ = {runtime.allocate_pinned(bytes), [&runtime](void* memory) { runtime.free_pinned(memory); }};
}

} // namespace selm
