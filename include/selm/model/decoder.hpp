#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "selm/kernels/engine.hpp"
#include "selm/model/decoder_config.hpp"
#include "selm/model/packed.hpp"
#include "selm/model/weights.hpp"

namespace selm {

/// Receives weight gradients. Buffers are f32 [rows, columns] of decoder_parameters()[index]; backward adds to them.
class GradientSink {
  public:
    virtual ~GradientSink() = default;
    /// Asked for right before backward adds to it (a tied embedding's: for the head, and again for the inputs), and not at
    /// all where the pass adds nothing. Empty: the parameter is frozen, its gradient is not computed; the gradients of the
    /// others have the same bits as without.
    virtual Tensor gradient(std::int64_t parameter) = 0;
    /// Called once per backward pass and parameter, frozen ones too, when its gradient of this pass is complete: in
    /// backward_order(), whatever the batch.
    virtual void ready(std::int64_t parameter) = 0;
};

/// All parameters in the order in which a backward pass completes them: an untied language-model head (or score head, which
/// is left to the caller of Decoder::backward); the final norm; from the last layer to the first down, gate_up, post_norm,
/// out, qkv, input_norm; the embedding.
std::vector<std::int64_t> backward_order(const DecoderConfig& config);

/**
 * @brief Decoder-only transformer of the Llama family, written once against Engine with an explicit backward.
 *
 * Does not communicate itself; its WeightStore and its GradientSink may. Every call makes the same calls of them in the
 * same order, whatever the batch, also without scored tokens and without tokens:
 * - forward: embedding, release_embedding; of each layer from 0 on layer(forward), release.
 * - log_probs, forward_scored: forward; head(forward), release_head.
 * - backward: ready of the final norm; of each layer from the last on layer(backward), ready of its parameters, release;
 *   ready of the embedding.
 * - backward_scored: head(backward), release_head; ready of an untied head; backward.
 *
 * Bad input throws before the first of these calls. Row invariance follows the engine's: a packed row's results do not
 * depend on the other rows.
 */
class Decoder {
  public:
    Decoder(DecoderConfig config, Engine& engine, WeightStore& weights);
    ~Decoder();
    const DecoderConfig& config() const;
    Engine& engine() const;

    /// What a kept forward pass saves for backward.
    class Pass {
      public:
        virtual ~Pass() = default;
        virtual Tensor hidden() const = 0; ///< [R, H] after the final norm, at batch.selected
    };
    /// Runs all layers. @param keep false: saves nothing, backward is impossible. The batch is copied where needed.
    std::unique_ptr<Pass> forward(const PackedBatch& batch, bool keep);
    /// From d(loss)/d(hidden) [R, H]; consumes the pass's activations (call once).
    void backward(Pass& pass, const Tensor& d_hidden, GradientSink& gradients);

    /// Log-probs of batch.targets (f32, [R]), forward only.
    std::vector<float> log_probs(const PackedBatch& batch);

    /// Log-probs with a kept pass, then the backward of sum_i g[i] * log_prob[i].
    class ScoredPass {
      public:
        virtual ~ScoredPass() = default;
        virtual std::span<const float> log_probs() const = 0; ///< [R]
    };
    std::unique_ptr<ScoredPass> forward_scored(const PackedBatch& batch);
    void backward_scored(ScoredPass& pass, std::span<const float> g, GradientSink& gradients);

    /// Of kept passes from now on the first `layers` layers keep their inputs alone; backward runs their forward again, each
    /// right before its backward (Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016). Log-probs and gradients
    /// have the same bits as without, and stores and sinks see the same calls. What the recomputed layers write stands where
    /// the first kept layer's activations stand at another time: the last layer is kept even when `layers` counts it.
    /// Saved memory of earlier passes is let go. @param layers 0 to config().layers; 0 at first.
    void set_recompute(std::int64_t layers);

    /// decoder_activation_bytes of a kept pass with the layers of set_recompute.
    std::int64_t activation_bytes(std::int64_t tokens, std::int64_t scored) const;

    struct Impl;

  private:
    friend class DecodeSession;
    std::unique_ptr<Impl> impl_;
};

/// Of a pass's activations: while a layer computes, and of qkv, attended and gate_up until their backward.
struct ActivationTypes {
    ActivationTypes(DType both) : working(both), saved(both) {} // NOLINT: one type is the usual case
    ActivationTypes(DType at_work, DType kept) : working(at_work), saved(kept) {}
    DType working, saved;
};
ActivationTypes activation_types(const Engine& engine);

/**
 * @brief Bytes that a pass with its backward takes from the engine, beside weights and gradients: `tokens` tokens, `scored`
 * scored rows.
 *
 * Exact but for the rope tables, which are counted as for a single sequence of that many tokens. Passes of one decoder share
 * the memory: of several, one after another, it is the bytes of the most tokens and the most scored rows.
 * @param keep false: of a pass that saves nothing for backward. @param recomputed_layers as in Decoder::set_recompute.
 */
std::int64_t decoder_activation_bytes(const DecoderConfig& config, const ActivationTypes& types, std::int64_t tokens,
                                      std::int64_t scored, bool keep, std::int64_t recomputed_layers = 0);

struct RecomputePlan {
    std::int64_t layers = 0; ///< for Decoder::set_recompute
    std::int64_t bytes = 0;  ///< of a kept pass with these layers recomputed
    bool fits = false;       ///< false: even with all layers recomputed the pass takes `bytes`, more than the budget
};

/// The fewest recomputed layers with which a kept pass fits into `budget_bytes`.
RecomputePlan plan_recompute(const DecoderConfig& config, const ActivationTypes& types, std::int64_t tokens,
                             std::int64_t scored, std::int64_t budget_bytes);

/// A work item of a decoding step: tokens of one sequence at consecutive positions.
struct DecodeWork {
    std::int64_t slot = 0;
    std::int64_t position_begin = 0; ///< prefill: a multiple of prefill_tile, or behind a prefix
    std::span<const std::int32_t> tokens;
    bool prefill = false;
    bool wants_logits = false; ///< of the last token
    /// Not -1: the sequence begins with the position_begin tokens (see CachedSpan) of the sequence in this slot, which are read
    /// already or by earlier works of the step: their keys and values are copied.
    std::int64_t prefix_slot = -1;
};

/// Continuous-batching decoder state over a preallocated KV cache. For weights that are resident: which of them a step asks
/// for depends on its work.
class DecodeSession {
  public:
    /// @param repeat_steps steps of single tokens alone go through Engine::run_step.
    DecodeSession(Decoder& decoder, std::int64_t slots, std::int64_t capacity, bool repeat_steps = true);
    ~DecodeSession();
    /// Runs one step; result: f32 logits [number of works that want them, V] in work order, valid until the next step.
    Tensor step(std::span<const DecodeWork> work);

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

} // namespace selm
