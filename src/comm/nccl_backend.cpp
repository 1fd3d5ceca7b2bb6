#include <array>
#include <cstring>
#include <fstream>
#include <string>

#include <cuda_runtime_api.h>
#include <nccl.h>

#include "device_backend.hpp"
#include "selm/base/error.hpp"
#include "selm/base/provenance.hpp"

namespace selm::comm {
namespace {

void check_cuda(cudaError_t status, const char* action)
{
    if (status == cudaSuccess)
        return;
    cudaGetLastError(); // it must not show up in the next call's check
    throw internal_error(cat("CUDA cannot ", action, " (", cudaGetErrorString(status), ")"));
}

std::string reason_of(ncclResult_t result, ncclComm_t communicator)
{
    const char* const detail = ncclGetLastError(communicator);
    return detail != nullptr && *detail != '\0' ? cat(ncclGetErrorString(result), "; ", detail) : ncclGetErrorString(result);
}

/// A non-blocking communicator's call may be in progress: that is no error, state() says when it is over.
void check_nccl(ncclResult_t result, const char* call, ncclComm_t communicator)
{
    if (result != ncclSuccess && result != ncclInProgress)
        throw internal_error(cat(call, " failed (", reason_of(result, communicator), ")"));
}

ncclDataType_t type_of(DeviceElement element)
{
    return element == DeviceElement::f32 ? ncclFloat32 : ncclBfloat16;
}

cudaStream_t stream_of(void* stream)
{
    return static_cast<cudaStream_t>(stream);
}

cudaEvent_t event_of(void* event)
{
    return static_cast<cudaEvent_t>(event);
}

/// Processes of one kernel see the same one, whatever container they are in.
std::string machine_identity()
{
    std::ifstream file("/proc/sys/kernel/random/boot_id");
    std::string text;
    return std::getline(file, text) && !text.empty() ? text : host_name();
}

class NcclBackend final : public DeviceBackend {
  public:
    ~NcclBackend() override
    {
        for (Line& line : lines_) {
            abort_line(line);
            if (line.stream != nullptr)
                cudaStreamDestroy(line.stream);
        }
    }

    std::string version() const override
    {
        int code = 0; // MAJOR * 10000 + MINOR * 100 + PATCH since 2.9
        check_nccl(ncclGetVersion(&code), "ncclGetVersion", nullptr);
        return cat("NCCL ", code / 10000, ".", code / 100 % 100, ".", code % 100);
    }

    int visible_devices() override
    {
        int devices = 0;
        const cudaError_t status = cudaGetDeviceCount(&devices);
        if (status == cudaSuccess && devices > 0)
            return devices;
        cudaGetLastError();
        throw config_error(cat("no CUDA device is visible (",
                               status == cudaSuccess ? "CUDA counts none" : cudaGetErrorString(status),
                               "). Run on a node with a GPU and its driver, or pass --device cpu"));
    }

    DevicePlace use_device(int index) override
    {
        check_cuda(cudaSetDevice(index), "use a device");
        char bus[32] = {};
        check_cuda(cudaDeviceGetPCIBusId(bus, sizeof bus, index), "read a device's bus number");
        cudaDeviceProp properties{};
        check_cuda(cudaGetDeviceProperties(&properties, index), "read a device's name");
        int least = 0, greatest = 0; // collectives go before the computation that waits for them
        check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "read the priorities of streams");
        for (Line& line : lines_)
            check_cuda(cudaStreamCreateWithPriority(&line.stream, cudaStreamNonBlocking, greatest), "create a stream");
        return {host_name(), machine_identity(), bus, properties.name};
    }

    std::vector<std::byte> unique_id() override
    {
        ncclUniqueId id;
        check_nccl(ncclGetUniqueId(&id), "ncclGetUniqueId", nullptr);
        const auto* const bytes = reinterpret_cast<const std::byte*>(&id);
        return {bytes, bytes + sizeof id};
    }

    void start_connect(DevicePurpose purpose, const std::vector<std::byte>& id, int rank, int size) override
    {
        ncclUniqueId unique;
        SELM_EXPECT(id.size() == sizeof unique);
        std::memcpy(&unique, id.data(), sizeof unique);
        ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
        config.blocking = 0;
        Line& own = line(purpose);
        check_nccl(ncclCommInitRankConfig(&own.communicator, size, unique, rank, &config), "ncclCommInitRankConfig",
                   own.communicator);
    }

    State state(DevicePurpose purpose) override
    {
        const ncclComm_t communicator = line(purpose).communicator;
        ncclResult_t asynchronous = ncclSuccess;
        const ncclResult_t result = ncclCommGetAsyncError(communicator, &asynchronous);
        if (result != ncclSuccess)
            return {Progress::failed, cat("ncclCommGetAsyncError: ", reason_of(result, communicator))};
        if (asynchronous == ncclSuccess)
            return {Progress::ready, {}};
        if (asynchronous == ncclInProgress)
            return {Progress::in_progress, {}};
        return {Progress::failed, cat("NCCL: ", reason_of(asynchronous, communicator))};
    }

    void start_close(DevicePurpose purpose) override
    {
        const ncclComm_t communicator = line(purpose).communicator;
        check_nccl(ncclCommFinalize(communicator), "ncclCommFinalize", communicator);
    }

    void finish_close(DevicePurpose purpose) override
    {
        Line& own = line(purpose);
        const ncclResult_t result = ncclCommDestroy(own.communicator);
        own.communicator = nullptr;
        check_nccl(result, "ncclCommDestroy", nullptr);
    }

    void abort(DevicePurpose purpose) noexcept override { abort_line(line(purpose)); }

    void* stream(DevicePurpose purpose) override { return line(purpose).stream; }
    void* create_event() override
    {
        cudaEvent_t event = nullptr;
        check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "create an event");
        return event;
    }
    void destroy_event(void* event) noexcept override { cudaEventDestroy(event_of(event)); }
    void record(void* event, void* stream) override
    {
        check_cuda(cudaEventRecord(event_of(event), stream_of(stream)), "record an event");
    }
    bool is_done(void* event) override
    {
        const cudaError_t status = cudaEventQuery(event_of(event));
        if (status == cudaErrorNotReady) {
            cudaGetLastError(); // it is remembered as the last error, although it is none
            return false;
        }
        check_cuda(status, "finish work on the device");
        return true;
    }
    void stream_waits(void* stream, void* event) override
    {
        check_cuda(cudaStreamWaitEvent(stream_of(stream), event_of(event), 0), "let a stream wait");
    }
    void* allocate(std::size_t bytes) override
    {
        void* memory = nullptr;
        check_cuda(cudaMalloc(&memory, bytes), "allocate memory for collectives");
        return memory;
    }
    void free(void* memory) noexcept override { cudaFree(memory); }
    void copy(DevicePurpose purpose, void* to, const void* from, std::size_t bytes) override
    {
        check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, line(purpose).stream), "copy on the device");
    }

    void all_reduce(DevicePurpose purpose, void* data, std::size_t count, DeviceElement element) override
    {
        const Line& own = line(purpose);
        check_nccl(ncclAllReduce(data, data, count, type_of(element), ncclSum, own.communicator, own.stream), "ncclAllReduce",
                   own.communicator);
    }
    void broadcast(DevicePurpose purpose, void* data, std::size_t count, DeviceElement element, int root) override
    {
        const Line& own = line(purpose);
        check_nccl(ncclBroadcast(data, data, count, type_of(element), root, own.communicator, own.stream), "ncclBroadcast",
                   own.communicator);
    }
    void all_gather(DevicePurpose purpose, const void* shard, void* full, std::size_t count, DeviceElement element) override
    {
        const Line& own = line(purpose);
        check_nccl(ncclAllGather(shard, full, count, type_of(element), own.communicator, own.stream), "ncclAllGather",
                   own.communicator);
    }
    void reduce_scatter(DevicePurpose purpose, const void* full, void* shard, std::size_t count, DeviceElement element) override
    {
        const Line& own = line(purpose);
        check_nccl(ncclReduceScatter(full, shard, count, type_of(element), ncclSum, own.communicator, own.stream),
                   "ncclReduceScatter", own.communicator);
    }
    void group(DevicePurpose purpose, const std::function<void()>& body) override
    {
        check_nccl(ncclGroupStart(), "ncclGroupStart", nullptr);
        try {
            body();
        } catch (...) {
            ncclGroupEnd(); // the calls so far are started; the communicator is aborted next
            throw;
        }
        check_nccl(ncclGroupEnd(), "ncclGroupEnd", line(purpose).communicator);
    }
    void send(DevicePurpose purpose, const void* data, std::size_t bytes, int destination) override
    {
        const Line& own = line(purpose);
        check_nccl(ncclSend(data, bytes, ncclUint8, destination, own.communicator, own.stream), "ncclSend", own.communicator);
    }
    void receive(DevicePurpose purpose, void* data, std::size_t bytes, int source) override
    {
        const Line& own = line(purpose);
        check_nccl(ncclRecv(data, bytes, ncclUint8, source, own.communicator, own.stream), "ncclRecv", own.communicator);
    }

  private:
    struct Line {
        ncclComm_t communicator = nullptr;
        cudaStream_t stream = nullptr;
    };

    static void abort_line(Line& line) noexcept
    {
        if (line.communicator != nullptr)
            ncclCommAbort(line.communicator);
        line.communicator = nullptr;
    }
    Line& line(DevicePurpose purpose) { return lines_[static_cast<std::size_t>(purpose)]; }

    std::array<Line, 2> lines_;
};

} // namespace

std::unique_ptr<DeviceBackend> make_nccl_backend()
{
    return std::make_unique<NcclBackend>();
}

} // namespace selm::comm
