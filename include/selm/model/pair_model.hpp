#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "selm/kernels/engine.hpp"
#include "selm/model/deberta.hpp"

namespace selm {

/// One ordered pair as the model reads it, "[CLS] <|source|> x [SEP] [CLS] <|candidate1|> a [SEP] [CLS] <|candidate2|>
/// b [SEP]", and where its three prefix tokens stand.
struct PairInput {
    std::vector<std::int32_t> ids; ///< at least one token, no padding
    std::int64_t source = 0;       ///< positions in ids
    std::int64_t left = 0;
    std::int64_t right = 0;
};

/**
 * @brief Weights of encoder and head, resident and packed; as ResidentWeights.
 *
 * Node-shared use: every rank of a node passes the same shared memory; rank r of n fills parameters r, r+n, ...; the
 * caller fences before use.
 */
class PairWeights {
  public:
    struct Options {
        DType dtype = DType::bf16; ///< bf16: values are rounded to bf16 on loading
        bool with_backward = false;
        int part = 0, parts = 1;   ///< this rank fills parameters i with i % parts == part
    };
    /// f32 elements that `memory` must hold; 0 for an engine on a device.
    static std::int64_t memory_elements(const DebertaConfig& config, const Engine& engine, bool with_backward);

    /// From a checkpoint directory. @param memory f32 [1, memory_elements()] at 64-byte alignment, filled by all parts
    /// and kept alive by the caller; empty: private memory from the engine (one part).
    /// @throws Error configuration when the checkpoint has no head; as SafetensorsReader.
    PairWeights(const DebertaConfig& config, Engine& engine, const SafetensorsReader& reader, const Options& options,
                const Tensor& memory);
    /// From flat parameters: `parameters[i]` is f32 [rows, columns] of pair_parameters()[i], borrowed for the object's
    /// life. Their values are used as they are: whoever wants bf16 rounds them.
    PairWeights(const DebertaConfig& config, Engine& engine, std::vector<Tensor> parameters, const Options& options);
    ~PairWeights();

    /// Repacks everything from the flat parameters after an optimizer step.
    void refresh();

    struct Impl;
    const Impl& impl() const { return *impl_; }

  private:
    std::unique_ptr<Impl> impl_;
};

/// All parameters in the order in which a backward pass completes them.
std::vector<std::int64_t> pair_backward_order(const DebertaConfig& config);

/**
 * @brief PairRM: a DeBERTa encoder and a head that scores the left and the right candidate from the hidden states of
 * the three prefix tokens; logit = left - right, > 0 means that the left one is better.
 *
 * head([s; c]) = W2 tanh(W1 [s; c] + b1) + b2. Sequences are packed without padding, and a sequence's logit has the
 * same bits whatever else is in the call (when Engine::row_invariant()). Damaged weights give non-finite logits: the
 * caller knows the rows and reports them. Does not communicate.
 */
class PairModel {
  public:
    PairModel(DebertaConfig config, Engine& engine, PairWeights& weights);
    ~PairModel();
    const DebertaConfig& config() const;
    Engine& engine() const;

    /// Logits in order of the inputs. Internally sorted by length and cut into batches of at most tokens_per_batch
    /// tokens (a longer sequence is a batch of its own).
    /// @throws Error bad_data naming a token id outside the vocabulary.
    std::vector<float> logits(std::span<const PairInput> inputs, std::int64_t tokens_per_batch = 4096);

    /// One batch whose activations are kept for backward.
    class Pass {
      public:
        virtual ~Pass() = default;
        virtual std::span<const float> logits() const = 0; ///< in order of the inputs
    };
    std::unique_ptr<Pass> forward_kept(std::span<const PairInput> inputs);
    /// Adds the gradients of sum_i g[i] * logit[i] to the sink's f32 buffers of pair_parameters() (empty: the parameter
    /// is frozen); ready() once per parameter in pair_backward_order(), also for an empty batch, which calls nothing
    /// else. Call once per pass.
    void backward(Pass& pass, std::span<const float> g, GradientSink& gradients);

    /// Last hidden states f32 [sum of lengths, H] of whole sequences (host), in order: for tests and other heads.
    std::vector<float> hidden_states(std::span<const std::vector<std::int32_t>> sequences);

    /// `work` is called before every layer of the passes from now on (none: empty), so that messages of others do not wait for a
    /// whole pass. It may not use the model.
    void set_between_layers(std::function<void()> work);

    /// Multiplications (of pairs of numbers) that a sequence of this length costs: for handing out work.
    static double cost(const DebertaConfig& config, std::int64_t length);
    /// Upper bound of activation bytes of a kept pass with this many tokens.
    std::int64_t activation_bytes(std::int64_t tokens) const;

    struct Impl;

  private:
    std::unique_ptr<Impl> impl_;
};

} // namespace selm
