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

} // namespace selm::cuda
