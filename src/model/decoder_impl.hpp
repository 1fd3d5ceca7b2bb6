#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "buffer.hpp"
#include "rope.hpp"
#include "selm/model/decoder.hpp"

namespace selm {

/// What one layer reads and writes for T tokens. Without a backward pass the three residual streams are one tensor in
/// place, and the rstd are empty.
struct LayerActivations {
    Tensor x_in;     ///< f32 [T, H]
    Tensor rstd_in;  ///< f32 [1, T]
    Tensor qkv;      ///< [T, QKV], rotated
    Tensor attended; ///< [T, NH*D]
    Tensor lse;      ///< f32 [NH, T]
    Tensor x_mid;    ///< f32 [T, H], after attention
    Tensor rstd_mid; ///< f32 [1, T]
    Tensor gate_up;  ///< [T, 2I]
    Tensor x_out;    ///< f32 [T, H]
    /// Of a kept pass where Engine::saved_dtype() differs: what qkv, attended and gate_up, which all layers share then, are
    /// saved to and restored from.
    Tensor saved_qkv, saved_attended, saved_gate_up;
};

struct LayerBuffers {
    Buffer x_in, rstd_in, qkv, attended, lse, x_mid, rstd_mid, gate_up;
};

/// The activations that a kept pass saves; handed from pass to pass through the decoder. Of recomputed layers only x_in is
/// in use: for the rest they borrow the buffers of the first kept layer, which are free until its forward and after its
/// backward.
struct SavedLayers {
    std::vector<LayerBuffers> layers;
};

struct Decoder::Impl {
    Impl(DecoderConfig model, Engine& used_engine, WeightStore& store);

    DecoderConfig config;
    Engine& engine;
    WeightStore& weights;
    AttentionShape shape;
    float eps;
    DType activation;
    RopeTables rope;

    LayerBuffers work; ///< of passes that keep nothing
    /// x after a norm, or its gradient [T, H]; activated, then d_qkv [T, max(I, QKV)]; d_activated, then d_attended [T, max(I,
    /// NH*D)]; x after the last layer, in backward d_x f32 [T, H]; d_selected, x_selected f32 [R, H].
    Buffer normed, wide, d_wide, x_last, selected_rows;
    std::int64_t recomputed = 0; ///< layers of kept passes, less than all
    std::vector<std::int64_t> identity; ///< 0, 1, 2, ...: a gather by it is a copy
    std::shared_ptr<std::vector<std::unique_ptr<SavedLayers>>> spare =
        std::make_shared<std::vector<std::unique_ptr<SavedLayers>>>();

    /// @throws Error bad_data naming a token id outside the vocabulary or a position outside the context.
    void check_tokens(std::span<const std::int32_t> tokens, std::span<const std::int32_t> positions) const;
    void copy(const Tensor& from, const Tensor& to);

    /// A matrix of T rows in the activations' type.
    Tensor scratch(Buffer& buffer, std::int64_t tokens, std::int64_t columns)
    {
        return buffer.view(engine, tokens, columns, activation);
    }
    using Attention = std::function<void(const Tensor& qkv, const Tensor& attended)>;
    void forward_layer(const LayerWeights& w, const LayerActivations& a, std::span<const std::int32_t> positions,
                       const Attention& attention);
    /// The layer up to gate_up: all that backward needs.
    void forward_to_gate_up(const LayerWeights& w, const LayerActivations& a, std::span<const std::int32_t> positions,
                            const Attention& attention);
    void save(const LayerActivations& a);
    void restore(const LayerActivations& a);
    LayerActivations activations(Buffer& x_in, LayerBuffers& buffers, std::int64_t tokens, bool keep);
    Attention packed_attention(std::span<const Segment> segments, const Tensor& lse);
    /// hidden [R, H] = final norm of the given rows of x; x_selected and rstd are saved when not empty.
    void final_norm(const Tensor& x, std::span<const std::int64_t> rows, const Tensor& x_selected, const Tensor& rstd,
                    const Tensor& hidden);
    /// Asks for the head and releases it, also where there is nothing to score.
    void head_log_probs(const Tensor& hidden, std::span<const std::int32_t> targets, std::span<float> log_probs,
                        std::span<float> lse);
};

/// A pass, and for a kept one what backward needs. A pass without tokens (a rank without rows) has empty tensors.
class PassState final : public Decoder::Pass {
  public:
    ~PassState() override
    {
        if (saved)
            spare->push_back(std::move(saved)); // the next kept pass takes the memory over
    }
    Tensor hidden() const override { return hidden_RH; }
    std::int64_t tokens() const { return static_cast<std::int64_t>(batch.tokens.size()); }

    PackedBatch batch; ///< tokens, positions, segments and selected only
    bool kept = false;
    std::int64_t recomputed = 0; ///< layers of which only x_in is saved
    Tensor hidden_RH;
    Tensor x_selected; ///< f32 [R, H], before the final norm
    Tensor rstd;       ///< f32 [1, R]
    std::unique_ptr<SavedLayers> saved;
    std::vector<LayerActivations> layers;
    std::shared_ptr<std::vector<std::unique_ptr<SavedLayers>>> spare;
};

class ScoredPassState final : public Decoder::ScoredPass {
  public:
    std::span<const float> log_probs() const override { return values; }

    std::unique_ptr<Decoder::Pass> pass;
    std::vector<std::int32_t> targets;
    std::vector<float> values;
    std::vector<float> lse;
};

} // namespace selm
