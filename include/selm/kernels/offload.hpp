#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "selm/kernels/device_kernels.hpp"
#include "selm/kernels/device_memory.hpp"

// `--offload optimizer`: the device holds compute weights, gradients and activations; the host holds the fp32 master
// weights and both moments of the rank's shard, 12 bytes a parameter that the device then need not have. A training step of
// the loop on CUDA is
//
//   1. forward and backward passes on the compute stream; gradients are reduced to shards (DeviceCommunicator, purpose
//      `gradients`), the compute stream waits for them on the device;
//   2. sum_of_squares of the gradient shard on the device, all-reduced: the norm, the scale of clipping, or a refused step;
//   3. OffloadPipeline::run over the shard: chunk by chunk the gradient comes down on one stream, AdamW runs on the host
//      (adamw_step with Device::cpu, which writes the new weights in the compute dtype), the weights go up on a second
//      stream. While the host works on chunk k, chunk k+1 comes down and chunk k-1 goes up;
//   4. the weights' shards are gathered (purpose `parameters`) after the compute stream, which waits for the last upload.
//
// Master weights and moments never cross the bus and need no pinned memory; what crosses it does, in two buffers per
// direction of a chunk's length. Saving and loading go through upload() and download().
namespace selm {

class DeviceRuntime;

/**
 * @brief Chunked, double-buffered copies between a device and the host, on two streams of their own.
 *
 * With Device::cpu "device" memory is host memory and the copies are plain ones: the same steps in the same order.
 * One thread at a time. @throws Error configuration when the device cannot be used, Error internal when a copy fails.
 */
class OffloadPipeline {
  public:
    /// @param chunk_elements elements of a chunk (>= 1); pinned memory is 16 bytes times that.
    OffloadPipeline(Device device, std::int64_t chunk_elements);
    /// On another runtime than the device's own: tests have one whose streams are threads.
    OffloadPipeline(DeviceRuntime& runtime, Device device, std::int64_t chunk_elements);
    ~OffloadPipeline(); ///< waits for the copies
    OffloadPipeline(const OffloadPipeline&) = delete;
    OffloadPipeline& operator=(const OffloadPipeline&) = delete;

    /// Updates elements [begin, begin + gradient.size()) of the shard: reads the gradient, fills compute (new weights, of
    /// run's dtype). Runs on the calling thread; the spans are valid during the call only.
    using Step = std::function<void(std::int64_t begin, std::span<const float> gradient, std::span<std::byte> compute)>;

    /**
     * @brief Calls @p step for each chunk in order. Starts after what is on @p compute_stream now; what is put on it later
     * waits for the uploads (on the device: the host does not). An exception of @p step leaves through run() with the
     * chunks before it uploaded.
     * @param gradient device, f32 [count] @param compute device, [count] of @p dtype
     */
    void run(const float* gradient, void* compute, DType dtype, std::int64_t count, void* compute_stream, const Step& step);

    /// device = host, done on return; starts after @p compute_stream. The host's memory need not be pinned.
    void upload(const void* host, void* device, std::size_t bytes, void* compute_stream);
    /// host = device, done on return; starts after @p compute_stream.
    void download(const void* device, void* host, std::size_t bytes, void* compute_stream);

    std::int64_t chunk_elements() const { return chunk_elements_; }
    std::size_t pinned_bytes() const;

  private:
    struct Queue;
    void start_after(void* compute_stream);

    std::int64_t chunk_elements_;
    std::array<PinnedBuffer, 2> down_buffers_, up_buffers_; ///< before the queue, which waits for copies when it goes
    std::unique_ptr<Queue> queue_;
};

} // namespace selm
