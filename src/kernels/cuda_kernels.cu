#include <algorithm>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "cuda_launch.hpp"

namespace selm::cuda {
namespace {

constexpr int threads_per_block = 256;
/// Enough to fill any GPU; longer arrays are walked in strides, so that indices are 64-bit and grids are small.
constexpr std::int64_t most_blocks = 4096;

unsigned blocks_for(std::int64_t items)
{
    return static_cast<unsigned>(std::min(most_blocks, (items + threads_per_block - 1) / threads_per_block));
}

__device__ std::int64_t first_item()
{
    return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ std::int64_t item_stride()
{
    return static_cast<std::int64_t>(gridDim.x) * blockDim.x;
}

const char* launch_status()
{
    const cudaError_t status = cudaGetLastError();
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

enum class Output { f32, f32_rounded, bf16 };

template<Output output>
__global__ void adamw(AdamWFactors factors, const float* gradient, float* master, float* exp_avg, float* exp_avg_sq,
                      void* compute, std::int64_t count)
{
    for (std::int64_t i = first_item(); i < count; i += item_stride()) {
        float m = exp_avg[i], v = exp_avg_sq[i];
        const float w = adamw_element(factors, gradient[i], master[i], m, v);
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        master[i] = w;
        if (output == Output::bf16)
            static_cast<std::uint16_t*>(compute)[i] = bf16_of(w);
        else
            static_cast<float*>(compute)[i] = output == Output::f32_rounded ? float_of_bf16(bf16_of(w)) : w;
    }
}

/// One thread per lane of a block of sum_block_elements: eight neighbouring threads read 32 neighbouring bytes. The lanes of
/// a block are then added in order, as on the host.
__global__ void squares_by_block(const float* values, std::int64_t count, double* sums)
{
    const std::int64_t blocks = (count + sum_block_elements - 1) / sum_block_elements;
    const int lane = static_cast<int>(threadIdx.x % sum_lanes);
    // Threads of a warp stay together: all of them run the same number of rounds.
    const std::int64_t rounds = (blocks * sum_lanes + item_stride() - 1) / item_stride();
    for (std::int64_t round = 0; round < rounds; ++round) {
        const std::int64_t block = (first_item() + round * item_stride()) / sum_lanes;
        const std::int64_t begin = block * sum_block_elements;
        const std::int64_t end = min(begin + sum_block_elements, count);
        double partial = 0;
        for (std::int64_t i = begin + lane; i < end; i += sum_lanes)
            partial += static_cast<double>(values[i]) * static_cast<double>(values[i]);
        double sum = 0;
        for (int from = 0; from < sum_lanes; ++from)
            sum += __shfl_sync(0xffffffffu, partial, from, static_cast<int>(sum_lanes));
        if (lane == 0 && block < blocks)
            sums[block] = sum;
    }
}

/// One block of threads fetches, its first thread adds: the order is that of the array.
__global__ void add_in_order(const double* values, std::int64_t count, double* sum)
{
    __shared__ double piece[threads_per_block];
    double total = 0;
    for (std::int64_t begin = 0; begin < count; begin += threads_per_block) {
        const std::int64_t i = begin + threadIdx.x;
        piece[threadIdx.x] = i < count ? values[i] : 0.0;
        __syncthreads();
        if (threadIdx.x == 0) {
            const int here = static_cast<int>(min(static_cast<std::int64_t>(threads_per_block), count - begin));
            for (int j = 0; j < here; ++j)
                total += piece[j];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0)
        *sum = total;
}

__global__ void f32_to_bf16(const float* from, std::uint16_t* to, std::int64_t count)
{
    for (std::int64_t i = first_item(); i < count; i += item_stride())
        to[i] = bf16_of(from[i]);
}

__global__ void bf16_to_f32(const std::uint16_t* from, float* to, std::int64_t count)
{
    for (std::int64_t i = first_item(); i < count; i += item_stride())
        to[i] = float_of_bf16(from[i]);
}

__device__ float as_float(float value)
{
    return value;
}

__device__ float as_float(std::uint16_t value)
{
    return float_of_bf16(value);
}

template<typename T>
__global__ void sum_parts(const T* parts, std::int64_t number_of_parts, std::int64_t count, float* sum)
{
    for (std::int64_t i = first_item(); i < count; i += item_stride()) {
        float value = as_float(parts[i]);
        for (std::int64_t part = 1; part < number_of_parts; ++part)
            value += as_float(parts[part * count + i]);
        sum[i] = value;
    }
}

cudaStream_t stream_of(void* stream)
{
    return static_cast<cudaStream_t>(stream);
}

} // namespace

const char* launch_adamw(const AdamWFactors& factors, bool round_bf16, const float* gradient, float* master, float* exp_avg,
                         float* exp_avg_sq, void* compute, bool compute_is_bf16, std::int64_t count, void* stream)
{
    const auto kernel = compute_is_bf16 ? adamw<Output::bf16> : round_bf16 ? adamw<Output::f32_rounded> : adamw<Output::f32>;
    kernel<<<blocks_for(count), threads_per_block, 0, stream_of(stream)>>>(factors, gradient, master, exp_avg, exp_avg_sq,
                                                                          compute, count);
    return launch_status();
}

const char* launch_sum_of_squares(const float* values, std::int64_t count, double* scratch, double* sum, void* stream)
{
    const std::int64_t blocks = (count + sum_block_elements - 1) / sum_block_elements;
    if (blocks > 0)
        squares_by_block<<<blocks_for(blocks * sum_lanes), threads_per_block, 0, stream_of(stream)>>>(values, count, scratch);
    add_in_order<<<1, threads_per_block, 0, stream_of(stream)>>>(scratch, blocks, sum);
    return launch_status();
}

const char* launch_f32_to_bf16(const float* from, std::uint16_t* to, std::int64_t count, void* stream)
{
    f32_to_bf16<<<blocks_for(count), threads_per_block, 0, stream_of(stream)>>>(from, to, count);
    return launch_status();
}

const char* launch_bf16_to_f32(const std::uint16_t* from, float* to, std::int64_t count, void* stream)
{
    bf16_to_f32<<<blocks_for(count), threads_per_block, 0, stream_of(stream)>>>(from, to, count);
    return launch_status();
}

const char* launch_ordered_sum(const void* parts, bool parts_are_bf16, std::int64_t number_of_parts, std::int64_t count,
                               float* sum, void* stream)
{
    const unsigned blocks = blocks_for(count);
    if (parts_are_bf16)
        sum_parts<<<blocks, threads_per_block, 0, stream_of(stream)>>>(static_cast<const std::uint16_t*>(parts),
                                                                       number_of_parts, count, sum);
    else
        sum_parts<<<blocks, threads_per_block, 0, stream_of(stream)>>>(static_cast<const float*>(parts), number_of_parts,
                                                                       count, sum);
    return launch_status();
}

} // namespace selm::cuda
