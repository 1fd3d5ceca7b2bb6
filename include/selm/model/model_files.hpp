#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "selm/kernels/tensor.hpp"
#include "selm/model/decoder_config.hpp"
#include "selm/model/safetensors.hpp"
#include "selm/model/safetensors_writer.hpp"

namespace selm {

struct ModelFilesOptions {
    DType dtype = DType::bf16; ///< of the weights that go beside the files: set in config.json
    /// Rewrite config.json for a reward model: architecture ...ForSequenceClassification with num_labels 1.
    bool sequence_classifier = false;
};

/**
 * @brief Copies what belongs to a model besides its weights (config.json, tokenizer, chat template, generation_config.json)
 * so that @p to becomes a model directory of its own. Only regular files of at most 64 MB directly in @p from; no weights
 * in any format, no checkpoints, logs or metrics. config.json is rewritten as @p options say; the order of keys stays.
 * @throws Error configuration (no config.json in @p from, or not one of a supported model), bad_data or io naming the file.
 */
void copy_model_files(const std::string& from, const std::string& to, const ModelFilesOptions& options);

/// The tensors of a decoder's checkpoint by their Hugging Face names, as write_model_weights() writes them.
std::vector<SafetensorSpec> model_tensors(const DecoderConfig& config);

/// Fills f32 elements [begin, begin+out.size()) of decoder_parameters()[parameter].
using ParameterReader = std::function<void(std::int64_t parameter, std::int64_t begin, std::span<float> out)>;

/**
 * @brief Writes the weights of a decoder under their Hugging Face names into @p directory, as write_safetensors() does.
 * A tied head is left out, as transformers does. Parameters are read in blocks: no full copy exists.
 * @throws Error io.
 */
void write_model_weights(const std::string& directory, const DecoderConfig& config, const ParameterReader& read, DType dtype,
                         std::int64_t max_shard_bytes = 5'000'000'000);

/// The same from f32 host tensors [rows, columns], contiguous, one per decoder_parameters().
void write_model_weights(const std::string& directory, const DecoderConfig& config, std::span<const Tensor> parameters,
                         DType dtype, std::int64_t max_shard_bytes = 5'000'000'000);

/// Every tensor of a decoder's checkpoint must be one that the decoder uses, so that nothing (a bias, a layer beyond the
/// config's, an adapter) is left out in silence. Heads of another use (lm_head, score) and stored rotary tables may be there.
/// @throws Error bad_data naming directory and tensor.
void check_model_tensors(const SafetensorsReader& reader, const DecoderConfig& config, const std::string& directory);

/// Reads decoder_parameters()[parameter] of a checkpoint directory into f32 [rows, columns], contiguous; not rounded.
void read_model_parameter(const SafetensorsReader& reader, const ParameterSpec& spec, std::span<float> out);

} // namespace selm
