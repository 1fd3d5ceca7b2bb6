#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "selm/kernels/engine.hpp"
#include "selm/model/decoder.hpp"
#include "selm/model/decoder_config.hpp"
#include "selm/model/model_files.hpp"
#include "selm/model/safetensors.hpp"

// DeBERTa-v2/v3 encoder (He et al., DeBERTa, 2021) with the two-candidate head of PairRM (Jiang et al., LLM-Blender,
// 2023) on top: see pair_model.hpp. T tokens, H hidden, I intermediate, S relative positions (2 x attention span).
namespace selm {

/// Shape of a DeBERTa-v2 encoder and of the head above it, if there is one.
struct DebertaConfig {
    std::int64_t vocabulary = 0;   ///< V, rows of the word embedding
    std::int64_t hidden = 0;       ///< H
    std::int64_t intermediate = 0; ///< I
    std::int64_t layers = 0;
    std::int64_t heads = 0;
    double layer_norm_eps = 1e-7;
    std::int64_t position_buckets = 256;        ///< 0: one relative position per distance
    std::int64_t max_relative_positions = 512;  ///< distances beyond are the farthest one
    std::int64_t padding_token = 0;             ///< as in transformers its embedding row gets no gradient; -1: none
    bool has_head = false;                      ///< the directory holds head_layer.*: it is a pair ranker
    /// Of config.json where it names them (PairRM-hf does), else -1.
    std::int64_t source_prefix_id = -1, candidate1_prefix_id = -1, candidate2_prefix_id = -1, candidate_prefix_id = -1;

    std::int64_t head_dim() const { return hidden / heads; }
    std::int64_t attention_span() const { return position_buckets > 0 ? position_buckets : max_relative_positions; }
    std::int64_t relative_positions() const { return 2 * attention_span(); } ///< S, rows of rel_embeddings

    /**
     * @brief Reads config.json and the shapes of the weight files. Layouts: PairRM-hf and plain DeBERTa-v2/v3 (a
     * DebertaV2 config); llm-blender/PairRM (a RankerConfig, which names the base model but has no shapes: they are
     * those of the tensors, with DeBERTa-v3's constants: heads of 64, span 512, eps 1e-7).
     * @throws Error configuration naming file and key: missing, another architecture, or a part that is not supported
     * (convolution, absolute positions, token types, own position projections, another activation).
     * bad_data: malformed weight files.
     */
    static DebertaConfig from_directory(const std::string& directory);
};

/// Row of rel_embeddings for a distance (query position - key position): buckets that widen logarithmically beyond half
/// the span, evaluated in float in the order in which transformers does (its ceil decides at the edges). Not clamped
/// distances are allowed.
std::int32_t relative_position_index(const DebertaConfig& config, std::int64_t distance);

/**
 * @brief Parameters in order: word_embeddings; embeddings' LayerNorm gain, bias; rel_embeddings; encoder's LayerNorm
 * gain, bias; per layer the 16 of DebertaLayerParameter; then the head's: head_layer.1 weight [H, 2H], bias;
 * head_layer.4 weight [1, H], bias. Names are PairRM's ("pretrained_model." in front of the encoder's). Vectors are
 * [1, n]. The head's are listed whether or not the directory has them: a pair ranker that is to be trained needs them.
 */
std::vector<ParameterSpec> pair_parameters(const DebertaConfig& config);

/// Indices within a layer's block of pair_parameters().
enum class DebertaLayerParameter : std::int64_t {
    query_weight,
    query_bias,
    key_weight,
    key_bias,
    value_weight,
    value_bias,
    attention_output_weight,
    attention_output_bias,
    attention_norm_gain,
    attention_norm_bias,
    intermediate_weight,
    intermediate_bias,
    output_weight,
    output_bias,
    output_norm_gain,
    output_norm_bias,
    count
};

/// Indices into pair_parameters().
struct PairParameterIndex {
    static constexpr std::int64_t embedding = 0, embedding_norm_gain = 1, embedding_norm_bias = 2,
                                  relative_embedding = 3, relative_norm_gain = 4, relative_norm_bias = 5;
    static std::int64_t layer(std::int64_t layer, DebertaLayerParameter parameter)
    {
        return 6 + static_cast<std::int64_t>(DebertaLayerParameter::count) * layer +
               static_cast<std::int64_t>(parameter);
    }
    static std::int64_t head(const DebertaConfig& c)
    {
        return 6 + static_cast<std::int64_t>(DebertaLayerParameter::count) * c.layers;
    }
    static std::int64_t head_hidden_weight(const DebertaConfig& c) { return head(c); }
    static std::int64_t head_hidden_bias(const DebertaConfig& c) { return head(c) + 1; }
    static std::int64_t head_output_weight(const DebertaConfig& c) { return head(c) + 2; }
    static std::int64_t head_output_bias(const DebertaConfig& c) { return head(c) + 3; }
    static std::int64_t count(const DebertaConfig& c) { return head(c) + 4; }
};

/// Does the checkpoint hold this parameter (under PairRM's, DebertaForMaskedLM's "deberta." or DebertaModel's name)?
bool has_pair_parameter(const SafetensorsReader& reader, const ParameterSpec& spec);

/**
 * @brief Reads elements [begin, begin+out.size()) of a parameter as f32, not rounded. A word embedding with more rows
 * than the spec is cut (PairRM's own was: 128,100 rows, 128,005 tokens).
 * @throws Error bad_data naming the tensor: missing, of another shape.
 */
void read_pair_parameter(const SafetensorsReader& reader, const ParameterSpec& spec, std::int64_t begin,
                         std::span<float> out);

/// The tensors of a pair ranker's checkpoint by PairRM's names, as write_pair_weights() writes them.
std::vector<SafetensorSpec> pair_tensors(const DebertaConfig& config);

/// Writes the weights under PairRM's names into @p directory, as write_safetensors() does. Parameters are read in
/// blocks: no full copy exists. config.json and the tokenizer's files are the caller's. @throws Error io.
void write_pair_weights(const std::string& directory, const DebertaConfig& config, const ParameterReader& read,
                        DType dtype, std::int64_t max_shard_bytes = 5'000'000'000);

} // namespace selm
