#pragma once

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "selm/base/files.hpp"
#include "selm/base/rng.hpp"
#include "selm/model/decoder_config.hpp"
#include "selm/model/safetensors.hpp"

namespace selm::test {

struct TinyModel {
    std::int64_t vocabulary = 275; ///< ids of tests/data/tiny_tokenizer
    std::int64_t max_positions = 512;
    std::int64_t layers = 2;
    std::uint64_t seed = 1;
    bool damaged = false;    ///< a NaN among the weights
    bool classifier = false; ///< a reward model: score.weight in the place of the tied head
};

/// Makes a model directory with random weights, large enough that answers vary; by one rank.
inline void make_tiny_model(const std::string& directory, const TinyModel& what = {})
{
    namespace fs = std::filesystem;
    fs::create_directories(directory);
    for (const auto& entry : fs::directory_iterator(SELM_SOURCE_DIR "/tests/data/tiny_tokenizer"))
        fs::copy_file(entry.path(), directory / entry.path().filename(), fs::copy_options::overwrite_existing);
    write_file_atomically(directory + "/config.json",
                          std::string(R"({"architectures": [")") +
                              (what.classifier ? R"(LlamaForSequenceClassification"], "num_labels": 1)"
                                               : R"(LlamaForCausalLM"])") +
                              R"(, "model_type": "llama", "hidden_act": "silu", "hidden_size": 32,
"intermediate_size": 96, "num_hidden_layers": )" + std::to_string(what.layers) + R"(, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "eos_token_id": 2, "torch_dtype": "float32",
"vocab_size": )" + std::to_string(what.vocabulary) +
                              ", \"max_position_embeddings\": " + std::to_string(what.max_positions) + "}");
    std::vector<SafetensorSource> tensors;
    std::uint64_t index = 0;
    for (const ParameterSpec& parameter : decoder_parameters(DecoderConfig::from_directory(directory))) {
        for (const ParameterSpec::Part& part : parameter.parts) {
            const bool gain = part.shape.size() == 1;
            const double scale = index == 0 ? 1.0 : 1.5 / std::sqrt(static_cast<double>(part.shape.back()));
            const bool damage = what.damaged && index == 3;
            const std::uint64_t tensor = index++;
            tensors.push_back({part.name, part.shape, [=](std::int64_t begin, std::span<float> out) {
                                   for (std::size_t i = 0; i < out.size(); ++i) {
                                       const auto element = static_cast<std::uint64_t>(begin) + i;
                                       RandomStream random(what.seed, 3, tensor, element);
                                       out[i] = gain ? 1.0F : static_cast<float>(scale * random.next_normal());
                                       if (damage && element == 0)
                                           out[i] = std::nanf("");
                                   }
                               }});
        }
    }
    write_safetensors(directory, tensors, DType::f32);
}

} // namespace selm::test
