#include <algorithm>
#include <cmath>
#include <limits>

#include <nlohmann/json.hpp>

#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/model/deberta.hpp"

namespace selm {
namespace {

using nlohmann::json;

constexpr const char* encoder_prefix = "pretrained_model."; // of PairRM's tensors
constexpr std::int64_t deberta_v3_head_dim = 64;

/// A config.json and its path, for messages.
class Config {
  public:
    explicit Config(const std::string& directory) : path_(directory + "/config.json")
    {
        try {
            json_ = json::parse(read_file(path_), [this](int depth, json::parse_event_t, json&) {
                if (depth > 32)
                    fail("nested deeper than 32 levels");
                return true;
            });
        } catch (const json::exception& error) {
            fail(cat("not valid JSON (", error.what(), ")"));
        } catch (const Error& error) {
            throw config_error(error.what());
        }
        if (!json_.is_object())
            fail("not a JSON object");
    }
    [[noreturn]] void fail(const std::string& problem) const { throw config_error(cat(path_, ": ", problem)); }

    /// The value of a key, or nullptr when the key is missing or null.
    const json* find(const char* key) const
    {
        const auto found = json_.find(key);
        return found == json_.end() || found->is_null() ? nullptr : &*found;
    }
    std::int64_t integer(const char* key, std::int64_t fallback, std::int64_t lowest) const
    {
        const json* value = find(key);
        if (value == nullptr)
            return fallback;
        if (!value->is_number_integer() || value->get<std::int64_t>() < lowest ||
            value->get<std::int64_t>() > std::numeric_limits<std::int32_t>::max())
            fail(cat("key '", key, "' is ", value->dump(), ", but must be an integer of at least ", lowest));
        return value->get<std::int64_t>();
    }
    std::int64_t count(const char* key) const
    {
        if (find(key) == nullptr)
            fail(cat("key '", key, "' is missing"));
        return integer(key, 1, 1);
    }
    std::string text(const char* key) const
    {
        const json* value = find(key);
        return value != nullptr && value->is_string() ? value->get<std::string>() : std::string();
    }
    /// @throws Error when the key has another value than the supported one; a missing key counts as `absent`.
    void require(const char* key, const json& supported, const json& absent) const
    {
        const json* value = find(key);
        const json& given = value == nullptr ? absent : *value;
        if (given != supported)
            fail(cat(key, " is ", given.dump(), ", which is not supported. Supported: ", supported.dump()));
    }

  private:
    std::string path_;
    json json_;
};

/// "p2c|c2p" or ["p2c", "c2p"]: both, in any order.
void require_both_position_terms(const Config& file)
{
    std::vector<std::string> terms;
    if (const json* value = file.find("pos_att_type"); value != nullptr && value->is_array()) {
        for (const json& term : *value)
            terms.push_back(term.is_string() ? term.get<std::string>() : term.dump());
    } else {
        const std::string words = file.text("pos_att_type");
        for (std::size_t begin = 0; begin <= words.size() && !words.empty();) {
            const std::size_t end = std::min(words.find('|', begin), words.size());
            terms.push_back(words.substr(begin, end - begin));
            begin = end + 1;
        }
    }
    std::sort(terms.begin(), terms.end());
    if (terms != std::vector<std::string>{"c2p", "p2c"})
        file.fail("pos_att_type is not [\"p2c\", \"c2p\"] (both relative terms are computed). No other is supported");
}

void refuse_unsupported(const Config& file, const DebertaConfig& config)
{
    file.require("hidden_act", "gelu", "gelu");
    file.require("relative_attention", true, false);
    file.require("share_att_key", true, false);
    file.require("position_biased_input", false, true);
    file.require("type_vocab_size", 0, 0);
    file.require("norm_rel_ebd", "layer_norm", "none");
    file.require("conv_kernel_size", 0, 0);
    file.require("n_tasks", 1, 1);
    file.require("embedding_size", config.hidden, config.hidden);
    require_both_position_terms(file);
}

/// Where a parameter's tensor may be: PairRM's name, DebertaV2ForMaskedLM's, DebertaV2Model's.
std::vector<std::string> possible_names(const std::string& name)
{
    std::vector<std::string> names = {name};
    if (name.starts_with(encoder_prefix)) {
        const std::string rest = name.substr(std::char_traits<char>::length(encoder_prefix));
        names.push_back("deberta." + rest);
        names.push_back(rest);
    }
    return names;
}

/// The name under which the checkpoint has a tensor; nullptr when it has it under none.
const std::pair<const std::string, SafetensorInfo>* find_tensor(const SafetensorsReader& reader,
                                                                const std::string& name)
{
    for (const std::string& possible : possible_names(name)) {
        const auto found = reader.tensors().find(possible);
        if (found != reader.tensors().end())
            return &*found;
    }
    return nullptr;
}

/// Shape of a tensor of rank 2 that a RankerConfig says nothing about.
std::pair<std::int64_t, std::int64_t> matrix_shape(const Config& file, const SafetensorsReader& reader,
                                                   const std::string& name)
{
    const auto* tensor = find_tensor(reader, encoder_prefix + name);
    if (tensor == nullptr || tensor->second.shape.size() != 2)
        file.fail(cat("the weights beside it have no matrix '", encoder_prefix, name,
                      "' (it is no pair ranker on DeBERTa-v3). Pass llm-blender/PairRM's directory or one like it"));
    return {tensor->second.shape[0], tensor->second.shape[1]};
}

/// llm-blender's own config.json has no shapes: they are those of the tensors, and DeBERTa-v3's constants.
DebertaConfig from_ranker_config(const Config& file, const SafetensorsReader& reader)
{
    file.require("ranker_type", "pairranker", nullptr);
    file.require("n_tasks", 1, 1);
    const std::string base = file.text("model_name");
    if (base.find("deberta-v3") == std::string::npos)
        file.fail(cat("model_name is \"", base,
                      "\", which is not supported (the encoder is DeBERTa-v3). Supported: microsoft/deberta-v3-*"));
    DebertaConfig config;
    std::tie(config.vocabulary, config.hidden) = matrix_shape(file, reader, "embeddings.word_embeddings.weight");
    config.intermediate = matrix_shape(file, reader, "encoder.layer.0.intermediate.dense.weight").first;
    while (find_tensor(reader, cat(encoder_prefix, "encoder.layer.", config.layers, ".intermediate.dense.weight")))
        ++config.layers;
    const std::int64_t positions = matrix_shape(file, reader, "encoder.rel_embeddings.weight").first;
    if (config.hidden % deberta_v3_head_dim != 0 || positions % 2 != 0)
        file.fail(cat("the weights beside it have ", config.hidden, " hidden units and ", positions,
                      " relative positions (DeBERTa-v3 has heads of ", deberta_v3_head_dim,
                      " and an even number of positions). Pass llm-blender/PairRM's directory or one like it"));
    config.heads = config.hidden / deberta_v3_head_dim;
    config.position_buckets = positions / 2;
    return config;
}

DebertaConfig from_deberta_config(const Config& file)
{
    if (const std::string type = file.text("model_type"); type != "deberta-v2")
        file.fail(cat("model_type is \"", type,
                      "\", which is not supported. Supported: \"deberta-v2\" (DeBERTa-v3 is of it), or a RankerConfig of "
                      "llm-blender"));
    DebertaConfig config;
    config.vocabulary = file.count("vocab_size");
    config.hidden = file.count("hidden_size");
    config.intermediate = file.count("intermediate_size");
    config.layers = file.count("num_hidden_layers");
    config.heads = file.count("num_attention_heads");
    if (config.hidden % config.heads != 0)
        file.fail(cat("hidden_size ", config.hidden, " is no multiple of num_attention_heads ", config.heads));
    if (const json* eps = file.find("layer_norm_eps")) {
        if (!eps->is_number() || !(eps->get<double>() > 0))
            file.fail(cat("key 'layer_norm_eps' is ", eps->dump(), ", but must be a positive number"));
        config.layer_norm_eps = eps->get<double>();
    }
    config.position_buckets = std::max<std::int64_t>(0, file.integer("position_buckets", -1, -1));
    config.max_relative_positions = file.integer("max_relative_positions", -1, -1);
    if (config.max_relative_positions < 1)
        config.max_relative_positions = file.count("max_position_embeddings");
    if (config.position_buckets == 1 || config.position_buckets / 2 >= config.max_relative_positions)
        file.fail(cat("position_buckets ", config.position_buckets, " do not fit max_relative_positions ",
                      config.max_relative_positions, " (buckets are for distances beyond half their number)"));
    config.padding_token = file.integer("pad_token_id", 0, -1);
    config.source_prefix_id = file.integer("source_prefix_id", -1, 0);
    config.candidate1_prefix_id = file.integer("cand1_prefix_id", -1, 0);
    config.candidate2_prefix_id = file.integer("cand2_prefix_id", -1, 0);
    config.candidate_prefix_id = file.integer("cand_prefix_id", -1, 0);
    refuse_unsupported(file, config);
    return config;
}

} // namespace

DebertaConfig DebertaConfig::from_directory(const std::string& directory)
{
    const Config file(directory);
    const SafetensorsReader reader(directory);
    const bool is_ranker_config = file.find("hidden_size") == nullptr && file.find("ranker_type") != nullptr;
    DebertaConfig config = is_ranker_config ? from_ranker_config(file, reader) : from_deberta_config(file);
    const std::int64_t head = PairParameterIndex::head(config);
    const std::vector<ParameterSpec> specs = pair_parameters(config);
    config.has_head = std::all_of(specs.begin() + head, specs.end(),
                                  [&](const ParameterSpec& spec) { return has_pair_parameter(reader, spec); });
    return config;
}

std::int32_t relative_position_index(const DebertaConfig& config, std::int64_t distance)
{
    const std::int64_t span = config.attention_span();
    std::int64_t position = distance;
    const std::int64_t middle = config.position_buckets / 2, magnitude = distance < 0 ? -distance : distance;
    if (config.position_buckets > 0 && magnitude > middle) {
        // The order of these float operations is transformers' (make_log_bucket_position).
        const auto half = static_cast<float>(middle);
        const auto widest = static_cast<float>(static_cast<double>(config.max_relative_positions - 1) /
                                               static_cast<double>(middle));
        const float steps = std::ceil(std::log(static_cast<float>(magnitude) / half) / std::log(widest) *
                                      static_cast<float>(middle - 1));
        const auto bucket = static_cast<std::int64_t>(steps + half);
        position = distance < 0 ? -bucket : bucket;
    }
    return static_cast<std::int32_t>(std::clamp<std::int64_t>(position + span, 0, 2 * span - 1));
}

namespace {

ParameterSpec whole(const std::string& name, std::vector<std::int64_t> shape)
{
    const std::int64_t rows = shape.size() == 2 ? shape[0] : 1, columns = shape.back();
    return {name, rows, columns, {{name, std::move(shape), 0, rows}}};
}

} // namespace

std::vector<ParameterSpec> pair_parameters(const DebertaConfig& config)
{
    const std::int64_t hidden = config.hidden;
    const std::string prefix = encoder_prefix;
    std::vector<ParameterSpec> specs;
    const auto norm = [&](const std::string& name) {
        specs.push_back(whole(name + ".weight", {hidden}));
        specs.push_back(whole(name + ".bias", {hidden}));
    };
    const auto linear = [&](const std::string& name, std::int64_t outputs, std::int64_t inputs) {
        specs.push_back(whole(name + ".weight", {outputs, inputs}));
        specs.push_back(whole(name + ".bias", {outputs}));
    };
    specs.push_back(whole(prefix + "embeddings.word_embeddings.weight", {config.vocabulary, hidden}));
    norm(prefix + "embeddings.LayerNorm");
    specs.push_back(whole(prefix + "encoder.rel_embeddings.weight", {config.relative_positions(), hidden}));
    norm(prefix + "encoder.LayerNorm");
    for (std::int64_t layer = 0; layer < config.layers; ++layer) {
        const std::string name = cat(prefix, "encoder.layer.", layer, ".");
        for (const char* projection : {"query_proj", "key_proj", "value_proj"})
            linear(cat(name, "attention.self.", projection), hidden, hidden);
        linear(name + "attention.output.dense", hidden, hidden);
        norm(name + "attention.output.LayerNorm");
        linear(name + "intermediate.dense", config.intermediate, hidden);
        linear(name + "output.dense", hidden, config.intermediate);
        norm(name + "output.LayerNorm");
    }
    linear("head_layer.1", hidden, 2 * hidden);
    linear("head_layer.4", 1, hidden);
    SELM_EXPECT(static_cast<std::int64_t>(specs.size()) == PairParameterIndex::count(config));
    return specs;
}

bool has_pair_parameter(const SafetensorsReader& reader, const ParameterSpec& spec)
{
    return find_tensor(reader, spec.name) != nullptr;
}

void read_pair_parameter(const SafetensorsReader& reader, const ParameterSpec& spec, std::int64_t begin,
                         std::span<float> out)
{
    std::vector<std::int64_t> shape = spec.parts[0].shape;
    const auto* tensor = find_tensor(reader, spec.name);
    if (tensor == nullptr) {
        reader.read_f32(spec.name, shape, begin, out); // throws, naming it
        return;
    }
    const std::vector<std::int64_t>& stored = tensor->second.shape;
    const bool is_word_embedding = spec.name.ends_with("word_embeddings.weight");
    if (is_word_embedding && stored.size() == 2 && stored[0] > shape[0])
        shape[0] = stored[0];
    reader.read_f32(tensor->first, shape, begin, out);
}

std::vector<SafetensorSpec> pair_tensors(const DebertaConfig& config)
{
    std::vector<SafetensorSpec> tensors;
    for (const ParameterSpec& spec : pair_parameters(config))
        tensors.push_back({spec.name, spec.parts[0].shape});
    return tensors;
}

void write_pair_weights(const std::string& directory, const DebertaConfig& config, const ParameterReader& read,
                        DType dtype, std::int64_t max_shard_bytes)
{
    std::vector<SafetensorSource> sources;
    const std::vector<ParameterSpec> specs = pair_parameters(config);
    for (std::size_t i = 0; i < specs.size(); ++i) {
        const auto values = [&read, i](std::int64_t begin, std::span<float> out) {
            read(static_cast<std::int64_t>(i), begin, out);
        };
        sources.push_back({specs[i].name, specs[i].parts[0].shape, values});
    }
    write_safetensors(directory, sources, dtype, max_shard_bytes);
}

} // namespace selm
