#include "selm/kernels/offload.hpp"

#include <algorithm>
#include <cstring>

#include "device_runtime.hpp"
#include "selm/base/error.hpp"

namespace selm {

/// The two streams and their events. Waits for everything that is under way when it goes.
struct OffloadPipeline::Queue {
    explicit Queue(DeviceRuntime& device) : runtime(device)
    {
        try {
            down = runtime.create_stream();
            up = runtime.create_stream();
            for (void** event : events())
                *event = runtime.create_event();
        } catch (...) {
            release();
            throw;
        }
    }
    ~Queue()
    {
        for (void* stream : {down, up}) {
            try {
                if (stream != nullptr)
                    runtime.finish(stream);
            } catch (const Error&) { // the device is lost: its memory goes with the process
            }
        }
        release();
    }
    Queue(const Queue&) = delete;
    Queue& operator=(const Queue&) = delete;

    std::array<void**, 5> events() { return {&started, &downloaded[0], &downloaded[1], &uploaded[0], &uploaded[1]}; }
    void release() noexcept
    {
        for (void** event : events())
            if (*event != nullptr)
                runtime.destroy_event(*event);
        for (void* stream : {down, up})
            if (stream != nullptr)
                runtime.destroy_stream(stream);
    }

    DeviceRuntime& runtime;
    void* down = nullptr;
    void* up = nullptr;
    void* started = nullptr;
    std::array<void*, 2> downloaded{}, uploaded{};
};

OffloadPipeline::OffloadPipeline(Device device, std::int64_t chunk_elements)
    : OffloadPipeline(device_runtime(device), device, chunk_elements)
{
}

OffloadPipeline::OffloadPipeline(DeviceRuntime& runtime, Device device, std::int64_t chunk_elements)
    : chunk_elements_(chunk_elements)
{
    SELM_EXPECT(chunk_elements >= 1);
    const std::size_t bytes = static_cast<std::size_t>(chunk_elements) * sizeof(float);
    for (PinnedBuffer& buffer : down_buffers_)
        buffer = PinnedBuffer(device, bytes);
    for (PinnedBuffer& buffer : up_buffers_)
        buffer = PinnedBuffer(device, bytes);
    queue_ = std::make_unique<Queue>(runtime);
}

OffloadPipeline::~OffloadPipeline() = default;

std::size_t OffloadPipeline::pinned_bytes() const
{
    return 4 * down_buffers_[0].bytes();
}

void OffloadPipeline::start_after(void* compute_stream)
{
    DeviceRuntime& runtime = queue_->runtime;
    runtime.record(queue_->started, compute_stream);
    runtime.wait_on_device(queue_->down, queue_->started);
    runtime.wait_on_device(queue_->up, queue_->started); // the passes may still read the weights that will be overwritten
}

void OffloadPipeline::run(const float* gradient, void* compute, DType dtype, std::int64_t count, void* compute_stream,
                          const Step& step)
{
    SELM_EXPECT(count >= 0);
    Queue& q = *queue_;
    DeviceRuntime& runtime = q.runtime;
    const std::int64_t chunks = (count + chunk_elements_ - 1) / chunk_elements_;
    const auto length = [&](std::int64_t chunk) {
        return static_cast<std::size_t>(std::min(chunk_elements_, count - chunk * chunk_elements_));
    };
    const auto start_download = [&](std::int64_t chunk) {
        const auto slot = static_cast<std::size_t>(chunk % 2);
        runtime.copy_to_host(down_buffers_[slot].data(), gradient + chunk * chunk_elements_, length(chunk) * sizeof(float),
                             q.down);
        runtime.record(q.downloaded[slot], q.down);
    };
    start_after(compute_stream);
    if (chunks > 0)
        start_download(0);
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        const auto slot = static_cast<std::size_t>(chunk % 2);
        if (chunk + 1 < chunks)
            start_download(chunk + 1); // the other buffer's gradient was used up by the step before
        runtime.wait_on_host(q.downloaded[slot]);
        runtime.wait_on_host(q.uploaded[slot]); // of two chunks ago, or of an earlier call
        const std::int64_t begin = chunk * chunk_elements_;
        const std::size_t bytes = length(chunk) * size_of(dtype);
        step(begin, {reinterpret_cast<const float*>(down_buffers_[slot].data()), length(chunk)},
             {up_buffers_[slot].data(), bytes});
        runtime.copy_to_device(static_cast<std::byte*>(compute) + static_cast<std::size_t>(begin) * size_of(dtype),
                               up_buffers_[slot].data(), bytes, q.up);
        runtime.record(q.uploaded[slot], q.up);
    }
    runtime.wait_on_device(compute_stream, q.uploaded[0]);
    runtime.wait_on_device(compute_stream, q.uploaded[1]);
}

void OffloadPipeline::upload(const void* host, void* device, std::size_t bytes, void* compute_stream)
{
    Queue& q = *queue_;
    start_after(compute_stream);
    const std::size_t piece = up_buffers_[0].bytes();
    std::size_t slot = 0;
    for (std::size_t done = 0; done < bytes; done += piece, slot = 1 - slot) {
        const std::size_t now = std::min(piece, bytes - done);
        q.runtime.wait_on_host(q.uploaded[slot]);
        std::memcpy(up_buffers_[slot].data(), static_cast<const std::byte*>(host) + done, now);
        q.runtime.copy_to_device(static_cast<std::byte*>(device) + done, up_buffers_[slot].data(), now, q.up);
        q.runtime.record(q.uploaded[slot], q.up);
    }
    q.runtime.finish(q.up);
}

void OffloadPipeline::download(const void* device, void* host, std::size_t bytes, void* compute_stream)
{
    Queue& q = *queue_;
    start_after(compute_stream);
    const std::size_t piece = down_buffers_[0].bytes();
    const auto start = [&](std::size_t begin, std::size_t slot) {
        q.runtime.copy_to_host(down_buffers_[slot].data(), static_cast<const std::byte*>(device) + begin,
                               std::min(piece, bytes - begin), q.down);
        q.runtime.record(q.downloaded[slot], q.down);
    };
    if (bytes > 0)
        start(0, 0);
    std::size_t slot = 0;
    for (std::size_t done = 0; done < bytes; done += piece, slot = 1 - slot) {
        if (done + piece < bytes)
            start(done + piece, 1 - slot);
        q.runtime.wait_on_host(q.downloaded[slot]);
        std::memcpy(static_cast<std::byte*>(host) + done, down_buffers_[slot].data(), std::min(piece, bytes - done));
    }
}

} // namespace selm
