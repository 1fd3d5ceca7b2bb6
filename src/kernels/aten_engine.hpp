#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "aten_parts.hpp"
#include "selm/kernels/engine.hpp"

namespace selm {

class AtenKvCache;

/**
 * @brief The `aten` engine. CPU: f32 activations and weights. CUDA: activations and weights of
 * EngineOptions::activation, and attention by parts of its own.
 *
 * Row invariance (CPU, f32, one thread) rests on: matrix products of at least 8 rows with aligned rows (the BLAS takes
 * other kernels for fewer, and for small matrices at other alignments), and transcendental functions only on matrices
 * whose rows the iterator cannot merge into one run: vectorised bodies and scalar tails of exp differ in the last bit,
 * so where the tail falls may not depend on other rows.
 */
class AtenEngine final : public Engine {
  public:
    explicit AtenEngine(const EngineOptions& options, aten::Parts parts = {});
    ~AtenEngine() override;

    std::string name() const override { return "aten"; }
    std::string description() const override;
    Device device() const override { return device_; }
    DType activation_dtype() const override { return activation_; }
    bool row_invariant() const override
    {
        return device_ == Device::cpu && threads_ == 1 && !parts_.packed_attention && !parts_.cached_attention;
    }

    Tensor allocate(std::int64_t rows, std::int64_t columns, DType dtype) override;
    std::int64_t allocated_bytes() const override;
    std::int64_t peak_allocated_bytes() const override;
    void fill_zero(const Tensor& x) override;
    void copy_from_host(const void* host, const Tensor& to) override;
    void copy_to_host(const Tensor& from, void* host) override;

    std::int64_t packed_elements(std::int64_t outputs, std::int64_t inputs, bool with_backward) const override;
    PackedWeight pack(const Tensor& weight, bool with_backward, const Tensor& storage, bool already_packed) override;
    void linear(const Tensor& x_TK, const PackedWeight& w, const Tensor& y_TN) override;
    void linear_add(const Tensor& x_TK, const PackedWeight& w, const Tensor& y_TN) override;
    void linear_backward_input(const Tensor& dy_TN, const PackedWeight& w, const Tensor& dx_TK) override;
    void linear_backward_weight(const Tensor& dy_TN, const Tensor& x_TK, const Tensor& dw_NK) override;
    void linear_bias(const Tensor& x_TK, const PackedWeight& w, const Tensor& bias, const Tensor& y_TN) override;
    void bias_backward(const Tensor& dy_TN, const Tensor& dbias) override;

    void embed(std::span<const std::int32_t> tokens, const Tensor& embedding_VH, const Tensor& x_TH) override;
    void embed_backward(std::span<const std::int32_t> tokens, const Tensor& dx_TH,
                        const Tensor& d_embedding_VH) override;
    void rms_norm(const Tensor& x_TH, const Tensor& gain, float eps, const Tensor& y_TH, const Tensor& rstd) override;
    void rms_norm_backward(const Tensor& x_TH, const Tensor& gain, const Tensor& rstd, const Tensor& dy_TH,
                           const Tensor& dx_TH, const Tensor& dgain) override;
    void rope(const Tensor& qkv, const AttentionShape& shape, std::span<const std::int32_t> positions,
              const Tensor& cos, const Tensor& sin, bool backward) override;
    void swiglu(const Tensor& gate_up, const Tensor& a_TI) override;
    void swiglu_backward(const Tensor& gate_up, const Tensor& da_TI, const Tensor& a_TI) override;
    void layer_norm(const Tensor& x_TH, const Tensor& residual_TH, const Tensor& gain, const Tensor& bias, float eps,
                    const Tensor& y_TH, const Tensor& mean, const Tensor& rstd) override;
    void layer_norm_backward(const Tensor& x_TH, const Tensor& gain, const Tensor& mean, const Tensor& rstd,
                             const Tensor& dy_TH, const Tensor& dx_TH, const Tensor& dgain,
                             const Tensor& dbias) override;
    void gelu(const Tensor& x_TI, const Tensor& a_TI) override;
    void gelu_backward(const Tensor& x_TI, const Tensor& da_TI, const Tensor& a_TI) override;
    void tanh(const Tensor& x) override;
    void tanh_backward(const Tensor& y, const Tensor& dy) override;
    void gather_rows(const Tensor& x, std::span<const std::int64_t> rows, const Tensor& out) override;
    void convert(const Tensor& from, const Tensor& to) override;
    void scatter_add_rows(const Tensor& d, std::span<const std::int64_t> rows, const Tensor& x) override;

    void attention(const Tensor& qkv, const AttentionShape& shape, std::span<const Segment> segments, const Tensor& out,
                   const Tensor& lse) override;
    void attention_backward(const Tensor& qkv, const AttentionShape& shape, std::span<const Segment> segments,
                            const Tensor& out, const Tensor& lse, const Tensor& dout, const Tensor& dqkv) override;
    void disentangled_attention(const Tensor& qkv, const Tensor& relative, const DisentangledShape& shape,
                                std::span<const Segment> segments, const Tensor& out, const Tensor& lse) override;
    void disentangled_attention_backward(const Tensor& qkv, const Tensor& relative, const DisentangledShape& shape,
                                         std::span<const Segment> segments, const Tensor& out, const Tensor& lse,
                                         const Tensor& dout, const Tensor& dqkv, const Tensor& drelative) override;
    std::unique_ptr<KvCache> make_cache(std::int64_t layers, std::int64_t slots, std::int64_t capacity,
                                        const AttentionShape& shape) override;
    void attention_cached(const Tensor& qkv, const AttentionShape& shape, KvCache& cache, std::int64_t layer,
                          std::span<const CachedSpan> spans, const Tensor& out) override;
    std::int64_t step_rows(std::int64_t rows) const override;
    void run_step(const SingleTokenStep& step, KvCache& cache, const std::function<void()>& body) override;

    void logits(const Tensor& h_RH, const PackedWeight& head, const Tensor& logits_RV) override;
    void head_log_probs(const Tensor& h_RH, const PackedWeight& head, std::span<const std::int32_t> targets,
                        std::span<float> log_probs, std::span<float> lse) override;
    void head_log_probs_backward(const Tensor& h_RH, const PackedWeight& head, std::span<const std::int32_t> targets,
                                 std::span<const float> lse, std::span<const float> g, const Tensor& dh_RH,
                                 const Tensor& dw_VH) override;

  private:
    struct Memory;
    /// Sequences of a call of attention(), and which rows of the matrices their keys are; kept for the next layer.
    struct SegmentPlan;
    /// The rows of a call of attention_cached() by what computes them; kept for the next layer.
    struct CachedPlan;

    /// values on the device: those of the running step are there already.
    at::Tensor index(std::span<const std::int32_t> values) const;
    at::Tensor index(std::span<const std::int64_t> values) const;
    const SegmentPlan& segment_plan(std::span<const Segment> segments);
    const CachedPlan& cached_plan(std::span<const CachedSpan> spans, std::int64_t capacity);
    void packed_attention(const Tensor& qkv, const AttentionShape& shape, std::span<const Segment> segments, const Tensor& out,
                          const Tensor& lse);
    void packed_attention_backward(const Tensor& qkv, const AttentionShape& shape, std::span<const Segment> segments,
                                   const Tensor& out, const Tensor& lse, const Tensor& dout, const Tensor& dqkv);
    void cached_attention_by_parts(const Tensor& qkv, const AttentionShape& shape, AtenKvCache& cache, std::int64_t layer,
                                   std::span<const CachedSpan> spans, const Tensor& out);
    void prefill_attention(const at::Tensor& q, const AttentionShape& shape, AtenKvCache& cache, std::int64_t layer,
                           const CachedPlan& plan, at::Tensor out);

    std::shared_ptr<Memory> memory_;
    Device device_;
    DType activation_;
    int threads_;
    aten::Parts parts_;
    std::shared_ptr<SegmentPlan> segment_plan_;
    std::shared_ptr<CachedPlan> cached_plan_;
    /// The running step and its arrays on the device: i32 [4, rows] of tokens, positions, slots, rows.
    const SingleTokenStep* step_ = nullptr;
    at::Tensor step_inputs_;
};

} // namespace selm
