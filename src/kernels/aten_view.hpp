#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>

#include "selm/kernels/tensor.hpp"

// How the aten engine looks at selm's tensors and at host arrays: views, no copies unless said. Private to src/kernels.
namespace selm::aten {

at::ScalarType scalar_type(DType dtype);
/// The CPU, or the current CUDA device.
at::Device at_device(Device device);

/// [rows, columns] with x's row stride.
at::Tensor view(const Tensor& x);
/// Columns [column_begin, column_begin + heads*head_dim) of x as [rows, heads, head_dim].
at::Tensor view_heads(const Tensor& x, std::int64_t column_begin, std::int64_t heads, std::int64_t head_dim);

/// A copy of a host array on `device` (a view of it where that is the CPU).
at::Tensor index_tensor(std::span<const std::int32_t> values, Device device);
at::Tensor index_tensor(std::span<const std::int64_t> values, Device device);
at::Tensor float_tensor(std::span<const float> values, Device device);

/// x[index[i]] += d[i], in order of i on every device.
void add_rows(at::Tensor x, const at::Tensor& index, const at::Tensor& d);

/// f32 values of x; x itself when it is f32.
at::Tensor as_f32(const at::Tensor& x);

/// [n, heads, D] -> f32 [heads, n, D], always a copy: so its alignment is the same wherever x lies (the BLAS may take
/// other kernels at other alignments).
at::Tensor heads_first(const at::Tensor& x);

} // namespace selm::aten
