#include "aten_view.hpp"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

namespace selm::aten {

namespace {

at::Tensor blob(void* data, at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType type, Device device)
{
    const at::Device where = at_device(device);
    // target_device spares a query of the pointer's device.
    return at::for_blob(data, sizes)
        .strides(strides)
        .options(at::TensorOptions(type).device(where))
        .target_device(where)
        .make_tensor();
}

at::Tensor host_vector(const void* data, std::size_t count, at::ScalarType type, Device device)
{
    // from_blob takes no const pointer; the copies and reads made of this view never write.
    at::Tensor host = blob(const_cast<void*>(data), {static_cast<std::int64_t>(count)}, {1}, type, Device::cpu);
    return device == Device::cpu ? host : host.to(at_device(device));
}

} // namespace

at::ScalarType scalar_type(DType dtype) { return dtype == DType::f32 ? at::kFloat : at::kBFloat16; }

at::Device at_device(Device device)
{
    if (device == Device::cpu)
        return at::Device(at::kCPU);
    return at::Device(at::kCUDA, static_cast<at::DeviceIndex>(at::detail::getCUDAHooks().getCurrentDevice()));
}

at::Tensor view(const Tensor& x)
{
    return blob(x.data, {x.rows, x.columns}, {x.stride, 1}, scalar_type(x.dtype), x.device);
}

at::Tensor view_heads(const Tensor& x, std::int64_t column_begin, std::int64_t heads, std::int64_t head_dim)
{
    const Tensor columns = x.slice_columns(column_begin, heads * head_dim);
    return blob(columns.data, {x.rows, heads, head_dim}, {x.stride, head_dim, 1}, scalar_type(x.dtype), x.device);
}

at::Tensor index_tensor(std::span<const std::int32_t> values, Device device)
{
    return host_vector(values.data(), values.size(), at::kInt, device);
}

at::Tensor index_tensor(std::span<const std::int64_t> values, Device device)
{
    return host_vector(values.data(), values.size(), at::kLong, device);
}

at::Tensor float_tensor(std::span<const float> values, Device device)
{
    return host_vector(values.data(), values.size(), at::kFloat, device);
}

void add_rows(at::Tensor x, const at::Tensor& index, const at::Tensor& d)
{
    if (x.is_cpu())
        x.index_add_(0, index, d);
    else
        x.index_put_({index.to(at::kLong)}, d, true); // sorts stably; index_add_ would use atomics
}

at::Tensor as_f32(const at::Tensor& x) { return x.to(at::kFloat); }

at::Tensor heads_first(const at::Tensor& x)
{
    at::Tensor out = at::empty({x.size(1), x.size(0), x.size(2)}, x.options().dtype(at::kFloat));
    return out.copy_(x.permute({1, 0, 2}));
}

} // namespace selm::aten
