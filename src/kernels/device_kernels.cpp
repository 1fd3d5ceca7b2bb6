#include "selm/kernels/device_kernels.hpp"

#include <span>

#include "adamw.hpp"
#include "cuda_launch.hpp"
#include "selm/base/error.hpp"

namespace selm {
namespace {

template<typename T>
std::span<T> span_of(T* data, std::int64_t count)
{
    return {data, static_cast<std::size_t>(count)};
}

/// @p launch(): null or CUDA's reason. The launches do not exist in a build without CUDA.
#ifdef SELM_ENABLE_CUDA
#define SELM_LAUNCH(kernel, call)                                                                                      \
    if (const char* problem = (call); problem != nullptr)                                                             \
    throw internal_error(cat("the CUDA kernel ", kernel, " could not be launched (", problem,                          \
                             "). Is the build made for this GPU (TORCH_CUDA_ARCH_LIST)?"))
#else
#define SELM_LAUNCH(kernel, call)                                                                                      \
    throw config_error(cat(kernel, ": this build has no CUDA kernels (SELM_ENABLE_CUDA is off). Build the preset \"cuda\""))
#endif

template<typename T, typename AsFloat>
void sum_parts(const T* parts, std::int64_t number_of_parts, std::int64_t count, float* sum, const AsFloat& as_float)
{
    for (std::int64_t i = 0; i < count; ++i)
        sum[i] = as_float(parts[i]);
    for (std::int64_t part = 1; part < number_of_parts; ++part)
        for (std::int64_t i = 0; i < count; ++i)
            sum[i] += as_float(parts[part * count + i]);
}

} // namespace

void adamw_step(const ComputeStream& stream, const AdamWOptions& options, const float* gradient, float* master, float* exp_avg,
                float* exp_avg_sq, void* compute, DType compute_dtype, std::int64_t count)
{
    SELM_EXPECT(count >= 0);
    if (count == 0)
        return;
    if (stream.device == Device::cuda) {
        SELM_LAUNCH("adamw_step", cuda::launch_adamw(adamw_factors(options), options.round_bf16, gradient, master, exp_avg,
                                                     exp_avg_sq, compute, compute_dtype == DType::bf16, count, stream.handle));
        return;
    }
    if (compute_dtype == DType::bf16)
        adamw_step_bf16(options, span_of(gradient, count), span_of(master, count), span_of(exp_avg, count),
                        span_of(exp_avg_sq, count), span_of(static_cast<std::uint16_t*>(compute), count));
    else
        adamw_step(options, span_of(gradient, count), span_of(master, count), span_of(exp_avg, count),
                   span_of(exp_avg_sq, count), span_of(static_cast<float*>(compute), count));
}

std::int64_t sum_of_squares_scratch(std::int64_t count)
{
    return (count + sum_block_elements - 1) / sum_block_elements;
}

void sum_of_squares(const ComputeStream& stream, const float* values, std::int64_t count, [[maybe_unused]] double* scratch,
                    double* sum)
{
    SELM_EXPECT(count >= 0);
    if (stream.device == Device::cuda) {
        SELM_LAUNCH("sum_of_squares", cuda::launch_sum_of_squares(values, count, scratch, sum, stream.handle));
        return;
    }
    *sum = sum_of_squares(span_of(values, count));
}

void convert_f32_to_bf16(const ComputeStream& stream, const float* from, std::uint16_t* to, std::int64_t count)
{
    SELM_EXPECT(count >= 0);
    if (count == 0)
        return;
    if (stream.device == Device::cuda) {
        SELM_LAUNCH("convert_f32_to_bf16", cuda::launch_f32_to_bf16(from, to, count, stream.handle));
        return;
    }
    for (std::int64_t i = 0; i < count; ++i)
        to[i] = bf16_of(from[i]);
}

void convert_bf16_to_f32(const ComputeStream& stream, const std::uint16_t* from, float* to, std::int64_t count)
{
    SELM_EXPECT(count >= 0);
    if (count == 0)
        return;
    if (stream.device == Device::cuda) {
        SELM_LAUNCH("convert_bf16_to_f32", cuda::launch_bf16_to_f32(from, to, count, stream.handle));
        return;
    }
    for (std::int64_t i = 0; i < count; ++i)
        to[i] = float_of_bf16(from[i]);
}

void ordered_sum(const ComputeStream& stream, const void* parts, DType dtype, std::int64_t number_of_parts, std::int64_t count,
                 float* sum)
{
    SELM_EXPECT(count >= 0 && number_of_parts >= 1);
    if (count == 0)
        return;
    if (stream.device == Device::cuda) {
        SELM_LAUNCH("ordered_sum", cuda::launch_ordered_sum(parts, dtype == DType::bf16, number_of_parts, count, sum,
                                                            stream.handle));
        return;
    }
    if (dtype == DType::bf16)
        sum_parts(static_cast<const std::uint16_t*>(parts), number_of_parts, count, sum, float_of_bf16);
    else
        sum_parts(static_cast<const float*>(parts), number_of_parts, count, sum, [](float value) { return value; });
}

} // namespace selm
