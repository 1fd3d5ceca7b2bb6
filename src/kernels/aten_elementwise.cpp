#include <ATen/core/Tensor.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/special_erfc.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>

#include "aten_engine.hpp"
#include "aten_view.hpp"

namespace selm {

using aten::add_rows;
using aten::as_f32;
using aten::index_tensor;
using aten::view;
using aten::view_heads;

namespace {

template<typename Index>
void expect_in_range(std::span<const Index> index, std::int64_t bound)
{
    for (const Index i : index)
        SELM_EXPECT(i >= 0 && i < bound);
}

/// f32 copy of x in rows of a whole number of vectors, filled up with zeros: the rows may be one run, and yet every
/// element is computed by the vectorised body of a function (its scalar tail differs in the last bit).
at::Tensor in_whole_vectors(const at::Tensor& x)
{
    constexpr std::int64_t vector = 64;
    const std::int64_t width = (x.size(1) + vector - 1) / vector * vector;
    at::Tensor out = at::zeros({x.size(0), width}, x.options().dtype(at::kFloat));
    out.narrow(1, 0, x.size(1)).copy_(x);
    return out;
}

/// Phi(x), the normal distribution function.
at::Tensor distribution(const at::Tensor& x)
{
    return at::special_erfc(in_whole_vectors(x).mul_(-0.7071067811865476)).mul_(0.5).narrow(1, 0, x.size(1));
}

} // namespace

void AtenEngine::embed(std::span<const std::int32_t> tokens, const Tensor& embedding_VH, const Tensor& x_TH)
{
    SELM_EXPECT(static_cast<std::int64_t>(tokens.size()) == x_TH.rows && x_TH.columns == embedding_VH.columns);
    expect_in_range(tokens, embedding_VH.rows);
    const c10::InferenceMode no_autograd;
    if (tokens.empty())
        return;
    const at::Tensor rows = embedding_VH.device == device_ ? index(tokens) : index_tensor(tokens, embedding_VH.device);
    view(x_TH).copy_(at::index_select(view(embedding_VH), 0, rows));
}

void AtenEngine::embed_backward(std::span<const std::int32_t> tokens, const Tensor& dx_TH, const Tensor& d_embedding_VH)
{
    SELM_EXPECT(static_cast<std::int64_t>(tokens.size()) == dx_TH.rows && dx_TH.columns == d_embedding_VH.columns);
    expect_in_range(tokens, d_embedding_VH.rows);
    const c10::InferenceMode no_autograd;
    if (!tokens.empty())
        add_rows(view(d_embedding_VH), index(tokens), as_f32(view(dx_TH)));
}

void AtenEngine::rms_norm(const Tensor& x_TH, const Tensor& gain, float eps, const Tensor& y_TH, const Tensor& rstd)
{
    SELM_EXPECT(gain.rows == 1 && gain.columns == x_TH.columns && y_TH.rows == x_TH.rows &&
                y_TH.columns == x_TH.columns);
    SELM_EXPECT(rstd.empty() || (rstd.rows == 1 && rstd.columns == x_TH.rows));
    const c10::InferenceMode no_autograd;
    if (x_TH.empty())
        return;
    const at::Tensor x = view(x_TH);
    const at::Tensor scale = at::rsqrt(x.square().mean({1}, true).add_(static_cast<double>(eps)));
    view(y_TH).copy_(x.mul(scale).mul_(view(gain)));
    if (!rstd.empty())
        view(rstd).copy_(scale.t());
}

void AtenEngine::rms_norm_backward(const Tensor& x_TH, const Tensor& gain, const Tensor& rstd, const Tensor& dy_TH,
                                   const Tensor& dx_TH, const Tensor& dgain)
{
    SELM_EXPECT(rstd.rows == 1 && rstd.columns == x_TH.rows && gain.columns == x_TH.columns);
    SELM_EXPECT(dgain.empty() || dgain.columns == x_TH.columns);
    SELM_EXPECT(dy_TH.rows == x_TH.rows && dx_TH.rows == x_TH.rows);
    const c10::InferenceMode no_autograd;
    if (x_TH.empty())
        return;
    const at::Tensor scale = view(rstd).t();
    const at::Tensor normalised = view(x_TH).mul(scale);
    const at::Tensor dy = as_f32(view(dy_TH));
    if (!dgain.empty())
        view(dgain).add_(dy.mul(normalised).sum({0}, true));
    const at::Tensor g = dy.mul(view(gain));
    const at::Tensor projection = g.mul(normalised).mean({1}, true);
    view(dx_TH).add_(g.sub(normalised.mul(projection)).mul_(scale));
}

void AtenEngine::bias_backward(const Tensor& dy_TN, const Tensor& dbias)
{
    SELM_EXPECT(dbias.rows == 1 && dbias.columns == dy_TN.columns);
    const c10::InferenceMode no_autograd;
    if (!dy_TN.empty())
        view(dbias).add_(as_f32(view(dy_TN)).sum({0}, true));
}

void AtenEngine::layer_norm(const Tensor& x_TH, const Tensor& residual_TH, const Tensor& gain, const Tensor& bias,
                            float eps, const Tensor& y_TH, const Tensor& mean, const Tensor& rstd)
{
    SELM_EXPECT(gain.columns == x_TH.columns && bias.columns == x_TH.columns && y_TH.rows == x_TH.rows &&
                y_TH.columns == x_TH.columns);
    SELM_EXPECT(residual_TH.empty() || (residual_TH.rows == x_TH.rows && residual_TH.columns == x_TH.columns));
    SELM_EXPECT(mean.empty() == rstd.empty() &&
                (rstd.empty() || (rstd.columns == x_TH.rows && mean.columns == x_TH.rows)));
    const c10::InferenceMode no_autograd;
    if (x_TH.empty())
        return;
    at::Tensor x = view(x_TH);
    if (!residual_TH.empty())
        x.add_(view(residual_TH));
    const at::Tensor middle = x.mean({1}, true);
    const at::Tensor centered = x.sub(middle);
    const at::Tensor scale = at::rsqrt(centered.square().mean({1}, true).add_(static_cast<double>(eps)));
    view(y_TH).copy_(centered.mul(scale).mul_(view(gain)).add_(view(bias)));
    if (!rstd.empty()) {
        view(mean).copy_(middle.t());
        view(rstd).copy_(scale.t());
    }
}

void AtenEngine::layer_norm_backward(const Tensor& x_TH, const Tensor& gain, const Tensor& mean, const Tensor& rstd,
                                     const Tensor& dy_TH, const Tensor& dx_TH, const Tensor& dgain,
                                     const Tensor& dbias)
{
    SELM_EXPECT(rstd.columns == x_TH.rows && mean.columns == x_TH.rows && gain.columns == x_TH.columns);
    SELM_EXPECT(dy_TH.rows == x_TH.rows && dx_TH.rows == x_TH.rows);
    SELM_EXPECT((dgain.empty() || dgain.columns == x_TH.columns) && (dbias.empty() || dbias.columns == x_TH.columns));
    const c10::InferenceMode no_autograd;
    if (x_TH.empty())
        return;
    const at::Tensor scale = view(rstd).t();
    const at::Tensor normalised = view(x_TH).sub(view(mean).t()).mul_(scale);
    const at::Tensor dy = as_f32(view(dy_TH));
    if (!dgain.empty())
        view(dgain).add_(dy.mul(normalised).sum({0}, true));
    if (!dbias.empty())
        view(dbias).add_(dy.sum({0}, true));
    const at::Tensor h = dy.mul(view(gain));
    const at::Tensor projection = h.mul(normalised).mean({1}, true);
    view(dx_TH).copy_(h.sub(h.mean({1}, true)).sub_(normalised.mul(projection)).mul_(scale));
}

void AtenEngine::gelu(const Tensor& x_TI, const Tensor& a_TI)
{
    SELM_EXPECT(a_TI.rows == x_TI.rows && a_TI.columns == x_TI.columns);
    const c10::InferenceMode no_autograd;
    if (x_TI.empty())
        return;
    const at::Tensor x = as_f32(view(x_TI));
    view(a_TI).copy_(distribution(x).mul_(x));
}

void AtenEngine::gelu_backward(const Tensor& x_TI, const Tensor& da_TI, const Tensor& a_TI)
{
    SELM_EXPECT(a_TI.rows == x_TI.rows && a_TI.columns == x_TI.columns);
    SELM_EXPECT(da_TI.rows == x_TI.rows && da_TI.columns == x_TI.columns);
    const c10::InferenceMode no_autograd;
    if (x_TI.empty())
        return;
    at::Tensor x_out = view(x_TI);
    const at::Tensor x = as_f32(x_out), phi = distribution(x);
    const at::Tensor density = x.square().mul_(-0.5).exp_().mul_(0.3989422804014327);
    const at::Tensor a = phi.mul(x);
    const at::Tensor dx = density.mul_(x).add_(phi).mul_(as_f32(view(da_TI)));
    view(a_TI).copy_(a);
    x_out.copy_(dx);
}

void AtenEngine::tanh(const Tensor& x)
{
    const c10::InferenceMode no_autograd;
    if (!x.empty())
        view(x).copy_(at::tanh(in_whole_vectors(view(x))).narrow(1, 0, x.columns));
}

void AtenEngine::tanh_backward(const Tensor& y, const Tensor& dy)
{
    SELM_EXPECT(dy.rows == y.rows && dy.columns == y.columns);
    const c10::InferenceMode no_autograd;
    if (!y.empty())
        view(dy).mul_(as_f32(view(y)).square().neg_().add_(1.0));
}

void AtenEngine::rope(const Tensor& qkv, const AttentionShape& shape, std::span<const std::int32_t> positions,
                      const Tensor& cos, const Tensor& sin, bool backward)
{
    const std::int64_t half = shape.head_dim / 2;
    SELM_EXPECT(static_cast<std::int64_t>(positions.size()) == qkv.rows && cos.columns == half && sin.columns == half);
    expect_in_range(positions, cos.rows);
    SELM_EXPECT(cos.rows == sin.rows);
    const c10::InferenceMode no_autograd;
    if (qkv.rows == 0)
        return;
    const at::Tensor rows = index(positions);
    const at::Tensor c = at::index_select(view(cos), 0, rows).unsqueeze(1);
    at::Tensor s = at::index_select(view(sin), 0, rows).unsqueeze(1);
    if (backward)
        s.neg_();
    at::Tensor heads = view_heads(qkv, 0, shape.heads + shape.kv_heads, shape.head_dim);
    at::Tensor first = heads.narrow(2, 0, half);
    at::Tensor second = heads.narrow(2, half, half);
    const at::Tensor a = as_f32(first);
    const at::Tensor b = as_f32(second);
    const at::Tensor rotated_first = a.mul(c).sub_(b.mul(s));
    const at::Tensor rotated_second = b.mul(c).add_(a.mul(s));
    first.copy_(rotated_first);
    second.copy_(rotated_second);
}

void AtenEngine::swiglu(const Tensor& gate_up, const Tensor& a_TI)
{
    SELM_EXPECT(gate_up.columns == 2 * a_TI.columns && gate_up.rows == a_TI.rows);
    const c10::InferenceMode no_autograd;
    if (a_TI.empty())
        return;
    const std::int64_t width = a_TI.columns;
    const at::Tensor gate = as_f32(view(gate_up.slice_columns(0, width)));
    const at::Tensor up = as_f32(view(gate_up.slice_columns(width, width)));
    view(a_TI).copy_(at::sigmoid(gate).mul_(gate).mul_(up));
}

void AtenEngine::swiglu_backward(const Tensor& gate_up, const Tensor& da_TI, const Tensor& a_TI)
{
    SELM_EXPECT(gate_up.columns == 2 * a_TI.columns && gate_up.rows == a_TI.rows);
    SELM_EXPECT(da_TI.rows == a_TI.rows && da_TI.columns == a_TI.columns);
    const c10::InferenceMode no_autograd;
    if (a_TI.empty())
        return;
    const std::int64_t width = a_TI.columns;
    at::Tensor gate_out = view(gate_up.slice_columns(0, width));
    at::Tensor up_out = view(gate_up.slice_columns(width, width));
    const at::Tensor gate = as_f32(gate_out);
    const at::Tensor up = as_f32(up_out);
    const at::Tensor da = as_f32(view(da_TI));
    const at::Tensor sigma = at::sigmoid(gate);
    const at::Tensor silu = sigma.mul(gate);
    // silu' = sigma (1 + gate (1 - sigma)) = sigma + silu - silu sigma
    const at::Tensor slope = sigma.add(silu).sub_(silu.mul(sigma));
    const at::Tensor a = silu.mul(up);
    const at::Tensor d_gate = da.mul(up).mul_(slope);
    const at::Tensor d_up = da.mul(silu);
    view(a_TI).copy_(a);
    gate_out.copy_(d_gate);
    up_out.copy_(d_up);
}

void AtenEngine::gather_rows(const Tensor& x, std::span<const std::int64_t> rows, const Tensor& out)
{
    SELM_EXPECT(static_cast<std::int64_t>(rows.size()) == out.rows && out.columns == x.columns);
    expect_in_range(rows, x.rows);
    const c10::InferenceMode no_autograd;
    if (!out.empty())
        view(out).copy_(at::index_select(view(x), 0, index(rows)));
}

void AtenEngine::convert(const Tensor& from, const Tensor& to)
{
    SELM_EXPECT(from.rows == to.rows && from.columns == to.columns);
    const c10::InferenceMode no_autograd;
    if (!to.empty())
        view(to).copy_(view(from));
}

void AtenEngine::scatter_add_rows(const Tensor& d, std::span<const std::int64_t> rows, const Tensor& x)
{
    SELM_EXPECT(static_cast<std::int64_t>(rows.size()) == d.rows && d.columns == x.columns && x.dtype == DType::f32);
    expect_in_range(rows, x.rows);
    const c10::InferenceMode no_autograd;
    if (!d.empty())
        add_rows(view(x), index(rows), as_f32(view(d)));
}

} // namespace selm
