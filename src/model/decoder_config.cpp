#include "selm/model/decoder_config.hpp"

#include <cmath>
#include <limits>
#include <span>

#include <nlohmann/json.hpp>

#include "selm/base/error.hpp"
#include "selm/base/files.hpp"

namespace selm {
namespace {

using nlohmann::json;

/// One row per supported value of "architectures". A further family of the same decoder is a row here and, where its
/// tensor names differ, a row of fused_projections().
struct Architecture {
    const char* name;
    const char* model_type;
    bool sequence_classifier;
};
constexpr Architecture architectures[] = {
    {"LlamaForCausalLM", "llama", false},
    {"LlamaForSequenceClassification", "llama", true},
};

/// Families whose checkpoints store qkv_proj and gate_up_proj, in the row order that the decoder uses itself.
bool fused_projections(const DecoderConfig& config) { return config.model_type == "phi3"; }

/// A config.json and its path, for messages.
class ConfigFile {
  public:
    explicit ConfigFile(std::string path) : path_(std::move(path))
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
    const json* find(const char* key) const { return find_in(json_, key); }
    static const json* find_in(const json& object, const char* key)
    {
        const auto found = object.find(key);
        return found == object.end() || found->is_null() ? nullptr : &*found;
    }
    std::int64_t count(const char* key) const
    {
        const json* value = find(key);
        if (!value)
            fail(cat("key '", key, "' is missing"));
        return count_of(key, *value);
    }
    std::int64_t count_or(const char* key, std::int64_t fallback) const
    {
        const json* value = find(key);
        return value ? count_of(key, *value) : fallback;
    }
    double positive(const char* key, const json* value) const
    {
        if (!value)
            fail(cat("key '", key, "' is missing"));
        if (!value->is_number() || !(value->get<double>() > 0) || !std::isfinite(value->get<double>()))
            fail(cat("key '", key, "' is ", value->dump(), ", but must be a positive number"));
        return value->get<double>();
    }
    bool flag(const char* key) const
    {
        const json* value = find(key);
        if (value && !value->is_boolean())
            fail(cat("key '", key, "' is ", value->dump(), ", but must be true or false"));
        return value && value->get<bool>();
    }

  private:
    std::int64_t count_of(const char* key, const json& value) const
    {
        constexpr std::uint64_t most = std::numeric_limits<std::int32_t>::max();
        if (!value.is_number_unsigned() || value.get<std::uint64_t>() < 1 || value.get<std::uint64_t>() > most)
            fail(cat("key '", key, "' is ", value.dump(), ", but must be an integer from 1 to ", most));
        return value.get<std::int64_t>();
    }

    std::string path_;
    json json_;
};

const Architecture& architecture_of(const ConfigFile& file)
{
    std::string supported;
    for (const Architecture& architecture : architectures)
        supported += cat(supported.empty() ? "" : ", ", architecture.name);
    const json* names = file.find("architectures");
    if (!names || !names->is_array() || names->size() != 1 || !(*names)[0].is_string())
        file.fail(cat("key 'architectures' must list one architecture. Supported: ", supported));
    const auto name = (*names)[0].get<std::string>();
    for (const Architecture& architecture : architectures) {
        if (name == architecture.name)
            return architecture;
    }
    file.fail(cat("architecture ", name, " is not supported. Supported: ", supported));
}

void refuse_unsupported(const ConfigFile& file, std::int64_t max_positions)
{
    for (const char* key : {"hidden_act", "hidden_activation"}) {
        const json* activation = file.find(key);
        if (activation && *activation != "silu")
            file.fail(cat(key, " ", activation->dump(), " is not supported (the decoder's MLP is SwiGLU). Supported: \"silu\""));
    }
    for (const char* key : {"attention_bias", "mlp_bias"}) {
        if (file.flag(key))
            file.fail(cat(key, " true is not supported (the decoder's linear layers have no bias)"));
    }
    if (file.find("quantization_config"))
        file.fail("quantization_config: quantised checkpoints are not supported. Use one in F32, BF16 or F16");
    const json* window = file.find("sliding_window");
    const json* use_window = file.find("use_sliding_window");
    const bool window_off = use_window && use_window->is_boolean() && !use_window->get<bool>();
    if (window && !window_off && file.count("sliding_window") < max_positions)
        file.fail(cat("sliding_window ", window->dump(), " below max_position_embeddings ", max_positions,
                      " is not supported (every token attends to all tokens before it)"));
}

/// rope_theta stands at the top, or in rope_parameters as transformers 5 writes it; only unscaled rotation is supported.
double rope_theta_of(const ConfigFile& file)
{
    const json* theta = file.find("rope_theta");
    for (const char* key : {"rope_scaling", "rope_parameters"}) {
        const json* parameters = file.find(key);
        if (!parameters)
            continue;
        if (!parameters->is_object())
            file.fail(cat("key '", key, "' is ", parameters->dump(), ", but must be an object or null"));
        const json* type = ConfigFile::find_in(*parameters, "rope_type");
        if (!type)
            type = ConfigFile::find_in(*parameters, "type");
        if (type ? *type != "default" : parameters->contains("factor"))
            file.fail(cat(key, " of type ", type ? type->dump() : "unknown", " is not supported. Supported: \"default\""));
        const json* rotated = ConfigFile::find_in(*parameters, "partial_rotary_factor");
        if (rotated && *rotated != 1.0)
            file.fail(cat("partial_rotary_factor ", rotated->dump(), " is not supported (whole heads are rotated)"));
        if (const json* inner = ConfigFile::find_in(*parameters, "rope_theta"))
            theta = inner;
    }
    const json* rotated = file.find("partial_rotary_factor");
    if (rotated && *rotated != 1.0)
        file.fail(cat("partial_rotary_factor ", rotated->dump(), " is not supported (whole heads are rotated)"));
    return theta ? file.positive("rope_theta", theta) : 10000.0; // the first Llama checkpoints have no such key
}

/// torch.nn.Embedding counts a negative padding_idx from the end; the first Llama checkpoints say -1.
std::int64_t padding_token_of(const ConfigFile& file, std::int64_t vocabulary)
{
    const json* value = file.find("pad_token_id");
    if (!value)
        return -1;
    const std::int64_t token = value->is_number_integer() ? value->get<std::int64_t>() : vocabulary;
    if (token >= vocabulary || token < -vocabulary)
        file.fail(cat("pad_token_id ", value->dump(), " is no token id (vocab_size is ", vocabulary, ")"));
    return token < 0 ? token + vocabulary : token;
}

void require_one_label(const ConfigFile& file)
{
    std::int64_t labels = 2; // transformers' default
    if (const json* names = file.find("id2label"); names && names->is_object())
        labels = static_cast<std::int64_t>(names->size());
    labels = file.count_or("num_labels", labels);
    if (labels != 1)
        file.fail(cat("num_labels is ", labels, ", but a reward model has one label (its score)"));
}

} // namespace

AttentionShape DecoderConfig::attention() const
{
    return {heads, kv_heads, head_dim, static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)))};
}

DecoderConfig DecoderConfig::from_directory(const std::string& directory)
{
    const ConfigFile file(directory + "/config.json");
    const Architecture& architecture = architecture_of(file);
    DecoderConfig config;
    config.model_type = architecture.model_type;
    config.sequence_classifier = architecture.sequence_classifier;
    config.vocabulary = file.count("vocab_size");
    config.hidden = file.count("hidden_size");
    config.intermediate = file.count("intermediate_size");
    config.layers = file.count("num_hidden_layers");
    config.heads = file.count("num_attention_heads");
    config.kv_heads = file.count_or("num_key_value_heads", config.heads);
    config.max_positions = file.count("max_position_embeddings");
    config.rms_norm_eps = file.positive("rms_norm_eps", file.find("rms_norm_eps"));
    config.tied_embeddings = file.flag("tie_word_embeddings");
    if (!file.find("head_dim") && config.hidden % config.heads != 0)
        file.fail(cat("hidden_size ", config.hidden, " is no multiple of num_attention_heads ", config.heads,
                      " and there is no head_dim"));
    config.head_dim = file.count_or("head_dim", config.hidden / config.heads);
    if (config.head_dim % 2 != 0)
        file.fail(cat("head_dim ", config.head_dim, " is odd (rotary embeddings need pairs)"));
    if (config.heads % config.kv_heads != 0)
        file.fail(cat("num_attention_heads ", config.heads, " is no multiple of num_key_value_heads ", config.kv_heads));
    refuse_unsupported(file, config.max_positions);
    config.rope_theta = rope_theta_of(file);
    config.padding_token = padding_token_of(file, config.vocabulary);
    if (config.sequence_classifier)
        require_one_label(file);
    return config;
}

namespace {

ParameterSpec whole(const std::string& name, std::vector<std::int64_t> shape)
{
    const std::int64_t rows = shape.size() == 2 ? shape[0] : 1;
    const std::int64_t columns = shape.back();
    return {name, rows, columns, {{name, std::move(shape), 0, rows}}};
}

struct NamedRows {
    const char* name;
    std::int64_t rows;
};

/// A parameter whose row blocks are tensors of their own in the checkpoint.
ParameterSpec stacked(const std::string& prefix, const char* name, std::span<const NamedRows> blocks, std::int64_t columns)
{
    ParameterSpec spec{prefix + name, 0, columns, {}};
    for (const NamedRows& block : blocks) {
        spec.parts.push_back({prefix + block.name, {block.rows, columns}, spec.rows, block.rows});
        spec.rows += block.rows;
    }
    return spec;
}

} // namespace

std::vector<ParameterSpec> decoder_parameters(const DecoderConfig& config)
{
    const std::int64_t query = config.heads * config.head_dim;
    const std::int64_t key = config.kv_heads * config.head_dim;
    const bool fused = fused_projections(config);
    std::vector<NamedRows> qkv = {
        {"self_attn.q_proj.weight", query}, {"self_attn.k_proj.weight", key}, {"self_attn.v_proj.weight", key}};
    std::vector<NamedRows> gate_up = {{"mlp.gate_proj.weight", config.intermediate}, {"mlp.up_proj.weight", config.intermediate}};
    if (fused) {
        qkv = {{"self_attn.qkv_proj.weight", query + 2 * key}};
        gate_up = {{"mlp.gate_up_proj.weight", 2 * config.intermediate}};
    }
    std::vector<ParameterSpec> specs = {whole("model.embed_tokens.weight", {config.vocabulary, config.hidden})};
    for (std::int64_t layer = 0; layer < config.layers; ++layer) {
        const std::string prefix = cat("model.layers.", layer, ".");
        specs.push_back(whole(prefix + "input_layernorm.weight", {config.hidden}));
        specs.push_back(stacked(prefix, "self_attn.qkv_proj.weight", qkv, config.hidden));
        specs.push_back(whole(prefix + "self_attn.o_proj.weight", {config.hidden, query}));
        specs.push_back(whole(prefix + "post_attention_layernorm.weight", {config.hidden}));
        specs.push_back(stacked(prefix, "mlp.gate_up_proj.weight", gate_up, config.hidden));
        specs.push_back(whole(prefix + "mlp.down_proj.weight", {config.hidden, config.intermediate}));
    }
    specs.push_back(whole("model.norm.weight", {config.hidden}));
    if (config.sequence_classifier)
        specs.push_back(whole("score.weight", {1, config.hidden}));
    else if (!config.tied_embeddings)
        specs.push_back(whole("lm_head.weight", {config.vocabulary, config.hidden}));
    return specs;
}

} // namespace selm
