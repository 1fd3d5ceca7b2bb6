#include "elementwise.hpp"

#include <algorithm>
#include <cstring>

#include <Kokkos_Core.hpp>

#include "elementwise_rows.hpp"
#include "selm/base/error.hpp"

namespace selm::elementwise {
namespace {

using HostSpace = Kokkos::DefaultHostExecutionSpace;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// A body is compiled three times, for the build's target and for those below, with all that it calls inlined; the CPU decides
// at run time. So a portable build has wide vectors, too.
template<typename Body>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512"), flatten, noinline)) void
run_avx512(const Body& body, std::int64_t begin, std::int64_t end)
{
    for (std::int64_t row = begin; row < end; ++row)
        body(row);
}

template<typename Body>
__attribute__((target("avx2,fma,prefer-vector-width=256"), flatten, noinline)) void
run_avx2(const Body& body, std::int64_t begin, std::int64_t end)
{
    for (std::int64_t row = begin; row < end; ++row)
        body(row);
}

enum class Vectors { of_build, avx2, avx512 };

Vectors widest_vectors()
{
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return Vectors::avx512;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Vectors::avx2 : Vectors::of_build;
}

template<typename Body>
void run_rows(const Body& body, std::int64_t begin, std::int64_t end)
{
    static const Vectors vectors = widest_vectors();
    if (vectors == Vectors::avx512)
        return run_avx512(body, begin, end);
    if (vectors == Vectors::avx2)
        return run_avx2(body, begin, end);
    for (std::int64_t row = begin; row < end; ++row)
        body(row);
}
#else
template<typename Body>
void run_rows(const Body& body, std::int64_t begin, std::int64_t end)
{
    for (std::int64_t row = begin; row < end; ++row)
        body(row);
}
#endif

/// body(row) for all rows; a thread takes `at_once` of them at a time.
template<typename Body>
void for_rows(const char* label, std::int64_t rows, const Body& body, std::int64_t at_once = 16)
{
    Kokkos::parallel_for(label,
                         Kokkos::RangePolicy<HostSpace, Kokkos::IndexType<std::int64_t>>(0, (rows + at_once - 1) / at_once),
                         [&](std::int64_t i) { run_rows(body, i * at_once, std::min(rows, (i + 1) * at_once)); });
    HostSpace().fence();
}

/// For kernels that add several rows into one: every thread takes a block of columns and all rows in order, so the
/// order of the additions does not depend on the number of threads. body(column_begin, column_count).
template<typename Body>
void for_column_blocks(const char* label, std::int64_t columns, const Body& body)
{
    const std::int64_t threads = std::max<std::int64_t>(1, HostSpace().concurrency());
    const std::int64_t block = std::max<std::int64_t>(64, (columns + threads - 1) / threads);
    const auto run_block = [=](std::int64_t i) {
        const std::int64_t begin = i * block;
        body(begin, std::min(block, columns - begin));
    };
    for_rows(label, (columns + block - 1) / block, run_block, 1);
}

std::int64_t count_of(std::size_t size)
{
    return static_cast<std::int64_t>(size);
}

} // namespace

void fill_zero(const Tensor& x)
{
    for_rows("fill_zero", x.rows, [=](std::int64_t row) {
        const std::size_t width = size_of(x.dtype);
        std::memset(static_cast<char*>(x.data) + static_cast<std::size_t>(row * x.stride) * width, 0,
                    static_cast<std::size_t>(x.columns) * width);
    });
}

void embed(std::span<const std::int32_t> tokens, const Tensor& embedding_VH, const Tensor& x_TH)
{
    const std::int64_t columns = x_TH.columns;
    SELM_EXPECT(x_TH.rows == count_of(tokens.size()) && embedding_VH.columns == columns);
    for (const std::int32_t token : tokens)
        SELM_EXPECT(token >= 0 && token < embedding_VH.rows);
    for_rows("embed", x_TH.rows, [&](std::int64_t row) {
        const std::int64_t token = tokens[static_cast<std::size_t>(row)];
        float* to = x_TH.row_f32(row);
        if (embedding_VH.dtype == DType::f32) {
            std::memcpy(to, embedding_VH.row_f32(token), static_cast<std::size_t>(columns) * sizeof(float));
            return;
        }
        const std::uint16_t* from = embedding_VH.bf16() + token * embedding_VH.stride;
        for (std::int64_t c = 0; c < columns; ++c)
            to[c] = from_bf16(from[c]);
    });
}

void embed_backward(std::span<const std::int32_t> tokens, const Tensor& dx_TH, const Tensor& d_embedding_VH)
{
    SELM_EXPECT(dx_TH.rows == count_of(tokens.size()) && d_embedding_VH.columns == dx_TH.columns);
    for (const std::int32_t token : tokens)
        SELM_EXPECT(token >= 0 && token < d_embedding_VH.rows);
    for_column_blocks("embed_backward", dx_TH.columns, [&](std::int64_t begin, std::int64_t count) {
        for (std::int64_t row = 0; row < dx_TH.rows; ++row)
            add_row(dx_TH.row_f32(row) + begin, count,
                    d_embedding_VH.row_f32(tokens[static_cast<std::size_t>(row)]) + begin);
    });
}

void rms_norm(const Tensor& x_TH, const Tensor& gain, float eps, const Tensor& y_TH, const Tensor& rstd)
{
    SELM_EXPECT(y_TH.rows == x_TH.rows && y_TH.columns == x_TH.columns && gain.columns == x_TH.columns);
    SELM_EXPECT(rstd.empty() || rstd.columns == x_TH.rows);
    float* const rstd_data = rstd.empty() ? nullptr : rstd.f32();
    const float* const gain_data = gain.f32();
    for_rows("rms_norm", x_TH.rows, [&](std::int64_t row) {
        const float value = rms_norm_row(x_TH.row_f32(row), gain_data, eps, x_TH.columns, y_TH.row_f32(row));
        if (rstd_data != nullptr)
            rstd_data[row] = value;
    });
}

void rms_norm_backward(const Tensor& x_TH, const Tensor& gain, const Tensor& rstd, const Tensor& dy_TH,
                       const Tensor& dx_TH, const Tensor& dgain)
{
    const std::int64_t rows = x_TH.rows, columns = x_TH.columns;
    SELM_EXPECT(dy_TH.rows == rows && dy_TH.columns == columns && dx_TH.rows == rows && dx_TH.columns == columns);
    SELM_EXPECT(gain.columns == columns && (rows == 0 || rstd.columns == rows));
    SELM_EXPECT(dgain.empty() || dgain.columns == columns);
    if (rows == 0)
        return;
    const float* const rstd_data = rstd.f32();
    const float* const gain_data = gain.f32();
    float* const dgain_data = dgain.f32();
    for_column_blocks("rms_norm_backward_gain", dgain.empty() ? 0 : columns, [&](std::int64_t begin, std::int64_t count) {
        for (std::int64_t row = 0; row < rows; ++row)
            add_scaled_product(dy_TH.row_f32(row) + begin, x_TH.row_f32(row) + begin, rstd_data[row], count,
                               dgain_data + begin);
    });
    for_rows("rms_norm_backward", rows, [&](std::int64_t row) {
        rms_norm_backward_row(x_TH.row_f32(row), gain_data, rstd_data[row], dy_TH.row_f32(row), columns,
                              dx_TH.row_f32(row));
    });
}

void bias_backward(const Tensor& dy_TN, const Tensor& dbias)
{
    SELM_EXPECT(dbias.rows == 1 && dbias.columns == dy_TN.columns);
    float* const sums = dbias.f32();
    for_column_blocks("bias_backward", dy_TN.columns, [&](std::int64_t begin, std::int64_t count) {
        for (std::int64_t row = 0; row < dy_TN.rows; ++row)
            add_row(dy_TN.row_f32(row) + begin, count, sums + begin);
    });
}

void layer_norm(const Tensor& x_TH, const Tensor& residual_TH, const Tensor& gain, const Tensor& bias, float eps,
                const Tensor& y_TH, const Tensor& mean, const Tensor& rstd)
{
    const std::int64_t columns = x_TH.columns;
    SELM_EXPECT(y_TH.rows == x_TH.rows && y_TH.columns == columns && gain.columns == columns);
    SELM_EXPECT(bias.columns == columns && mean.empty() == rstd.empty());
    SELM_EXPECT(residual_TH.empty() || (residual_TH.rows == x_TH.rows && residual_TH.columns == columns));
    SELM_EXPECT(rstd.empty() || (rstd.columns == x_TH.rows && mean.columns == x_TH.rows));
    const bool has_residual = !residual_TH.empty();
    float* const mean_data = mean.empty() ? nullptr : mean.f32();
    float* const rstd_data = rstd.empty() ? nullptr : rstd.f32();
    const float *const gain_data = gain.f32(), *const bias_data = bias.f32();
    for_rows("layer_norm", x_TH.rows, [&](std::int64_t row) {
        if (has_residual)
            add_row(residual_TH.row_f32(row), columns, x_TH.row_f32(row));
        const Moments moments =
            layer_norm_row(x_TH.row_f32(row), gain_data, bias_data, eps, columns, y_TH.row_f32(row));
        if (rstd_data != nullptr) {
            mean_data[row] = moments.mean;
            rstd_data[row] = moments.rstd;
        }
    });
}

void layer_norm_backward(const Tensor& x_TH, const Tensor& gain, const Tensor& mean, const Tensor& rstd,
                         const Tensor& dy_TH, const Tensor& dx_TH, const Tensor& dgain, const Tensor& dbias)
{
    const std::int64_t rows = x_TH.rows, columns = x_TH.columns;
    SELM_EXPECT(dy_TH.rows == rows && dy_TH.columns == columns && dx_TH.rows == rows && dx_TH.columns == columns);
    SELM_EXPECT(gain.columns == columns);
    SELM_EXPECT((dgain.empty() || dgain.columns == columns) && (dbias.empty() || dbias.columns == columns));
    SELM_EXPECT(rows == 0 || (rstd.columns == rows && mean.columns == rows));
    if (rows == 0)
        return;
    const float *const mean_data = mean.f32(), *const rstd_data = rstd.f32(), *const gain_data = gain.f32();
    float* const dgain_data = dgain.empty() ? nullptr : dgain.f32();
    float* const dbias_data = dbias.empty() ? nullptr : dbias.f32();
    const bool has_sums = !dgain.empty() || !dbias.empty();
    for_column_blocks("layer_norm_backward_sums", has_sums ? columns : 0, [&](std::int64_t begin, std::int64_t count) {
        for (std::int64_t row = 0; row < rows; ++row) {
            const float* const dy = dy_TH.row_f32(row) + begin;
            if (dgain_data != nullptr)
                add_normalised_product(dy, x_TH.row_f32(row) + begin, {mean_data[row], rstd_data[row]}, count,
                                       dgain_data + begin);
            if (dbias_data != nullptr)
                add_row(dy, count, dbias_data + begin);
        }
    });
    for_rows("layer_norm_backward", rows, [&](std::int64_t row) {
        layer_norm_backward_row(x_TH.row_f32(row), gain_data, {mean_data[row], rstd_data[row]}, dy_TH.row_f32(row),
                                columns, dx_TH.row_f32(row));
    });
}

void gelu(const Tensor& x_TI, const Tensor& a_TI)
{
    SELM_EXPECT(a_TI.rows == x_TI.rows && a_TI.columns == x_TI.columns);
    for_rows("gelu", x_TI.rows,
             [&](std::int64_t row) { gelu_row(x_TI.row_f32(row), x_TI.columns, a_TI.row_f32(row)); });
}

void gelu_backward(const Tensor& x_TI, const Tensor& da_TI, const Tensor& a_TI)
{
    SELM_EXPECT(a_TI.rows == x_TI.rows && a_TI.columns == x_TI.columns);
    SELM_EXPECT(da_TI.rows == x_TI.rows && da_TI.columns == x_TI.columns);
    for_rows("gelu_backward", x_TI.rows, [&](std::int64_t row) {
        gelu_backward_row(x_TI.row_f32(row), da_TI.row_f32(row), x_TI.columns, a_TI.row_f32(row));
    });
}

void tanh(const Tensor& x)
{
    for_rows("tanh", x.rows, [&](std::int64_t row) {
        float* values = x.row_f32(row);
        for (std::int64_t c = 0; c < x.columns; ++c)
            values[c] = std::tanh(values[c]);
    });
}

void tanh_backward(const Tensor& y, const Tensor& dy)
{
    SELM_EXPECT(dy.rows == y.rows && dy.columns == y.columns);
    for_rows("tanh_backward", y.rows, [&](std::int64_t row) {
        const float* values = y.row_f32(row);
        float* d = dy.row_f32(row);
        for (std::int64_t c = 0; c < y.columns; ++c)
            d[c] *= 1.0f - values[c] * values[c];
    });
}

void rope(const Tensor& qkv, const AttentionShape& shape, std::span<const std::int32_t> positions, const Tensor& cos,
          const Tensor& sin, bool backward)
{
    const std::int64_t half = shape.head_dim / 2, heads = shape.heads + shape.kv_heads;
    SELM_EXPECT(shape.head_dim % 2 == 0 && qkv.columns == (shape.heads + 2 * shape.kv_heads) * shape.head_dim);
    SELM_EXPECT(qkv.rows == count_of(positions.size()) && cos.columns == half && sin.columns == half);
    for (const std::int32_t position : positions)
        SELM_EXPECT(position >= 0 && position < cos.rows && position < sin.rows);
    const float sign = backward ? -1.0f : 1.0f;
    for_rows("rope", qkv.rows, [&](std::int64_t row) {
        const std::int64_t position = positions[static_cast<std::size_t>(row)];
        const float *const cosines = cos.row_f32(position), *const sines = sin.row_f32(position);
        float* head = qkv.row_f32(row);
        for (std::int64_t i = 0; i < heads; ++i, head += 2 * half)
            rope_halves(head, head + half, cosines, sines, sign, half);
    });
}

void swiglu(const Tensor& gate_up, const Tensor& a_TI)
{
    const std::int64_t columns = a_TI.columns;
    SELM_EXPECT(gate_up.rows == a_TI.rows && gate_up.columns == 2 * columns);
    for_rows("swiglu", a_TI.rows, [&](std::int64_t row) {
        const float* gate = gate_up.row_f32(row);
        swiglu_row(gate, gate + columns, columns, a_TI.row_f32(row));
    });
}

void swiglu_backward(const Tensor& gate_up, const Tensor& da_TI, const Tensor& a_TI)
{
    const std::int64_t columns = a_TI.columns;
    SELM_EXPECT(gate_up.rows == a_TI.rows && gate_up.columns == 2 * columns);
    SELM_EXPECT(da_TI.rows == a_TI.rows && da_TI.columns == columns);
    for_rows("swiglu_backward", a_TI.rows, [&](std::int64_t row) {
        float* gate = gate_up.row_f32(row);
        swiglu_backward_row(gate, gate + columns, da_TI.row_f32(row), columns, a_TI.row_f32(row));
    });
}

void gather_rows(const Tensor& x, std::span<const std::int64_t> index, const Tensor& out)
{
    SELM_EXPECT(out.rows == count_of(index.size()) && out.columns == x.columns && out.dtype == x.dtype);
    for (const std::int64_t i : index)
        SELM_EXPECT(i >= 0 && i < x.rows);
    const std::size_t width = size_of(x.dtype);
    for_rows("gather_rows", out.rows, [&](std::int64_t row) {
        const std::int64_t from = index[static_cast<std::size_t>(row)];
        std::memcpy(static_cast<char*>(out.data) + static_cast<std::size_t>(row * out.stride) * width,
                    static_cast<const char*>(x.data) + static_cast<std::size_t>(from * x.stride) * width,
                    static_cast<std::size_t>(x.columns) * width);
    });
}

void convert(const Tensor& from, const Tensor& to)
{
    SELM_EXPECT(from.rows == to.rows && from.columns == to.columns && from.dtype != to.dtype);
    const bool narrows = from.dtype == DType::f32;
    for_rows("convert", from.rows, [&](std::int64_t row) {
        if (narrows)
            std::transform(from.row_f32(row), from.row_f32(row) + from.columns, to.bf16() + row * to.stride, to_bf16);
        else
            std::transform(from.bf16() + row * from.stride, from.bf16() + row * from.stride + from.columns,
                           to.row_f32(row), from_bf16);
    });
}

void scatter_add_rows(const Tensor& d, std::span<const std::int64_t> index, const Tensor& x)
{
    SELM_EXPECT(d.rows == count_of(index.size()) && d.columns == x.columns);
    for (const std::int64_t i : index)
        SELM_EXPECT(i >= 0 && i < x.rows);
    for_column_blocks("scatter_add_rows", d.columns, [&](std::int64_t begin, std::int64_t count) {
        for (std::int64_t row = 0; row < d.rows; ++row)
            add_row(d.row_f32(row) + begin, count, x.row_f32(index[static_cast<std::size_t>(row)]) + begin);
    });
}

} // namespace selm::elementwise
