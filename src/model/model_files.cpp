#include "selm/model/model_files.hpp"

#include <algorithm>
#include <array>
#include <filesystem>
#include <set>
#include <string_view>
#include <system_error>

#include <nlohmann/json.hpp>

#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/model/safetensors.hpp"

namespace selm {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

constexpr std::uintmax_t max_copied_bytes = 64'000'000;

/// Weights in any format, what a training run leaves beside them, and records that describe the source's weights only.
bool stays_behind(const std::string& name)
{
    static constexpr std::array<std::string_view, 12> endings = {
        ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt",
        ".gguf",        ".onnx",                   ".h5",  ".msgpack",        ".log"};
    static constexpr std::array<std::string_view, 5> names = {"metrics.jsonl", "trainer_state.json", "conversion.json",
                                                              "manifest.json", "config.json"};
    return name.starts_with('.') || name.find(".partial") != std::string::npos ||
           std::any_of(endings.begin(), endings.end(), [&](std::string_view ending) { return name.ends_with(ending); }) ||
           std::find(names.begin(), names.end(), name) != names.end();
}

void make_sequence_classifier(ordered_json& config, const DecoderConfig& model)
{
    auto name = config["architectures"][0].get<std::string>();
    if (const auto at = name.find("ForCausalLM"); at != std::string::npos)
        name = name.substr(0, at) + "ForSequenceClassification";
    config["architectures"] = {name};
    config["num_labels"] = 1;
    config["id2label"] = {{"0", "LABEL_0"}};
    config["label2id"] = {{"LABEL_0", 0}};
    // transformers reads the score at the last token that is no padding: the one before the end token where both are one.
    const auto end = config.find("eos_token_id");
    const auto padding = config.find("pad_token_id");
    if (padding == config.end() && model.padding_token >= 0)
        config["pad_token_id"] = nullptr; // the padding token that transformers assumes of the family is its end token
    else if (end != config.end() && padding != config.end() &&
        (*end == *padding || (end->is_array() && std::find(end->begin(), end->end(), *padding) != end->end())))
        *padding = nullptr;
}

void write_config(const std::string& from, const std::string& to, const ModelFilesOptions& options)
{
    const DecoderConfig model = DecoderConfig::from_directory(from); // refuses what is not supported, naming the key
    ordered_json config = ordered_json::parse(read_file(from + "/config.json"));
    const char* word = options.dtype == DType::f32 ? "float32" : "bfloat16";
    const bool new_name = config.contains("dtype"); // transformers 5; before it torch_dtype
    if (config.contains("torch_dtype") || !new_name)
        config["torch_dtype"] = word;
    if (new_name)
        config["dtype"] = word;
    if (options.sequence_classifier)
        make_sequence_classifier(config, model);
    write_file_atomically(to + "/config.json", config.dump(2) + "\n");
}

} // namespace

void copy_model_files(const std::string& from, const std::string& to, const ModelFilesOptions& options)
{
    write_config(from, to, options);
    for (const auto& entry : fs::directory_iterator(from)) {
        const std::string name = entry.path().filename().string();
        std::error_code error;
        if (stays_behind(name) || !entry.is_regular_file(error) || entry.file_size(error) > max_copied_bytes)
            continue;
        write_file_atomically(to + "/" + name, read_file(entry.path().string()));
    }
}

std::vector<SafetensorSpec> model_tensors(const DecoderConfig& config)
{
    std::vector<SafetensorSpec> tensors;
    for (const ParameterSpec& spec : decoder_parameters(config))
        for (const ParameterSpec::Part& part : spec.parts)
            tensors.push_back({part.name, part.shape});
    return tensors;
}

void write_model_weights(const std::string& directory, const DecoderConfig& config, const ParameterReader& read, DType dtype,
                         std::int64_t max_shard_bytes)
{
    const auto specs = decoder_parameters(config);
    std::vector<SafetensorSource> sources;
    for (std::size_t i = 0; i < specs.size(); ++i) {
        for (const ParameterSpec::Part& part : specs[i].parts) {
            const std::int64_t first = part.row_begin * specs[i].columns;
            sources.push_back({part.name, part.shape, [&read, i, first](std::int64_t begin, std::span<float> out) {
                                   read(static_cast<std::int64_t>(i), first + begin, out);
                               }});
        }
    }
    write_safetensors(directory, sources, dtype, max_shard_bytes);
}

void write_model_weights(const std::string& directory, const DecoderConfig& config, std::span<const Tensor> parameters,
                         DType dtype, std::int64_t max_shard_bytes)
{
    const auto specs = decoder_parameters(config);
    SELM_EXPECT(parameters.size() == specs.size());
    for (std::size_t i = 0; i < specs.size(); ++i) {
        const Tensor& tensor = parameters[i];
        SELM_EXPECT(tensor.rows == specs[i].rows && tensor.columns == specs[i].columns && tensor.stride == tensor.columns);
    }
    const auto read = [&](std::int64_t parameter, std::int64_t begin, std::span<float> out) {
        std::copy_n(parameters[static_cast<std::size_t>(parameter)].f32() + begin, out.size(), out.data());
    };
    write_model_weights(directory, config, ParameterReader(read), dtype, max_shard_bytes);
}

void check_model_tensors(const SafetensorsReader& reader, const DecoderConfig& config, const std::string& directory)
{
    std::set<std::string_view> used{"lm_head.weight", "score.weight"};
    const auto specs = decoder_parameters(config);
    for (const ParameterSpec& spec : specs)
        for (const ParameterSpec::Part& part : spec.parts)
            used.insert(part.name);
    for (const auto& entry : reader.tensors())
        if (!used.contains(entry.first) && !entry.first.ends_with("rotary_emb.inv_freq"))
            throw data_error(cat(directory, ": tensor '", entry.first, "' is no part of a ", config.model_type, " decoder of ",
                                 config.layers, " layers as config.json describes it (the model would be computed without it). "
                                 "Check config.json, or merge or remove the tensor"));
}

void read_model_parameter(const SafetensorsReader& reader, const ParameterSpec& spec, std::span<float> out)
{
    SELM_EXPECT(static_cast<std::int64_t>(out.size()) == spec.elements());
    for (const ParameterSpec::Part& part : spec.parts) {
        const auto begin = static_cast<std::size_t>(part.row_begin * spec.columns);
        const auto count = static_cast<std::size_t>(part.rows * spec.columns);
        reader.read_f32(part.name, part.shape, 0, out.subspan(begin, count));
    }
}

} // namespace selm
