#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "selm/kernels/engine.hpp"
#include "selm/model/decoder_config.hpp"
#include "selm/model/safetensors.hpp"

namespace selm {

struct LayerWeights {
    Tensor input_norm; ///< f32 [1, H]
    PackedWeight qkv;  ///< [QKV, H]
    PackedWeight out;  ///< [H, NH*D]
    Tensor post_norm;
    PackedWeight gate_up; ///< [2I, H]
    PackedWeight down;    ///< [H, I]
};

/// What a weight is wanted for. Backward needs the panels of linear_backward_input too, beside those of forward.
enum class WeightUse { forward, backward };

/**
 * @brief Where a decoder's weights come from. The caller injects it; a sharded store gathers in layer(), embedding() and
 * head(), and frees in the release functions.
 *
 * Such a store communicates in these calls, so Decoder makes them in an order that depends on nothing but the layers and
 * the pass: the same for a normal batch, for one without scored tokens and for one without tokens (see Decoder). Each
 * reference is valid until its release; until then nothing else is asked for but final_norm(). After the release the
 * decoder and the engine hold no handle to the weights: what they share the ownership of can be freed.
 */
class WeightStore {
  public:
    virtual ~WeightStore() = default;
    virtual const LayerWeights& layer(std::int64_t index, WeightUse use) = 0;
    virtual void release(std::int64_t index) = 0;
    virtual const Tensor& embedding() = 0; ///< [V, H] f32 or bf16
    virtual void release_embedding() {}
    /// f32 [1, H]. So small that every rank has it at all times: may be asked for whenever, never communicates.
    virtual const Tensor& final_norm() = 0;
    /// Language-model head [V, H] (the packed embedding when tied) or score head [1, H].
    virtual const PackedWeight& head(WeightUse use) = 0;
    virtual void release_head() {}
};

/// Parameters that a sharded store gathers together, as ends (exclusive) of ranges of decoder_parameters(): the embedding;
/// each layer; the final norm, with the score head of a sequence classifier; the language-model head when untied.
std::vector<std::int64_t> decoder_parameter_groups(const DecoderConfig& config);

/**
 * @brief All weights resident and packed. Reads a checkpoint directory, or is refreshed from a flat f32 parameter buffer.
 *
 * Node-shared use: every rank of a node passes the same shared memory; rank r of n packs parameters r, r+n, ...; the
 * caller fences before use.
 */
class ResidentWeights final : public WeightStore {
  public:
    struct Options {
        DType dtype = DType::bf16;   ///< bf16: values are rounded to bf16 on loading
        bool with_backward = false;
        int part = 0, parts = 1;     ///< this rank packs parameters i with i % parts == part
    };
    /// f32 elements that `memory` must hold for this config; 0 for an engine on a device, where weights are never shared.
    /// @param dtype as in Options: bf16 takes less.
    static std::int64_t memory_elements(const DecoderConfig& config, const Engine& engine, bool with_backward,
                                        DType dtype = DType::f32);

    /// From a checkpoint directory. @param memory f32 [1, memory_elements()] at 64-byte alignment, filled by all parts and
    /// kept alive by the caller; empty: private memory from the engine (one part). @throws Error as SafetensorsReader.
    ResidentWeights(const DecoderConfig& config, Engine& engine, const SafetensorsReader& reader, const Options& options,
                    const Tensor& memory);
    /// f32 elements of the packed weights alone: the `panels` of the flat form.
    static std::int64_t panel_elements(const DecoderConfig& config, const Engine& engine, bool with_backward);
    /// From flat parameters: `parameters[i]` is f32 [rows, columns] of decoder_parameters()[i], borrowed for the object's
    /// life. Their values are used as they are: whoever wants bf16 rounds them. @param panels f32 [1, panel_elements()],
    /// filled by all parts and kept alive by the caller; empty: private memory from the engine (one part).
    ResidentWeights(const DecoderConfig& config, Engine& engine, std::vector<Tensor> parameters, const Options& options,
                    const Tensor& panels = {});
    ~ResidentWeights() override;

    /// Repacks this part from the flat parameters after an optimizer step.
    void refresh();

    /// @param use backward: only when packed with_backward.
    const LayerWeights& layer(std::int64_t index, WeightUse use) override;
    void release(std::int64_t) override {}
    const Tensor& embedding() override;
    const Tensor& final_norm() override;
    const PackedWeight& head(WeightUse use) override;

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

} // namespace selm
