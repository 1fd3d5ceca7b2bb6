#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "selm/kernels/tensor.hpp"

// Shape legend: T tokens, H hidden, N outputs, K inputs, I intermediate, V vocabulary, R scored rows,
// NH query heads, NK key/value heads, D head dimension, QKV = (NH + 2*NK)*D.
namespace selm {

struct AttentionShape {
    std::int64_t heads = 0;    ///< NH
    std::int64_t kv_heads = 0; ///< NK, divides NH
    std::int64_t head_dim = 0; ///< D
    float scale = 0;           ///< 1/sqrt(D)
};

/// Tokens [begin, begin+length) attend causally to themselves and, when trunk >= 0, to all tokens of segment `trunk`
/// (which comes earlier and has no trunk itself). Segments partition [0, T) in order; lengths >= 1.
struct Segment {
    std::int64_t begin = 0;
    std::int64_t length = 0;
    std::int64_t trunk = -1;
};

/**
 * @brief Disentangled attention (He et al., DeBERTa, 2021, eq. 4): with r = relative_index of query - key, the score of a
 * query and a key is scale * (Q.K + Q.RK[r] + K.RQ[r]); every token attends to all tokens of its segment.
 */
struct DisentangledShape {
    std::int64_t heads = 0;    ///< NH
    std::int64_t head_dim = 0; ///< D
    float scale = 0;           ///< 1/sqrt(3*D)
    /// Row of the relative projections for distance query - key; entry i is distance i - (size-1)/2. Not decreasing; an odd
    /// number of entries that covers the longest segment.
    std::span<const std::int32_t> relative_index;
};

/// A weight [N, K] prepared by one engine. `source` is the row-major weight (f32 or bf16) it was made from, kept alive
/// only by engines that read it; the panels live in storage that the caller may provide (shared memory).
struct PackedWeight {
    std::int64_t outputs = 0; ///< N
    std::int64_t inputs = 0;  ///< K
    Tensor source;
    Tensor forward;
    Tensor backward; ///< empty when packed without backward
};

/// Keys and values of all layers for `slots` sequences of up to `capacity` tokens; layout private to the engine.
class KvCache {
  public:
    virtual ~KvCache() = default;
    virtual std::int64_t slots() const = 0;
    virtual std::int64_t capacity() const = 0;
};

/// Consecutive tokens of one sequence within a step: rows [row_begin, row_begin+count) of the step's matrices are the
/// tokens at positions [position_begin, position_begin+count) of the sequence in `slot`.
struct CachedSpan {
    std::int64_t slot = 0;
    std::int64_t row_begin = 0;
    std::int64_t count = 0;
    std::int64_t position_begin = 0;
    /// Prefill spans start at a multiple of prefill_tile of the sequence's own positions and use the tiled kernel; decode
    /// spans have count 1. So a token's arithmetic does not depend on what else is in the step.
    bool prefill = false;
    /// Not -1: the sequence begins with the position_begin tokens (a multiple of prefix_granularity()) that the sequence in this
    /// slot begins with, whose keys and values are in the cache, or come from an earlier span of this call: they are copied, and
    /// the prefill span starts behind them.
    std::int64_t prefix_slot = -1;
};
inline constexpr std::int64_t prefill_tile = 64;

/// A step of one token per row, and so of one span of one row each, in order. All arrays are of one length. A span's slot is -1
/// where the row belongs to no sequence: such rows fill a step up to Engine::step_rows, their results mean nothing.
struct SingleTokenStep {
    std::span<const std::int32_t> tokens, positions;
    std::span<const CachedSpan> spans;
    std::span<const std::int64_t> rows; ///< 0, 1, 2, ...: a gather of all rows
};

/**
 * @brief The operations that models are written in, forward and explicit backward, on one device.
 *
 * Activations are `activation_dtype()` (f32 on CPUs, whatever --dtype says: --dtype bf16 rounds the *weights* to bf16, and
 * the operands of products where EngineOptions::products says so);
 * residual streams, log-probs and all gradients of weights are f32. Outputs may not alias inputs unless said. Not thread
 * safe: one engine per thread. Nothing here communicates.
 *
 * Row invariance: when `row_invariant(dtype)` is true, a row of every *forward* operation has the same bits whatever
 * other rows the call holds and wherever the row stands (attention: whatever other segments there are).
 */
class Engine {
  public:
    virtual ~Engine() = default;
    virtual std::string name() const = 0;        ///< "xsmm" | "aten"
    /// Name, and "-bf16" where products take operands that were rounded to bf16: results of equal numerics may be mixed in one
    /// file, others differ by more than the order of sums.
    virtual std::string numerics() const { return name(); }
    virtual std::string description() const = 0; ///< name, library version, instruction set; for logs and provenance
    virtual Device device() const = 0;
    virtual DType activation_dtype() const = 0;
    virtual DType cache_dtype() const { return activation_dtype(); } ///< of the keys and values in a KvCache
    /// In which queries, keys, values, attention's output and the MLP's gate and up wait for the backward pass.
    virtual DType saved_dtype() const { return activation_dtype(); }
    virtual bool row_invariant() const = 0;
    /// Tokens of a copied prefix (CachedSpan) come in multiples of so many: what follows then has the bits that reading the
    /// prefix gives.
    virtual std::int64_t prefix_granularity() const { return prefill_tile; }

    /// Uninitialised [rows, columns] on the engine's device; counted in allocated_bytes until its last handle goes.
    virtual Tensor allocate(std::int64_t rows, std::int64_t columns, DType dtype) = 0;
    virtual std::int64_t allocated_bytes() const = 0;
    virtual std::int64_t peak_allocated_bytes() const = 0;
    virtual void fill_zero(const Tensor& x) = 0;
    virtual void copy_from_host(const void* host, const Tensor& to) = 0; ///< contiguous host data of to's dtype and shape
    virtual void copy_to_host(const Tensor& from, void* host) = 0;

    // --- linear layers: y = x W^T, W [N, K] -------------------------------------------------------------------------
    /// f32 elements that pack() needs for a weight [outputs, inputs]; 0 when the engine multiplies the source itself.
    virtual std::int64_t packed_elements(std::int64_t outputs, std::int64_t inputs, bool with_backward) const = 0;
    /// @param weight row-major f32 or bf16 on the host or device. @param storage f32 [1, packed_elements] to fill, or empty
    /// to let the engine allocate. @param already_packed storage was filled by another rank: only make the handle.
    virtual PackedWeight pack(const Tensor& weight, bool with_backward, const Tensor& storage, bool already_packed) = 0;
    virtual void linear(const Tensor& x_TK, const PackedWeight& w, const Tensor& y_TN) = 0;
    /// y (f32) += x W^T.
    virtual void linear_add(const Tensor& x_TK, const PackedWeight& w, const Tensor& y_TN) = 0;
    /// dx = dy W.
    virtual void linear_backward_input(const Tensor& dy_TN, const PackedWeight& w, const Tensor& dx_TK) = 0;
    /// dw (f32 [N, K]) += dy^T x.
    virtual void linear_backward_weight(const Tensor& dy_TN, const Tensor& x_TK, const Tensor& dw_NK) = 0;

    /// y = x W^T + bias; bias f32 [1, N].
    virtual void linear_bias(const Tensor& x_TK, const PackedWeight& w, const Tensor& bias, const Tensor& y_TN) = 0;
    /// dbias (f32 [1, N]) += sums over rows of dy, in order of the rows.
    virtual void bias_backward(const Tensor& dy_TN, const Tensor& dbias) = 0;

    // --- elementwise ------------------------------------------------------------------------------------------------
    /// x (f32 [T, H]) = embedding[token]; embedding f32 or bf16 [V, H].
    virtual void embed(std::span<const std::int32_t> tokens, const Tensor& embedding_VH, const Tensor& x_TH) = 0;
    /// d_embedding (f32 [V, H])[token] += dx.
    virtual void embed_backward(std::span<const std::int32_t> tokens, const Tensor& dx_TH, const Tensor& d_embedding_VH) = 0;
    /// y = gain * x / sqrt(mean(x^2) + eps); x f32, gain f32 [1, H], rstd f32 [1, T] is written (may be empty).
    virtual void rms_norm(const Tensor& x_TH, const Tensor& gain, float eps, const Tensor& y_TH, const Tensor& rstd) = 0;
    /// dx (f32) += backward; dgain (f32 [1, H]) += unless it is empty.
    virtual void rms_norm_backward(const Tensor& x_TH, const Tensor& gain, const Tensor& rstd, const Tensor& dy_TH,
                                   const Tensor& dx_TH, const Tensor& dgain) = 0;
    /// Rotates query and key heads of qkv [T, QKV] in place (half-split convention of Llama in transformers).
    /// cos, sin: f32 [positions, D/2]; backward = true rotates by the negative angle.
    virtual void rope(const Tensor& qkv, const AttentionShape& shape, std::span<const std::int32_t> positions, const Tensor& cos,
                      const Tensor& sin, bool backward) = 0;
    /// a [T, I] = silu(gate) * up; gate_up [T, 2I] = gate | up.
    virtual void swiglu(const Tensor& gate_up, const Tensor& a_TI) = 0;
    /// In place: gate_up becomes d(gate) | d(up), given da; a_TI receives the recomputed silu(gate) * up.
    virtual void swiglu_backward(const Tensor& gate_up, const Tensor& da_TI, const Tensor& a_TI) = 0;
    /// x (f32) += residual unless that is empty; then y = gain * (x - mean(x)) / sqrt(variance(x) + eps) + bias. gain, bias
    /// f32 [1, H]; mean, rstd f32 [1, T] are written (may be empty). y may be residual.
    virtual void layer_norm(const Tensor& x_TH, const Tensor& residual_TH, const Tensor& gain, const Tensor& bias, float eps,
                            const Tensor& y_TH, const Tensor& mean, const Tensor& rstd) = 0;
    /// dx (f32, overwritten; may be dy) from dy, for the x that layer_norm normalised; dgain, dbias (f32 [1, H]) +=, each
    /// unless it is empty.
    virtual void layer_norm_backward(const Tensor& x_TH, const Tensor& gain, const Tensor& mean, const Tensor& rstd,
                                     const Tensor& dy_TH, const Tensor& dx_TH, const Tensor& dgain, const Tensor& dbias) = 0;
    /// a = x Phi(x), Phi the normal distribution function (GELU with erf). a may be x.
    virtual void gelu(const Tensor& x_TI, const Tensor& a_TI) = 0;
    /// In place: x becomes its gradient, given da; a receives the recomputed gelu(x).
    virtual void gelu_backward(const Tensor& x_TI, const Tensor& da_TI, const Tensor& a_TI) = 0;
    /// x = tanh(x), in place.
    virtual void tanh(const Tensor& x) = 0;
    /// dy *= 1 - y^2, in place, y = tanh(x).
    virtual void tanh_backward(const Tensor& y, const Tensor& dy) = 0;
    /// out[i] = x[index[i]]; indices may repeat.
    virtual void gather_rows(const Tensor& x, std::span<const std::int64_t> index, const Tensor& out) = 0;
    /// to = from, both [T, N], of f32 or bf16; rounded to nearest even. They do not overlap.
    virtual void convert(const Tensor& from, const Tensor& to) = 0;
    /// x[index[i]] += d[i] (x f32), in order of i.
    virtual void scatter_add_rows(const Tensor& d, std::span<const std::int64_t> index, const Tensor& x) = 0;

    // --- attention --------------------------------------------------------------------------------------------------
    /// out [T, NH*D] from rotated qkv [T, QKV]; lse f32 [NH, T] (log of the softmax denominator of scaled scores).
    virtual void attention(const Tensor& qkv, const AttentionShape& shape, std::span<const Segment> segments, const Tensor& out,
                           const Tensor& lse) = 0;
    /// dqkv [T, QKV] (overwritten) from dout.
    virtual void attention_backward(const Tensor& qkv, const AttentionShape& shape, std::span<const Segment> segments,
                                    const Tensor& out, const Tensor& lse, const Tensor& dout, const Tensor& dqkv) = 0;
    /// out [T, NH*D] from qkv [T, 3*NH*D] = queries | keys | values and relative [S, 2*NH*D] = relative queries RQ | relative
    /// keys RK; segments without trunks; lse f32 [NH, T] (may be empty).
    virtual void disentangled_attention(const Tensor& qkv, const Tensor& relative, const DisentangledShape& shape,
                                        std::span<const Segment> segments, const Tensor& out, const Tensor& lse) = 0;
    /// dqkv [T, 3*NH*D] and drelative [S, 2*NH*D] (both overwritten) from dout.
    virtual void disentangled_attention_backward(const Tensor& qkv, const Tensor& relative, const DisentangledShape& shape,
                                                 std::span<const Segment> segments, const Tensor& out, const Tensor& lse,
                                                 const Tensor& dout, const Tensor& dqkv, const Tensor& drelative) = 0;
    /// Memory is reserved, not touched, until positions are written.
    virtual std::unique_ptr<KvCache> make_cache(std::int64_t layers, std::int64_t slots, std::int64_t capacity,
                                                const AttentionShape& shape) = 0;
    /// Writes this step's keys and values into the cache, then attends each token to its sequence up to itself; span by span.
    virtual void attention_cached(const Tensor& qkv, const AttentionShape& shape, KvCache& cache, std::int64_t layer,
                                  std::span<const CachedSpan> spans, const Tensor& out) = 0;
    /// At least `rows`: of how many rows a step of so many sequences is best made up.
    virtual std::int64_t step_rows(std::int64_t rows) const { return rows; }
    /**
     * @brief Runs `body`, which calls this engine's operations with the arrays of `step` and with `cache`.
     *
     * An engine may record what its device does meanwhile, and at a later step of as many rows repeat that instead of running
     * body. So body does the same for every step of this cache with so many rows: to the same matrices and weights, with
     * nothing from the host but the arrays of `step`, and to no other end. What was recorded is let go when the engine
     * allocates, as buffers may then be others.
     */
    virtual void run_step(const SingleTokenStep& step, KvCache& cache, const std::function<void()>& body)
    {
        static_cast<void>(step), static_cast<void>(cache);
        body();
    }

    // --- output head ------------------------------------------------------------------------------------------------
    /// logits f32 [R, V].
    virtual void logits(const Tensor& h_RH, const PackedWeight& head, const Tensor& logits_RV) = 0;
    /// log softmax(h W^T)[target] and the log-sum-exp, f32 [R] each (host), in chunks: no [R, V] matrix exists.
    virtual void head_log_probs(const Tensor& h_RH, const PackedWeight& head, std::span<const std::int32_t> targets,
                                std::span<float> log_probs, std::span<float> lse) = 0;
    /// For loss L with g = dL/dlog_prob: dh = d L/d h (overwritten), dw (f32 [V, H]) += dL/dW unless it is empty; recomputes
    /// logits in chunks.
    virtual void head_log_probs_backward(const Tensor& h_RH, const PackedWeight& head, std::span<const std::int32_t> targets,
                                         std::span<const float> lse, std::span<const float> g, const Tensor& dh_RH,
                                         const Tensor& dw_VH) = 0;
};

struct EngineOptions {
    std::string engine = "auto"; ///< auto | xsmm | aten; auto = xsmm on CPUs with AVX2 and FMA or better, else aten
    Device device = Device::cpu;
    int threads = 1;             ///< of ATen; xsmm uses one thread per rank
    DType activation = DType::bf16; ///< of activations and weights on CUDA devices; of CPUs it is f32
    /// Of xsmm. bf16: the operands of products are rounded to bf16 and the products summed in f32, where the CPU multiplies
    /// bf16 numbers (AVX-512 BF16); elsewhere products are f32, and description() says so. f32: products of f32 numbers.
    DType products = DType::f32;
};

/// @throws Error configuration when the engine cannot run here (says why) or the device was not built.
std::unique_ptr<Engine> make_engine(const EngineOptions& options);

/// Sets up Kokkos for the life of the object; once per process, before make_engine.
class KernelRuntime {
  public:
    explicit KernelRuntime(int threads);
    ~KernelRuntime();
    KernelRuntime(const KernelRuntime&) = delete;
    KernelRuntime& operator=(const KernelRuntime&) = delete;

  private:
    bool owns_kokkos_ = false; ///< false when the host program had initialised Kokkos itself
};

/// Round to nearest even, NaN kept.
std::uint16_t float_to_bf16(float value);
float bf16_to_float(std::uint16_t value);
/// values = float(bf16(values)).
void round_to_bf16(std::span<float> values);

/**
 * @brief One AdamW step on a shard, one pass over memory (Kokkos): m, v, master updated, compute = master (rounded to bf16
 * when round_bf16). Loshchilov & Hutter 2019; bias correction as torch.optim.AdamW: step_count counts from 1.
 * All spans have the same length. gradient is multiplied by gradient_scale first.
 */
struct AdamWOptions {
    double learning_rate = 0;
    double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8, weight_decay = 0;
    std::int64_t step_count = 1;
    double gradient_scale = 1;
    bool round_bf16 = false;
};
void adamw_step(const AdamWOptions& options, std::span<const float> gradient, std::span<float> master, std::span<float> exp_avg,
                std::span<float> exp_avg_sq, std::span<float> compute);

/// Sum of squares in double (deterministic order). Non-finite values give a non-finite sum.
double sum_of_squares(std::span<const float> values);

} // namespace selm
