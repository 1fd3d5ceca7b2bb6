#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "buffer.hpp"
#include "pair_weights.hpp"
#include "selm/model/pair_model.hpp"

namespace selm {

/// Sequences one after another: what encoder and head read.
struct PairBatch {
    std::vector<std::int32_t> tokens;
    std::vector<Segment> segments;
    std::vector<std::int64_t> sources;    ///< per pair twice: of its left and its right half
    std::vector<std::int64_t> candidates; ///< per pair left, right
    std::int64_t longest = 0;

    void add(std::span<const std::int32_t> ids);
    void add(const PairInput& input);
};

/// x -> y = LayerNorm(sum), sum = x's branch + residual: what its backward needs.
struct NormActivations {
    Tensor sum;        ///< f32 [T, H], before the norm
    Tensor mean, rstd; ///< f32 [1, T]; empty when nothing is kept
};

/// What one layer reads and writes for T tokens, all f32.
struct EncoderActivations {
    Tensor x_in;       ///< [T, H]
    Tensor qkv;        ///< [T, 3H]
    Tensor attended;   ///< [T, H]
    Tensor lse;        ///< [heads, T]
    NormActivations attention_norm;
    Tensor x_mid;      ///< [T, H], after attention
    Tensor raised;     ///< [T, I], before the activation; fewer rows when nothing is kept
    NormActivations output_norm;
    Tensor x_out;      ///< [T, H]
};

struct EncoderBuffers {
    Buffer x_in, qkv, attended, lse, sum_mid, mean_mid, rstd_mid, x_mid, raised, sum_out, mean_out, rstd_out;
};

struct PairSavedLayers {
    std::vector<EncoderBuffers> layers;
    Buffer embedded, mean, rstd, x_out;
};

struct PairModel::Impl {
    Impl(DebertaConfig model, Engine& used_engine, PairWeights& store);

    using Layer = DebertaLayerParameter;
    using Index = PairParameterIndex;

    DebertaConfig config;
    Engine& engine;
    const PairWeights::Impl& weights;
    float eps;
    DisentangledShape shape;
    std::vector<std::int32_t> relative_index; ///< of distances up to the longest sequence seen
    EncoderBuffers work;                      ///< of passes that keep nothing
    Buffer embedded, relative_normed, relative_mean, relative_rstd, relative, pairs, head_hidden, head_out;
    Buffer d_x, d_raised, activated, d_hidden, d_qkv, d_relative, d_relative_normed, d_step;
    std::function<void()> between_layers; ///< may be empty
    std::vector<std::int64_t> identity; ///< 0, 1, 2, ...: a scatter by it is an addition
    std::shared_ptr<std::vector<std::unique_ptr<PairSavedLayers>>> spare =
        std::make_shared<std::vector<std::unique_ptr<PairSavedLayers>>>();

    Tensor f32(Buffer& buffer, std::int64_t rows, std::int64_t columns)
    {
        return buffer.view(engine, rows, columns, DType::f32);
    }
    const Tensor& values(std::int64_t parameter) const { return weights.values(parameter); }
    const PackedWeight& weight(std::int64_t layer, Layer parameter) const
    {
        return weights.weight(Index::layer(layer, parameter));
    }
    const Tensor& values(std::int64_t layer, Layer parameter) const
    {
        return weights.values(Index::layer(layer, parameter));
    }
    /// to += from, f32 of one shape.
    void add(const Tensor& from, const Tensor& to);

    /// Checks token ids and makes the table of relative positions cover the batch.
    void prepare(const PairBatch& batch);
    EncoderActivations activations(EncoderBuffers& buffers, std::int64_t tokens, bool keep);
    /// LayerNorm of the relative embeddings [S, H]: the same for all layers of a batch.
    Tensor normed_relative();
    /// A layer's relative queries and keys [S, 2H].
    Tensor project_relative(std::int64_t layer, const Tensor& normed);
    void embed(const PairBatch& batch, const NormActivations& norm, const Tensor& x);
    void forward_layer(std::int64_t layer, const PairBatch& batch, const EncoderActivations& a, const Tensor& normed);
    /// Last hidden states [T, H] of a batch, nothing kept.
    Tensor encode(const PairBatch& batch);
    /// Logits of a batch from its last hidden states; `pairs` and `head_hidden` hold what backward needs.
    std::vector<float> score(const PairBatch& batch, const Tensor& hidden, const Tensor& pairs_2N_2H,
                             const Tensor& hidden_2N_H);
};

} // namespace selm
