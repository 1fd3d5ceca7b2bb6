#include "cuda_cached_attention.cuh"

#include <cuda_runtime_api.h>

#include "cuda_launch.hpp"

namespace selm::cuda {
namespace {

template<typename T>
CachedArguments<T> arguments_of(const CachedCall& call)
{
    CachedArguments<T> a{};
    a.shape = {call.heads, call.kv_heads, call.head_dim, call.scale};
    a.rows = {call.row, call.slot, call.position, call.count};
    a.qkv = static_cast<const T*>(call.qkv);
    a.stride = call.stride;
    a.keys = static_cast<T*>(call.keys);
    a.values = static_cast<T*>(call.values);
    a.capacity = call.capacity;
    return a;
}

unsigned extent(std::int64_t value)
{
    return static_cast<unsigned>(value);
}

const char* launch_status()
{
    const cudaError_t status = cudaGetLastError();
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

template<typename T>
const char* append(const CachedCall& call, cudaStream_t stream)
{
    append_to_cache<T><<<extent(call.count), cached_threads, 0, stream>>>(arguments_of<T>(call));
    return launch_status();
}

template<typename T>
const char* attend(const CachedCall& call, std::int64_t splits, float* partial, void* out, std::int64_t out_stride,
                   cudaStream_t stream)
{
    CachedArguments<T> a = arguments_of<T>(call);
    a.splits = splits;
    a.partial = partial;
    a.out = static_cast<T*>(out);
    a.out_stride = out_stride;
    with_split_kernel<T>(a.shape, [&](void (*kernel)(CachedArguments<T>), std::int64_t head_blocks) {
        kernel<<<dim3(extent(call.count), extent(head_blocks), extent(splits)), cached_threads, 0, stream>>>(a);
    });
    if (const char* problem = launch_status())
        return problem;
    const std::int64_t threads = call.head_dim < cached_threads ? (call.head_dim + 31) / 32 * 32 : cached_threads;
    add_splits<T><<<dim3(extent(call.count), extent(call.heads)), extent(threads), 0, stream>>>(a);
    return launch_status();
}

} // namespace

std::int64_t cached_splits(std::int64_t length)
{
    return (length + keys_per_split - 1) / keys_per_split;
}

std::int64_t cached_partial_elements(const CachedCall& call, std::int64_t splits)
{
    return call.count * call.heads * splits * (call.head_dim + 2);
}

const char* launch_append_to_cache(const CachedCall& call, void* stream)
{
    if (call.count == 0)
        return nullptr;
    const auto on = static_cast<cudaStream_t>(stream);
    return call.is_bf16 ? append<std::uint16_t>(call, on) : append<float>(call, on);
}

const char* launch_cached_attention(const CachedCall& call, std::int64_t splits, float* partial, void* out, std::int64_t out_stride,
                                    void* stream)
{
    if (call.count == 0)
        return nullptr;
    const auto on = static_cast<cudaStream_t>(stream);
    return call.is_bf16 ? attend<std::uint16_t>(call, splits, partial, out, out_stride, on)
                        : attend<float>(call, splits, partial, out, out_stride, on);
}

} // namespace selm::cuda
