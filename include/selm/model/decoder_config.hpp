#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "selm/kernels/engine.hpp"

namespace selm {

/**
 * @brief Rotary embeddings stretched as in Llama 3.1 (rope_type "llama3"): wavelengths of more than original_positions /
 * low_frequency_factor positions become `factor` times longer, those under original_positions / high_frequency_factor stay,
 * between them the two are mixed.
 */
struct Llama3RopeScaling {
    double factor = 1;
    double low_frequency_factor = 1;
    double high_frequency_factor = 4;    ///< above low_frequency_factor
    std::int64_t original_positions = 0; ///< context in tokens before stretching
    bool operator==(const Llama3RopeScaling&) const = default;
};

/// Shape of a decoder of the Llama family (Llama, Mistral, Phi-3), read from a Hugging Face config.json.
struct DecoderConfig {
    std::string model_type;              ///< "llama", "mistral" or "phi3"
    std::int64_t vocabulary = 0;         ///< V
    std::int64_t hidden = 0;             ///< H
    std::int64_t intermediate = 0;       ///< I
    std::int64_t layers = 0;
    std::int64_t heads = 0;              ///< NH
    std::int64_t kv_heads = 0;           ///< NK
    std::int64_t head_dim = 0;           ///< D
    /// Longest sequence in tokens: max_position_embeddings, or sliding_window where that is smaller (a longer sequence
    /// would need windowed attention, which the decoder does not have; up to there the two are the same).
    std::int64_t max_positions = 0;
    std::int64_t sliding_window = 0;     ///< where it is what limits max_positions (each token attends to the last that many)
    double rope_theta = 10000;
    std::optional<Llama3RopeScaling> rope_scaling;
    double rms_norm_eps = 1e-5;
    bool tied_embeddings = false;
    bool sequence_classifier = false;    ///< score.weight [1, H] instead of a language-model head
    /// pad_token_id, -1 when there is none. As in transformers (torch.nn.Embedding's padding_idx), this token's row of the
    /// embedding gets no gradient as an input; a tied head still trains it as an output.
    std::int64_t padding_token = -1;

    AttentionShape attention() const;
    std::int64_t qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
    /// "N tokens", for messages; says so where the sliding window is what limits it.
    std::string context() const;

    /// @throws Error configuration naming file and key: missing, malformed, or an unsupported architecture, activation, rope
    /// scaling, partial rotation or bias.
    static DecoderConfig from_directory(const std::string& directory);
};

/// A parameter as the decoder uses it (query, key and value fused; gate and up fused) and the tensors of the checkpoint
/// that are its row blocks, in order.
struct ParameterSpec {
    struct Part {
        std::string name;                ///< Hugging Face tensor name
        std::vector<std::int64_t> shape; ///< [rows, columns] or [columns]
        std::int64_t row_begin = 0;
        std::int64_t rows = 0;
    };
    std::string name;
    std::int64_t rows = 0;
    std::int64_t columns = 0;
    std::vector<Part> parts;
    std::int64_t elements() const { return rows * columns; }
};

/// Order: embed_tokens; per layer input_layernorm, qkv, o_proj, post_attention_layernorm, gate_up, down_proj; norm; then
/// lm_head when untied, or score for a sequence classifier. Norm gains are [1, H].
std::vector<ParameterSpec> decoder_parameters(const DecoderConfig& config);

/// Indices into decoder_parameters().
struct ParameterIndex {
    static constexpr std::int64_t embedding = 0;
    static std::int64_t input_norm(std::int64_t layer) { return 1 + 6 * layer; }
    static std::int64_t qkv(std::int64_t layer) { return 2 + 6 * layer; }
    static std::int64_t out(std::int64_t layer) { return 3 + 6 * layer; }
    static std::int64_t post_norm(std::int64_t layer) { return 4 + 6 * layer; }
    static std::int64_t gate_up(std::int64_t layer) { return 5 + 6 * layer; }
    static std::int64_t down(std::int64_t layer) { return 6 + 6 * layer; }
    static std::int64_t final_norm(const DecoderConfig& c) { return 1 + 6 * c.layers; }
    /// embedding when tied; the parameter after the final norm otherwise (lm_head or score).
    static std::int64_t head(const DecoderConfig& c)
    {
        return c.tied_embeddings && !c.sequence_classifier ? embedding : 2 + 6 * c.layers;
    }
};

} // namespace selm
