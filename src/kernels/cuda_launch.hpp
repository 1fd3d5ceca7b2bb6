#pragma once

#include <cstdint>

#include "scalar_functions.hpp"

// Launches of the kernels in cuda_kernels.cu, which nvcc compiles as C++17. Each returns null, or CUDA's reason why the
// launch failed. `stream` is a cudaStream_t.
namespace selm::cuda {

const char* launch_adamw(const AdamWFactors& factors, bool round_bf16, const float* gradient, float* master, float* exp_avg,
                         float* exp_avg_sq, void* compute, bool compute_is_bf16, std::int64_t count, void* stream);
const char* launch_sum_of_squares(const float* values, std::int64_t count, double* scratch, double* sum, void* stream);
const char* launch_f32_to_bf16(const float* from, std::uint16_t* to, std::int64_t count, void* stream);
const char* launch_bf16_to_f32(const std::uint16_t* from, float* to, std::int64_t count, void* stream);
const char* launch_ordered_sum(const void* parts, bool parts_are_bf16, std::int64_t number_of_parts, std::int64_t count,
                               float* sum, void* stream);

/// One layer's matrices for cached attention of single tokens (cuda_cached_attention.cuh has the layouts). All of them are f32, or
/// all bf16.
struct CachedCall {
    bool is_bf16;
    std::int64_t heads, kv_heads, head_dim;
    float scale;
    const std::int32_t *row, *slot, *position;
    std::int64_t count;
    const void* qkv;
    std::int64_t stride;
    void *keys, *values;
    std::int64_t capacity;
};
/// Splits of a sequence of `length` tokens.
std::int64_t cached_splits(std::int64_t length);
/// Floats of `partial` for launch_cached_attention.
std::int64_t cached_partial_elements(const CachedCall& call, std::int64_t splits);

const char* launch_append_to_cache(const CachedCall& call, void* stream);
/// @param splits at least those of the longest sequence.
const char* launch_cached_attention(const CachedCall& call, std::int64_t splits, float* partial, void* out, std::int64_t out_stride,
                                    void* stream);

} // namespace selm::cuda
