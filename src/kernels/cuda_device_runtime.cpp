#include <cuda_runtime_api.h>

#include "device_runtime.hpp"
#include "selm/base/error.hpp"

namespace selm {
namespace {

void check(cudaError_t status, const char* action)
{
    if (status == cudaSuccess)
        return;
    cudaGetLastError(); // it must not show up in the next kernel launch's check
    throw internal_error(cat("CUDA cannot ", action, " (", cudaGetErrorString(status), ")"));
}

cudaStream_t stream_of(void* stream)
{
    return static_cast<cudaStream_t>(stream);
}

cudaEvent_t event_of(void* event)
{
    return static_cast<cudaEvent_t>(event);
}

class CudaRuntime final : public DeviceRuntime {
  public:
    std::string problem() const override
    {
        int devices = 0;
        const cudaError_t status = cudaGetDeviceCount(&devices);
        if (status == cudaSuccess && devices > 0)
            return {};
        cudaGetLastError();
        return cat("no CUDA device is visible (", status == cudaSuccess ? "CUDA counts none" : cudaGetErrorString(status),
                   "). Run on a node with a GPU and its driver, or pass --device cpu");
    }

    void* allocate(std::size_t bytes) override
    {
        void* memory = nullptr;
        const cudaError_t status = cudaMalloc(&memory, bytes);
        if (status == cudaErrorMemoryAllocation) {
            cudaGetLastError();
            throw internal_error(cat("the device has no room for ", bytes, " bytes. Use more GPUs, a higher --zero stage, "
                                     "or --offload optimizer"));
        }
        check(status, "allocate memory");
        return memory;
    }
    void free(void* memory) noexcept override { cudaFree(memory); }

    void* allocate_pinned(std::size_t bytes) override
    {
        void* memory = nullptr;
        const cudaError_t status = cudaMallocHost(&memory, bytes);
        if (status == cudaErrorMemoryAllocation) {
            cudaGetLastError();
            throw internal_error(cat("the host gives no ", bytes, " bytes of page-locked memory (its limit is ulimit -l, or "
                                     "the memory is used up). Use smaller chunks or fewer ranks on a node"));
        }
        check(status, "allocate page-locked memory");
        return memory;
    }
    void free_pinned(void* memory) noexcept override { cudaFreeHost(memory); }

    void* create_stream() override
    {
        cudaStream_t stream = nullptr;
        check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "create a stream");
        return stream;
    }
    void destroy_stream(void* stream) noexcept override { cudaStreamDestroy(stream_of(stream)); }

    void* create_event() override
    {
        cudaEvent_t event = nullptr;
        check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "create an event");
        return event;
    }
    void destroy_event(void* event) noexcept override { cudaEventDestroy(event_of(event)); }

    void record(void* event, void* stream) override { check(cudaEventRecord(event_of(event), stream_of(stream)), "record an event"); }
    void wait_on_device(void* stream, void* event) override
    {
        check(cudaStreamWaitEvent(stream_of(stream), event_of(event), 0), "let a stream wait");
    }
    void wait_on_host(void* event) override { check(cudaEventSynchronize(event_of(event)), "finish work on the device"); }
    void finish(void* stream) override
    {
        // The null stream stands for the device: other streams do not wait for it, nor it for them.
        check(stream == nullptr ? cudaDeviceSynchronize() : cudaStreamSynchronize(stream_of(stream)), "finish work on the device");
    }

    void copy_to_host(void* host, const void* device, std::size_t bytes, void* stream) override
    {
        before_copy(stream);
        check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_of(stream)), "copy to the host");
    }
    void copy_to_device(void* device, const void* host, std::size_t bytes, void* stream) override
    {
        before_copy(stream);
        check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream_of(stream)), "copy to the device");
    }

  private:
    static void before_copy(void* stream)
    {
        if (stream == nullptr)
            check(cudaDeviceSynchronize(), "finish work on the device");
    }
};

} // namespace

DeviceRuntime& cuda_device_runtime()
{
    static CudaRuntime runtime;
    return runtime;
}

} // namespace selm
