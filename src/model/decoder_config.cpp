#include "selm/model/decoder_config.hpp"

#include <cmath>
#include <limits>
#include <span>

#include "config_file.hpp"
#include "selm/base/error.hpp"

namespace selm {
namespace {

using nlohmann::json;

constexpr std::int64_t most_layers = 10'000;

/// What transformers assumes of a family where config.json says nothing (its configuration classes, versions 4 and 5).
struct Family {
    const char* model_type;
    std::int64_t kv_heads;       ///< 0: as many as query heads
    std::int64_t sliding_window; ///< 0: none
    std::int64_t padding_token;  ///< -1: none
    bool llama3_scaling;         ///< does transformers know this scaling of positions for it?
};
constexpr Family llama = {"llama", 0, 0, -1, true};
constexpr Family mistral = {"mistral", 8, 4096, -1, true};
constexpr Family phi3 = {"phi3", 0, 0, 32000, false};

/// One row per supported value of "architectures". A further family of the same decoder is a row here and, where its
/// tensor names differ, a row of fused_projections().
struct Architecture {
    const char* name;
    const Family& family;
    bool sequence_classifier;
};
constexpr Architecture architectures[] = {
    {"LlamaForCausalLM", llama, false},     {"LlamaForSequenceClassification", llama, true},
    {"MistralForCausalLM", mistral, false}, {"MistralForSequenceClassification", mistral, true},
    {"Phi3ForCausalLM", phi3, false},       {"Phi3ForSequenceClassification", phi3, true},
};

/// Families whose checkpoints store qkv_proj and gate_up_proj, in the row order that the decoder uses itself.
bool fused_projections(const DecoderConfig& config) { return config.model_type == phi3.model_type; }

const Architecture& architecture_of(const ConfigSection& file)
{
    std::string supported;
    for (const Architecture& architecture : architectures)
        supported += cat(supported.empty() ? "" : ", ", architecture.name);
    const json* names = file.find("architectures");
    if (!names || !names->is_array() || names->size() != 1 || !(*names)[0].is_string())
        file.fail(cat("key 'architectures' must list one architecture. Supported: ", supported));
    const auto name = (*names)[0].get<std::string>();
    for (const Architecture& architecture : architectures) {
        if (name != architecture.name)
            continue;
        const std::string type = file.word("model_type");
        if (!type.empty() && type != architecture.family.model_type)
            file.fail(cat("model_type \"", type, "\" does not belong to architecture ", name, " (which is \"",
                          architecture.family.model_type, "\")"));
        return architecture;
    }
    file.fail(cat("architecture ", name, " is not supported. Supported: ", supported));
}

void refuse_unsupported(const ConfigSection& file)
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
}

/// Rotary embeddings as config.json describes them.
struct Rope {
    double theta = 0;
    std::optional<Llama3RopeScaling> scaling;
    bool operator==(const Rope&) const = default;
};

void refuse_partial_rotation(const ConfigSection& section)
{
    const json* rotated = section.find("partial_rotary_factor");
    if (rotated && *rotated != 1.0)
        section.fail(cat(section.name(), section.name().empty() ? "" : ".", "partial_rotary_factor ", rotated->dump(), " is not supported (whole heads are rotated)"));
}

Llama3RopeScaling llama3_scaling_of(const ConfigSection& file, const ConfigSection& section)
{
    Llama3RopeScaling scaling;
    scaling.factor = section.positive("factor");
    scaling.low_frequency_factor = section.positive("low_freq_factor");
    scaling.high_frequency_factor = section.positive("high_freq_factor");
    if (scaling.high_frequency_factor <= scaling.low_frequency_factor)
        section.fail(cat(section.name(), ": high_freq_factor ", scaling.high_frequency_factor,
                         " must be larger than low_freq_factor ", scaling.low_frequency_factor));
    const char* key = "original_max_position_embeddings";
    scaling.original_positions = section.count(key, most_positions);
    if (file.count_or(key, scaling.original_positions, most_positions) != scaling.original_positions)
        file.fail(cat(key, " is ", file.count(key, most_positions), " at the top and ", scaling.original_positions, " in ",
                      section.name(), " (which one is meant is unknown)"));
    return scaling;
}

/// One of rope_scaling (until transformers 4) and rope_parameters (transformers 5).
Rope rope_of_section(const ConfigSection& file, const Family& family, const ConfigSection& section)
{
    refuse_partial_rotation(section);
    Rope rope{section.find("rope_theta") ? section.positive("rope_theta") : file.positive_or("rope_theta", 10000), {}};
    std::string type = section.word("rope_type");
    if (type.empty())
        type = section.word("type");
    if (type.empty() && !section.has("factor") && !section.has_sections()) // sections: one for each kind of layer
        type = "default";
    if (type == "llama3" && family.llama3_scaling)
        rope.scaling = llama3_scaling_of(file, section);
    else if (type != "default")
        file.fail(cat(section.name(), " of type ", type.empty() ? "unknown" : cat('"', type, '"'),
                      " is not supported for model_type ", family.model_type, " (positions would be rotated otherwise than ",
                      "the model was trained with). Supported: \"default\"", family.llama3_scaling ? ", \"llama3\"" : ""));
    return rope;
}

Rope rope_of(const ConfigSection& file, const Family& family)
{
    refuse_partial_rotation(file);
    std::optional<Rope> rope;
    for (const char* key : {"rope_scaling", "rope_parameters"}) {
        if (!file.find(key))
            continue;
        const Rope found = rope_of_section(file, family, file.section(key));
        if (rope && *rope != found)
            file.fail("rope_scaling and rope_parameters say different things (which one is meant is unknown). Remove one");
        rope = found;
    }
    return rope ? *rope : Rope{file.positive_or("rope_theta", 10000), {}}; // the first Llama checkpoints have no such key
}

/// torch.nn.Embedding counts a negative padding_idx from the end; the first Llama checkpoints say -1.
std::int64_t padding_token_of(const ConfigSection& file, const Family& family, std::int64_t vocabulary)
{
    std::int64_t token = family.padding_token;
    if (file.has("pad_token_id")) {
        const json* value = file.find("pad_token_id");
        if (!value)
            return -1;
        token = value->is_number_integer() ? value->get<std::int64_t>() : vocabulary;
        if (token >= vocabulary || token < -vocabulary)
            file.fail(cat("pad_token_id ", value->dump(), " is no token id (vocab_size is ", vocabulary, ")"));
        return token < 0 ? token + vocabulary : token;
    }
    if (token >= vocabulary)
        file.fail(cat("key 'pad_token_id' is missing, and ", token, ", which it then is for model_type ", family.model_type,
                      ", is no token id (vocab_size is ", vocabulary, ")"));
    return token;
}

void require_one_label(const ConfigSection& file)
{
    std::int64_t labels = 2; // transformers' default
    if (const json* names = file.find("id2label"); names && names->is_object())
        labels = static_cast<std::int64_t>(names->size());
    labels = file.count_or("num_labels", labels);
    if (labels != 1)
        file.fail(cat("num_labels is ", labels, ", but a reward model has one label (its score)"));
}

void read_heads(const ConfigSection& file, const Family& family, DecoderConfig& config)
{
    config.heads = file.count("num_attention_heads");
    const std::int64_t family_kv_heads = family.kv_heads > 0 ? family.kv_heads : config.heads;
    config.kv_heads = file.count_or("num_key_value_heads", file.has("num_key_value_heads") ? config.heads : family_kv_heads);
    if (!file.find("head_dim") && config.hidden % config.heads != 0)
        file.fail(cat("hidden_size ", config.hidden, " is no multiple of num_attention_heads ", config.heads,
                      " and there is no head_dim"));
    config.head_dim = file.find("head_dim") ? file.count("head_dim") : config.hidden / config.heads;
    if (config.head_dim % 2 != 0)
        file.fail(cat("head_dim ", config.head_dim, " is odd (rotary embeddings need pairs)"));
    if (config.heads % config.kv_heads != 0)
        file.fail(cat("num_attention_heads ", config.heads, " is no multiple of num_key_value_heads ", config.kv_heads));
    if (config.heads * config.head_dim > most_columns)
        file.fail(cat("num_attention_heads ", config.heads, " times head_dim ", config.head_dim, " is above ", most_columns));
}

} // namespace

AttentionShape DecoderConfig::attention() const
{
    return {heads, kv_heads, head_dim, static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)))};
}

std::string DecoderConfig::context() const
{
    if (sliding_window == 0)
        return cat(max_positions, " tokens");
    return cat(max_positions, " tokens (its sliding_window: in a longer sequence a token would see only the last ",
               sliding_window, " ones, and the decoder lets it see all)");
}

DecoderConfig DecoderConfig::from_directory(const std::string& directory)
{
    const ConfigFile config_file(directory + "/config.json");
    const ConfigSection file = config_file.root();
    const Architecture& architecture = architecture_of(file);
    const Family& family = architecture.family;
    DecoderConfig config;
    config.model_type = family.model_type;
    config.sequence_classifier = architecture.sequence_classifier;
    config.vocabulary = file.count("vocab_size");
    config.hidden = file.count("hidden_size");
    config.intermediate = file.count("intermediate_size");
    config.layers = file.count("num_hidden_layers", most_layers);
    read_heads(file, family, config);
    config.rms_norm_eps = file.positive("rms_norm_eps");
    config.tied_embeddings = file.flag("tie_word_embeddings");
    config.max_positions = file.count("max_position_embeddings", most_positions);
    const std::int64_t window =
        file.count_or("sliding_window", file.has("sliding_window") ? 0 : family.sliding_window, most_positions);
    if (window > 0 && window < config.max_positions)
        config.max_positions = config.sliding_window = window;
    refuse_unsupported(file);
    const Rope rope = rope_of(file, family);
    config.rope_theta = rope.theta;
    config.rope_scaling = rope.scaling;
    config.padding_token = padding_token_of(file, family, config.vocabulary);
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
