#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "bf16_softmax.hpp"
#include "selm/kernels/engine.hpp"
#include "xsmm_gemm.hpp"
#include "xsmm_memory.hpp"

namespace selm::xsmm {

/**
 * @brief Engine for x86 CPUs: small matrix kernels on weights packed in panels, activations in f32, one thread. The kernels
 * are LIBXSMM's; f32 products with weights use those of avx2_gemm.hpp on CPUs without AVX-512.
 *
 * Panels: forward [ceil(N/nb)][K][nb] with outputs innermost, backward [ceil(K/nb)][N][nb] with inputs innermost; nb is
 * the kernels' panel width and the last panel is padded with zeros. Panels are f32, but forward panels of weights
 * packed without backward, all of whose values are bf16 numbers, are bf16: decoding reads half the memory, and each
 * piece is expanded to f32 right before it is multiplied, so that the results have the same bits. A header in front
 * of the forward panels says which: another rank may have packed them.
 *
 * With bf16 operands all panels are bf16, forward [ceil(N/nb)][ceil(K/2)][nb][2] and backward [ceil(K/nb)][ceil(N/2)][nb][2]:
 * two numbers that follow one another in the sum are neighbours (pairs, bf16_rows.hpp). Rows are rounded as they are
 * multiplied.
 */
class XsmmEngine final : public Engine {
  public:
    /// Which kernels multiply panels: LIBXSMM's where it has AVX-512 code, else those of avx2_gemm.hpp.
    enum class Products { automatic, libxsmm };
    explicit XsmmEngine(Products products = Products::automatic, DType operands = DType::f32);

    std::string name() const override { return "xsmm"; }
    std::string numerics() const override { return uses_bf16_ ? "xsmm-bf16" : "xsmm"; }
    std::string description() const override;
    Device device() const override { return Device::cpu; }
    DType activation_dtype() const override { return DType::f32; }
    DType cache_dtype() const override { return uses_bf16_ ? DType::bf16 : DType::f32; }
    DType saved_dtype() const override { return uses_bf16_ ? DType::bf16 : DType::f32; }
    std::int64_t prefix_granularity() const override { return 2; } // values lie in pairs
    bool row_invariant() const override { return kernels_.is_row_invariant(); }

    Tensor allocate(std::int64_t rows, std::int64_t columns, DType dtype) override;
    std::int64_t allocated_bytes() const override { return memory_.allocated_bytes(); }
    std::int64_t peak_allocated_bytes() const override { return memory_.peak_allocated_bytes(); }
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
    void gather_rows(const Tensor& x, std::span<const std::int64_t> index, const Tensor& out) override;
    void convert(const Tensor& from, const Tensor& to) override;
    void scatter_add_rows(const Tensor& d, std::span<const std::int64_t> index, const Tensor& x) override;

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

    void logits(const Tensor& h_RH, const PackedWeight& head, const Tensor& logits_RV) override;
    void head_log_probs(const Tensor& h_RH, const PackedWeight& head, std::span<const std::int32_t> targets,
                        std::span<float> log_probs, std::span<float> lse) override;
    void head_log_probs_backward(const Tensor& h_RH, const PackedWeight& head, std::span<const std::int32_t> targets,
                                 std::span<const float> lse, std::span<const float> g, const Tensor& dh_RH,
                                 const Tensor& dw_VH) override;

  private:
    /// Panels of a weight, f32 or bf16: the other pointer is null.
    struct Panels {
        const float* f32 = nullptr;
        const std::uint32_t* bf16 = nullptr; ///< two numbers a word
        const float* pairs = nullptr;        ///< operands of bf16 products, two numbers in the place of a float
        Panels from(std::int64_t element) const
        {
            return {.f32 = f32 == nullptr ? nullptr : f32 + element,
                    .bf16 = bf16 == nullptr ? nullptr : bf16 + element / 2,
                    .pairs = pairs == nullptr ? nullptr : pairs + element / 2};
        }
    };
    static Panels forward_panels(const PackedWeight& w);
    Panels backward_panels(const PackedWeight& w) const;
    /// Numbers of a panel whose sums have `depth` terms.
    std::int64_t panel_numbers(std::int64_t depth) const;
    void pack_panels(const Tensor& weight, bool is_bf16, const PackedWeight& out);
    void pack_pairs(const Tensor& weight, const PackedWeight& out);

    /// y[rows, outputs] = or += x[rows, inputs] times panels.
    struct PanelProduct {
        const float* x = nullptr;
        std::int64_t x_stride = 0;
        const float* rounded_x = nullptr; ///< bf16 operands: x in pairs of neighbours, where it has been rounded already
        std::int64_t rows = 0, inputs = 0, outputs = 0;
        Panels panels;
        std::int64_t panel_elements = 0; ///< from one panel to the next; 0: those of `inputs`
        float* y = nullptr;
        std::int64_t y_stride = 0;
        const float* bias = nullptr; ///< [outputs], added to each row unless null; not with accumulate
        bool accumulate = false;
    };
    void multiply(const PanelProduct& product);
    static void multiply_block(const PanelProduct& product, std::int64_t row, std::int64_t rows, std::int64_t output);
    void multiply_libxsmm(const PanelProduct& product);
    void multiply_bf16(const PanelProduct& product);
    void multiply_linear(const Tensor& x_TK, const PackedWeight& w, const Tensor& y_TN, const float* bias,
                         bool accumulate);

    /// Operands of a weight gradient for some tokens; with bf16 operands pairs of rows are in the places of rows.
    struct GradientBlock {
        const float* dy_transposed = nullptr; ///< [N][rows]
        const float* x_panels = nullptr;      ///< [ceil(K/nb)][rows][nb]
        std::int64_t rows = 0;
    };
    /// dw[n][k] += sum over t of dy_transposed[n][t] * x[t][k], block by block: a tile of dw is read and written once for all
    /// of them.
    struct WeightGradient {
        std::span<const GradientBlock> blocks;
        std::int64_t outputs = 0, inputs = 0;
        float* dw = nullptr;
        std::int64_t dw_stride = 0;
    };
    void add_weight_gradient(const WeightGradient& gradient);
    /// Rows of f32 numbers, or of pairs, that `rows` rows take in x_panels and dy_transposed.
    std::int64_t gradient_rows(std::int64_t rows) const;
    /// x_panels [ceil(columns/nb)][gradient_rows(rows)][nb] of a row-major matrix; the padding of the last panel is cleared.
    void make_column_panels(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns,
                            float* panels) const;
    /// dy_transposed [columns][gradient_rows(rows)] of a row-major matrix.
    void transpose_gradient(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns,
                            float* to);

    /// Query rows of one head against a list of key tiles.
    struct KeyTile {
        const float* keys_transposed = nullptr; ///< [D][64]
        const float* values = nullptr;          ///< rows of D
        std::int32_t keys = 0;                  ///< valid ones, at most 64
        bool is_diagonal = false;               ///< query i sees keys 0..i only
    };
    struct QueryTile {
        const float* queries = nullptr;
        float* out = nullptr;
        float* lse = nullptr; ///< may be null
        std::int32_t rows = 0, head_dim = 0, query_stride = 0, value_stride = 0, out_stride = 0;
        std::int32_t before = 0; ///< keys of the diagonal tile before the first query's own
        float scale = 0;
    };
    void attend(const QueryTile& queries, std::span<const KeyTile> tiles);
    struct BackwardTile;
    struct BackwardKeys {
        const float* key_rows = nullptr;
        const float* value_rows = nullptr;
        float* d_key_rows = nullptr;
        float* d_value_rows = nullptr;
        std::int32_t keys = 0;
        bool is_diagonal = false; ///< query i sees keys 0..i only
    };
    /// Adds one tile's part to the gradients of its queries, keys and values.
    void attend_backward(const BackwardTile& queries, const BackwardKeys& keys);

    /// With operands rounded to bf16 (pairs: bf16_rows.hpp).
    struct Bf16KeyTile {
        const float* keys = nullptr;   ///< pairs, blocks of [D/2][64]
        const float* values = nullptr; ///< pairs of keys, rows of D
        std::int32_t count = 0;        ///< valid keys, at most two blocks
        std::int32_t first_query = 0;  ///< earlier ones see none of the keys
        std::int32_t before = 0;       ///< diagonal: keys before the one of query first_query
        bool is_diagonal = false;      ///< query first_query + i sees keys 0..before + i only
    };
    struct Bf16QueryTile {
        const float* from = nullptr; ///< the group's heads, side by side
        float* out = nullptr;
        float* lse = nullptr; ///< of the group's first head; may be null
        std::int64_t queries = 0, group = 0, head_dim = 0, stride = 0, out_stride = 0, lse_stride = 0;
        float scale = 0;
    };
    /// Appends blocks 0 .. blocks - 1 of a sequence of that many positions.
    void append_bf16_tiles(const float* keys, const float* values, std::int64_t blocks, std::int64_t positions,
                           std::int64_t head_dim);
    /// @param before keys of the block before the first query's own.
    void append_bf16_diagonal(const float* keys, const float* values, std::int64_t count, std::int64_t head_dim,
                              std::int64_t before = 0);
    void attend_bf16(const Bf16QueryTile& queries, std::span<const Bf16KeyTile> tiles);
    void attention_bf16(const Tensor& qkv, const AttentionShape& shape, std::span<const Segment> segments,
                        const Tensor& out, const Tensor& lse);
    struct Bf16BackwardTile;
    struct Bf16BackwardKeys {
        const float* key_rows = nullptr; ///< pairs [keys][D/2]
        const float* value_rows = nullptr;
        const float* keys_transposed = nullptr; ///< bf16 [D][64]
        float* d_key_rows = nullptr;
        float* d_value_rows = nullptr;
        std::int64_t d_stride = 0;
        std::int32_t count = 0, first_query = 0;
        bool is_diagonal = false; ///< query first_query + i sees keys 0..i only
    };
    void attend_backward_bf16(const Bf16BackwardTile& queries, const Bf16BackwardKeys& keys, bool is_first);
    void attention_backward_bf16(const Tensor& qkv, const AttentionShape& shape, std::span<const Segment> segments,
                                 const Tensor& out, const Tensor& lse, const Tensor& dout, const Tensor& dqkv);

    /// One token against the cached positions up to its own.
    void decode_row(const float* qkv_row, const AttentionShape& shape, const KvCache& any_cache, std::int64_t layer,
                    std::int64_t slot, std::int64_t position, float* out_row);
    /// The span's tokens, tile by tile, against the cached positions up to their own.
    void prefill_span(const Tensor& qkv, const AttentionShape& shape, const KvCache& any_cache, std::int64_t layer,
                      const CachedSpan& span, const Tensor& out);

    /// What attention_cached does with one span, in bf16.
    void attend_span_bf16(const Tensor& qkv, const AttentionShape& shape, const KvCache& any_cache, std::int64_t layer,
                          const CachedSpan& span, const Tensor& out);
    void decode_row_bf16(const float* qkv_row, const AttentionShape& shape, const KvCache& any_cache, std::int64_t layer,
                         std::int64_t slot, std::int64_t position, float* out_row);

    /// What the tiles of one head and segment share in disentangled attention.
    struct DisentangledHead;
    void prepare_head(DisentangledHead& head, const Tensor& qkv, const Tensor& relative, const DisentangledShape& shape,
                      std::int64_t index);
    /// to [rows][head.operand_floats] = rows of head_dim numbers.
    static void copy_operands(const DisentangledHead& head, const float* from, std::int64_t stride, std::int64_t rows,
                              float* to);
    void prepare_segment(DisentangledHead& head, const Segment& segment);
    /// to [count][head.stride] = rows of queries or keys times the transposed relative rows of some blocks.
    void multiply_relative(const DisentangledHead& head, const float* blocks, const float* rows, std::int64_t count,
                           float* to);
    /// scores [rows][64] of a tile, not scaled: content, content to position, position to content.
    void score_disentangled(const DisentangledHead& head, std::int64_t query, std::int64_t key, float* scores);
    void attend_disentangled(const DisentangledHead& head, std::int64_t query, const Tensor& out, const Tensor& lse);
    struct DisentangledGradients;
    void prepare_gradients(DisentangledGradients& to, const DisentangledHead& head, const Tensor& relative);
    void prepare_gradients(DisentangledGradients& to, const DisentangledHead& head);
    /// One product of the backward pass, added: `count` rows of `depth` numbers times as many rows of head_dim numbers.
    struct DisentangledProduct {
        const float* rows = nullptr; ///< rounded here
        std::int64_t stride = 0, count = 0, depth = 0;
        const float* factor = nullptr; ///< rows, or pairs of rows
        std::int64_t factor_stride = 0;
        float* sums = nullptr;
        std::int64_t sum_stride = 0;
    };
    void add_product(const DisentangledHead& head, const DisentangledProduct& product);
    void attend_disentangled_backward(const DisentangledHead& head, std::int64_t query,
                                      const DisentangledGradients& to);
    void finish_disentangled_backward(const DisentangledHead& head, const DisentangledGradients& to);

    /// Logits of some rows for some vocabulary columns; the tile's row stride is that of a whole tile.
    void multiply_head_tile(const Tensor& h_RH, const float* rounded, const PackedWeight& head, std::int64_t row,
                            std::int64_t rows, std::int64_t column, std::int64_t columns, float* tile);
    /// With bf16 operands: h in pairs of neighbours; else null.
    const float* rounded_for_head(const Tensor& h_RH);

    GemmKernels kernels_;
    bool uses_avx2_ = false; ///< f32 panels are multiplied by the kernels of avx2_gemm.hpp, else by LIBXSMM's
    bool wants_bf16_ = false; ///< asked for
    bool uses_bf16_ = false;  ///< operands of products are bf16
    MemoryPool memory_;
    Scratch expanded_, row_sums_, rounded_rows_, x_panels_, dy_transposed_, score_tile_, output_tile_, keys_transposed_, backward_tiles_,
        decode_scores_, logit_tile_, logit_gradient_, head_rows_, relative_blocks_, contents_, values_transposed_,
        content_to_position_, position_to_content_, relative_gradient_, position_gradient_, gradient_operands_;
    std::vector<KeyTile> key_tiles_;
    Scratch query_pairs_, weight_tile_;
    std::vector<Bf16KeyTile> bf16_key_tiles_;
    std::vector<Bf16RowState> row_states_;
};

} // namespace selm::xsmm
