#pragma once

#include <cstdint>

#include "selm/kernels/engine.hpp"
#include "selm/kernels/tensor.hpp"

// What a sharded optimizer does to flat arrays, on the CPU or on a CUDA device. All pointers are to memory of the stream's
// device (device_memory.hpp). On CUDA the functions return once the work is queued on the stream; on the CPU once it is
// done. A count of 0 is fine. Counts may exceed 2^31.
// @throws Error configuration for Device::cuda in a build without CUDA, Error internal when a kernel cannot be launched.
namespace selm {

/// Where work goes: the CPU, or a stream (cudaStream_t; null is the default one) of the current CUDA device.
struct ComputeStream {
    Device device = Device::cpu;
    void* handle = nullptr;
};

/**
 * @brief adamw_step (engine.hpp) on raw arrays of @p count elements. @param compute receives the new weights as f32 or bf16.
 *
 * The CPU and the device run the same body. Their last bits differ where one compiler fuses a multiplication with an
 * addition and the other does not; each alone gives the same bits for an element wherever it stands. AdamWOptions::round_bf16
 * applies to f32 compute weights.
 */
void adamw_step(const ComputeStream& stream, const AdamWOptions& options, const float* gradient, float* master, float* exp_avg,
                float* exp_avg_sq, void* compute, DType compute_dtype, std::int64_t count);

/// f64 elements of scratch memory that sum_of_squares needs.
std::int64_t sum_of_squares_scratch(std::int64_t count);
/// *sum (f64) = sum of squares in double, added in one fixed order: the same bits on the CPU and on every device.
void sum_of_squares(const ComputeStream& stream, const float* values, std::int64_t count, double* scratch, double* sum);

/// Round to nearest even, NaN kept.
void convert_f32_to_bf16(const ComputeStream& stream, const float* from, std::uint16_t* to, std::int64_t count);
void convert_bf16_to_f32(const ComputeStream& stream, const std::uint16_t* from, float* to, std::int64_t count);

/**
 * @brief sum[i] = parts[0][i] + parts[1][i] + ... in that order, in f32, parts[r] = parts + r * count elements of dtype.
 *
 * With part r from rank r this is the sum in rank order of the Communicator, whatever path the parts came on.
 */
void ordered_sum(const ComputeStream& stream, const void* parts, DType dtype, std::int64_t number_of_parts, std::int64_t count,
                 float* sum);

} // namespace selm
