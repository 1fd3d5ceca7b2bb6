#include "xsmm_engine.hpp"

#include <cstring>

#include <libxsmm_version.h>

#include "avx2_gemm.hpp"
#include "bf16_rows.hpp"
#include "elementwise.hpp"
#include "engines.hpp"
#include "selm/base/error.hpp"

namespace selm {

std::unique_ptr<Engine> make_xsmm_engine(const EngineOptions& options)
{
    return std::make_unique<xsmm::XsmmEngine>(xsmm::XsmmEngine::Products::automatic, options.products);
}

namespace xsmm {

XsmmEngine::XsmmEngine(Products products, DType operands)
    : uses_avx2_(products == Products::automatic && !kernels_.has_avx512() && avx2::is_supported()),
      wants_bf16_(operands == DType::bf16), uses_bf16_(wants_bf16_ && kernels_.has_bf16())
{
    SELM_EXPECT(!uses_avx2_ || kernels_.panel_width() == avx2::panel_width);
}

std::string XsmmEngine::description() const
{
    std::string text = cat("xsmm (LIBXSMM ", LIBXSMM_CONFIG_VERSION, ", ", kernels_.target(),
                           uses_bf16_ ? ", bf16 products summed in f32" : ", f32 products", ", panels of ",
                           kernels_.panel_width());
    if (wants_bf16_ && !uses_bf16_)
        text += ", this CPU does not multiply bf16";
    if (uses_avx2_)
        text += ", own AVX2 kernels for linear layers";
    if (kernels_.plain_loops() > 0)
        text += cat(", plain loops for ", kernels_.plain_loops(), " shapes");
    return text + ")";
}

Tensor XsmmEngine::allocate(std::int64_t rows, std::int64_t columns, DType dtype)
{
    SELM_EXPECT(rows >= 0 && columns >= 0);
    Tensor out;
    out.storage = memory_.allocate(static_cast<std::size_t>(rows * columns) * size_of(dtype));
    out.data = out.storage.get();
    out.rows = rows;
    out.columns = columns;
    out.stride = columns;
    out.dtype = dtype;
    return out;
}

void XsmmEngine::copy_from_host(const void* host, const Tensor& to)
{
    const std::size_t width = size_of(to.dtype), row_bytes = static_cast<std::size_t>(to.columns) * width;
    for (std::int64_t row = 0; row < to.rows; ++row)
        std::memcpy(static_cast<char*>(to.data) + static_cast<std::size_t>(row * to.stride) * width,
                    static_cast<const char*>(host) + static_cast<std::size_t>(row) * row_bytes, row_bytes);
}

void XsmmEngine::copy_to_host(const Tensor& from, void* host)
{
    const std::size_t width = size_of(from.dtype), row_bytes = static_cast<std::size_t>(from.columns) * width;
    for (std::int64_t row = 0; row < from.rows; ++row)
        std::memcpy(static_cast<char*>(host) + static_cast<std::size_t>(row) * row_bytes,
                    static_cast<const char*>(from.data) + static_cast<std::size_t>(row * from.stride) * width,
                    row_bytes);
}

void XsmmEngine::fill_zero(const Tensor& x)
{
    elementwise::fill_zero(x);
}

void XsmmEngine::embed(std::span<const std::int32_t> tokens, const Tensor& embedding_VH, const Tensor& x_TH)
{
    elementwise::embed(tokens, embedding_VH, x_TH);
}

void XsmmEngine::embed_backward(std::span<const std::int32_t> tokens, const Tensor& dx_TH, const Tensor& d_embedding_VH)
{
    elementwise::embed_backward(tokens, dx_TH, d_embedding_VH);
}

void XsmmEngine::rms_norm(const Tensor& x_TH, const Tensor& gain, float eps, const Tensor& y_TH, const Tensor& rstd)
{
    elementwise::rms_norm(x_TH, gain, eps, y_TH, rstd);
}

void XsmmEngine::rms_norm_backward(const Tensor& x_TH, const Tensor& gain, const Tensor& rstd, const Tensor& dy_TH,
                                   const Tensor& dx_TH, const Tensor& dgain)
{
    elementwise::rms_norm_backward(x_TH, gain, rstd, dy_TH, dx_TH, dgain);
}

void XsmmEngine::rope(const Tensor& qkv, const AttentionShape& shape, std::span<const std::int32_t> positions,
                      const Tensor& cos, const Tensor& sin, bool backward)
{
    elementwise::rope(qkv, shape, positions, cos, sin, backward);
}

void XsmmEngine::swiglu(const Tensor& gate_up, const Tensor& a_TI)
{
    elementwise::swiglu(gate_up, a_TI);
}

void XsmmEngine::swiglu_backward(const Tensor& gate_up, const Tensor& da_TI, const Tensor& a_TI)
{
    elementwise::swiglu_backward(gate_up, da_TI, a_TI);
}

void XsmmEngine::bias_backward(const Tensor& dy_TN, const Tensor& dbias)
{
    elementwise::bias_backward(dy_TN, dbias);
}

void XsmmEngine::layer_norm(const Tensor& x_TH, const Tensor& residual_TH, const Tensor& gain, const Tensor& bias,
                            float eps, const Tensor& y_TH, const Tensor& mean, const Tensor& rstd)
{
    elementwise::layer_norm(x_TH, residual_TH, gain, bias, eps, y_TH, mean, rstd);
}

void XsmmEngine::layer_norm_backward(const Tensor& x_TH, const Tensor& gain, const Tensor& mean, const Tensor& rstd,
                                     const Tensor& dy_TH, const Tensor& dx_TH, const Tensor& dgain,
                                     const Tensor& dbias)
{
    elementwise::layer_norm_backward(x_TH, gain, mean, rstd, dy_TH, dx_TH, dgain, dbias);
}

void XsmmEngine::gelu(const Tensor& x_TI, const Tensor& a_TI)
{
    elementwise::gelu(x_TI, a_TI);
}

void XsmmEngine::gelu_backward(const Tensor& x_TI, const Tensor& da_TI, const Tensor& a_TI)
{
    elementwise::gelu_backward(x_TI, da_TI, a_TI);
}

void XsmmEngine::tanh(const Tensor& x)
{
    elementwise::tanh(x);
}

void XsmmEngine::tanh_backward(const Tensor& y, const Tensor& dy)
{
    elementwise::tanh_backward(y, dy);
}

void XsmmEngine::gather_rows(const Tensor& x, std::span<const std::int64_t> index, const Tensor& out)
{
    elementwise::gather_rows(x, index, out);
}

void XsmmEngine::convert(const Tensor& from, const Tensor& to)
{
    if (uses_bf16_ && from.dtype == DType::f32 && to.dtype == DType::bf16 && to.columns % 2 == 0 && to.stride % 2 == 0) {
        SELM_EXPECT(from.rows == to.rows && from.columns == to.columns);
        pair_columns(from.f32(), from.stride, from.rows, from.columns, static_cast<float*>(to.data), to.stride / 2);
        return;
    }
    elementwise::convert(from, to);
}

void XsmmEngine::scatter_add_rows(const Tensor& d, std::span<const std::int64_t> index, const Tensor& x)
{
    elementwise::scatter_add_rows(d, index, x);
}

} // namespace xsmm
} // namespace selm
