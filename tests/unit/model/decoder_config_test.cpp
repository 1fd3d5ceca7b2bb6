#include "selm/model/decoder_config.hpp"

#include <filesystem>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/model/model_files.hpp"
#include "temporary_directory.hpp"

namespace selm {
namespace {

using nlohmann::json;
using test::TemporaryDirectory;
namespace fs = std::filesystem;

json llama()
{
    return json::parse(R"({"architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 100000.0, "hidden_act": "silu",
        "rope_scaling": null, "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": true})");
}

DecoderConfig parse(const json& text)
{
    const TemporaryDirectory directory;
    directory.write("config.json", text.dump());
    return DecoderConfig::from_directory(directory.path(""));
}

DecoderConfig with(const std::function<void(json&)>& change)
{
    json config = llama();
    change(config);
    return parse(config);
}

std::string refusal(const std::function<void(json&)>& change)
{
    try {
        with(change);
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::configuration);
        EXPECT_NE(std::string(error.what()).find("config.json"), std::string::npos);
        return error.what();
    }
    return "accepted";
}

bool mentions(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

TEST(DecoderConfig, ReadsALlamaConfig)
{
    const DecoderConfig config = parse(llama());
    EXPECT_EQ(config.model_type, "llama");
    EXPECT_EQ(config.vocabulary, 100);
    EXPECT_EQ(config.head_dim, 8);
    EXPECT_EQ(config.kv_heads, 2);
    EXPECT_EQ(config.qkv_width(), 64);
    EXPECT_EQ(config.rope_theta, 100000.0);
    EXPECT_EQ(config.rms_norm_eps, 1e-6);
    EXPECT_TRUE(config.tied_embeddings);
    EXPECT_FALSE(config.sequence_classifier);
    EXPECT_EQ(config.padding_token, -1);
    EXPECT_FLOAT_EQ(config.attention().scale, 0.35355339F);
}

TEST(DecoderConfig, DefaultsAreThoseOfTransformers)
{
    EXPECT_EQ(with([](json& c) { c.erase("num_key_value_heads"); }).kv_heads, 4);
    EXPECT_EQ(with([](json& c) { c["num_key_value_heads"] = nullptr; }).kv_heads, 4);
    EXPECT_EQ(with([](json& c) { c["head_dim"] = 16; }).head_dim, 16);
    EXPECT_EQ(with([](json& c) { c.erase("rope_theta"); }).rope_theta, 10000.0);
    EXPECT_FALSE(with([](json& c) { c.erase("tie_word_embeddings"); }).tied_embeddings);
    EXPECT_EQ(with([](json& c) { c["sliding_window"] = 128; }).max_positions, 128);
    EXPECT_EQ(with([](json& c) { c["sliding_window"] = 256; }).context(), "256 tokens");
    EXPECT_EQ(with([](json& c) { c["sliding_window"] = nullptr; }).max_positions, 256);
    EXPECT_EQ(with([](json& c) { c["pad_token_id"] = 7; }).padding_token, 7);
    EXPECT_EQ(with([](json& c) { c["pad_token_id"] = -1; }).padding_token, 99);
}

TEST(DecoderConfig, MistralsConfig)
{
    const json mistral_7b = json::parse(R"({"architectures": ["MistralForCausalLM"], "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false, "vocab_size": 32000})");
    const DecoderConfig config = parse(mistral_7b);
    EXPECT_EQ(config.model_type, "mistral");
    EXPECT_EQ(config.head_dim, 128);
    EXPECT_EQ(config.kv_heads, 8);
    EXPECT_EQ(config.qkv_width(), 6144);
    EXPECT_EQ(config.sliding_window, 4096);
    EXPECT_EQ(config.max_positions, 4096); // a token of a longer sequence would not attend to the first ones
    EXPECT_TRUE(mentions(config.context(), "4096 tokens") && mentions(config.context(), "sliding_window"));
    json without = mistral_7b; // what transformers assumes
    without.erase("sliding_window");
    without.erase("num_key_value_heads");
    EXPECT_EQ(parse(without).max_positions, 4096);
    EXPECT_EQ(parse(without).kv_heads, 8);
    json version_2 = mistral_7b;
    version_2["sliding_window"] = nullptr;
    version_2["num_key_value_heads"] = nullptr;
    version_2["head_dim"] = 64; // other than hidden_size / num_attention_heads, as in Mistral-Nemo
    EXPECT_EQ(parse(version_2).max_positions, 32768);
    EXPECT_EQ(parse(version_2).context(), "32768 tokens");
    EXPECT_EQ(parse(version_2).kv_heads, 32);
    EXPECT_EQ(parse(version_2).qkv_width(), 3 * 32 * 64);
    EXPECT_EQ(decoder_parameters(parse(version_2))[ParameterIndex::out(0)].columns, 2048);
}

json phi3_mini()
{
    return json::parse(R"({"architectures": ["Phi3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072,
        "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
        "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000.0,
        "sliding_window": 2047, "tie_word_embeddings": false, "vocab_size": 32064})");
}

TEST(DecoderConfig, Phi3sConfig)
{
    const DecoderConfig config = parse(phi3_mini());
    EXPECT_EQ(config.model_type, "phi3");
    EXPECT_EQ(config.head_dim, 96);
    EXPECT_EQ(config.max_positions, 2047);
    EXPECT_EQ(config.padding_token, 32000);
    EXPECT_FALSE(config.rope_scaling.has_value());
    json without = phi3_mini();
    without.erase("pad_token_id");
    EXPECT_EQ(parse(without).padding_token, 32000); // what transformers assumes
    without["vocab_size"] = 32000;
    EXPECT_THROW(parse(without), Error);
    without["pad_token_id"] = nullptr;
    EXPECT_EQ(parse(without).padding_token, -1);
}

const json llama3_scaling = {{"rope_type", "llama3"}, {"factor", 8.0}, {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0},
                             {"original_max_position_embeddings", 128}};

TEST(DecoderConfig, RopeParametersOfTransformers5)
{
    EXPECT_EQ(with([](json& c) {
                  c.erase("rope_theta");
                  c["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 5000.0}};
              }).rope_theta, 5000.0);
}

TEST(DecoderConfig, Llama3RopeScalingInEverySpelling)
{
    const Llama3RopeScaling expected{8, 1, 4, 128};
    const auto scaling = [](const std::function<void(json&)>& change) { return with(change).rope_scaling; };
    EXPECT_EQ(scaling([](json& c) { c["rope_scaling"] = llama3_scaling; }), expected);
    EXPECT_EQ(scaling([](json& c) { // before transformers 4.43
                  c["rope_scaling"] = llama3_scaling;
                  c["rope_scaling"].erase("rope_type");
                  c["rope_scaling"]["type"] = "llama3";
              }), expected);
    const auto version_5 = [](json& c) {
        c.erase("rope_theta");
        c["rope_parameters"] = llama3_scaling;
        c["rope_parameters"]["rope_theta"] = 500000;
    };
    EXPECT_EQ(scaling(version_5), expected);
    EXPECT_EQ(with(version_5).rope_theta, 500000.0);
    EXPECT_EQ(scaling([&](json& c) { // both, saying the same
                  version_5(c);
                  c["rope_scaling"] = llama3_scaling;
                  c["rope_theta"] = 500000;
              }), expected);
    EXPECT_EQ(scaling([](json&) {}), std::nullopt);
}

TEST(DecoderConfig, BrokenRopeScalingIsRefusedByKey)
{
    const auto refused = [](const char* key, const json& value, const char* part) {
        const std::string message = refusal([&](json& c) {
            c["rope_scaling"] = llama3_scaling;
            c["rope_scaling"][key] = value;
        });
        EXPECT_TRUE(mentions(message, "rope_scaling") && mentions(message, key) && mentions(message, part)) << message;
    };
    for (const char* key : {"factor", "low_freq_factor", "high_freq_factor"}) {
        refused(key, nullptr, "missing");
        refused(key, 0, "positive");
        refused(key, "8", "positive");
    }
    refused("high_freq_factor", 1.0, "larger than");
    refused("original_max_position_embeddings", nullptr, "missing");
    refused("original_max_position_embeddings", 128.5, "integer");
    refused("partial_rotary_factor", 0.5, "whole heads");
    refused("rope_type", 3, "a word");
    refused("rope_theta", -1, "positive");
    const std::string list = refusal([](json& c) { c["rope_scaling"] = json::array({1}); });
    EXPECT_TRUE(mentions(list, "rope_scaling") && mentions(list, "object")) << list;
    const std::string two = refusal([](json& c) {
        c["rope_scaling"] = llama3_scaling;
        c["original_max_position_embeddings"] = 64;
    });
    EXPECT_TRUE(mentions(two, "64") && mentions(two, "128")) << two;
    const std::string differ = refusal([](json& c) {
        c["rope_scaling"] = llama3_scaling;
        c["rope_parameters"] = {{"rope_type", "default"}};
    });
    EXPECT_TRUE(mentions(differ, "rope_scaling and rope_parameters")) << differ;
}

TEST(DecoderConfig, OtherRopeScalingsAreRefusedByName)
{
    for (const char* key : {"rope_scaling", "rope_parameters"}) {
        for (const char* type : {"linear", "dynamic", "yarn", "longrope", "su", "proportional"}) {
            for (const char* spelling : {"type", "rope_type"}) {
                const std::string message = refusal([&](json& c) { c[key] = {{spelling, type}, {"factor", 2.0}}; });
                EXPECT_TRUE(mentions(message, key) && mentions(message, type) && mentions(message, "llama3")) << message;
            }
        }
    }
    const std::string layers =
        refusal([](json& c) { c["rope_parameters"] = {{"full_attention", {{"rope_type", "default"}}}}; });
    EXPECT_TRUE(mentions(layers, "rope_parameters")) << layers;
    json phi3 = phi3_mini();
    for (const char* type : {"longrope", "su", "yarn", "llama3"}) {
        phi3["rope_scaling"] = {{"type", type}, {"short_factor", {1.0}}, {"long_factor", {1.0}}};
        try {
            parse(phi3);
            ADD_FAILURE() << type;
        } catch (const Error& error) {
            EXPECT_EQ(error.code(), ExitCode::configuration);
            EXPECT_TRUE(mentions(error.what(), type) && mentions(error.what(), "phi3")) << error.what();
        }
    }
}

TEST(DecoderConfig, AMissingKeyIsNamed)
{
    for (const char* key : {"architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                            "num_attention_heads", "max_position_embeddings", "rms_norm_eps"})
        EXPECT_TRUE(mentions(refusal([&](json& c) { c.erase(key); }), cat("'", key, "'"))) << key;
}

TEST(DecoderConfig, UnsupportedVariantsAreRefusedByName)
{
    const auto refused = [](const char* key, const json& value, const char* part) {
        const std::string message = refusal([&](json& c) { c[key] = value; });
        EXPECT_TRUE(mentions(message, key) && mentions(message, part)) << message;
    };
    refused("hidden_act", "gelu", "gelu");
    refused("attention_bias", true, "attention_bias");
    refused("mlp_bias", true, "mlp_bias");
    refused("rope_scaling", {{"type", "linear"}, {"factor", 2.0}}, "linear");
    refused("rope_scaling", {{"factor", 2.0}}, "unknown");
    refused("rope_parameters", {{"partial_rotary_factor", 0.75}}, "0.75");
    refused("model_type", "mistral", "LlamaForCausalLM");
    refused("sliding_window", -1, "from 1 to");
    refused("quantization_config", {{"bits", 4}}, "quantised");
    refused("partial_rotary_factor", 0.5, "0.5");
    refused("vocab_size", 0, "from 1 to");
    refused("vocab_size", -5, "from 1 to");
    refused("vocab_size", 1e30, "from 1 to");
    refused("hidden_size", "32", "from 1 to");
    refused("rms_norm_eps", 0, "positive");
    refused("tie_word_embeddings", "yes", "true or false");
    refused("num_key_value_heads", 3, "no multiple");
    refused("head_dim", 7, "7");
    refused("head_dim", 16'777'214, "times head_dim");
    refused("num_hidden_layers", 2'000'000'000, "from 1 to");
    refused("pad_token_id", 100, "100");
    const std::string other = refusal([](json& c) { c["architectures"] = {"GPT2LMHeadModel"}; });
    EXPECT_TRUE(mentions(other, "GPT2LMHeadModel") && mentions(other, "LlamaForCausalLM")) << other;
}

TEST(DecoderConfig, BrokenFilesAreConfigurationErrors)
{
    for (const std::string& text : {std::string("{\"architectures\": ["), std::string("[]"), std::string(5000, '[')}) {
        const TemporaryDirectory directory;
        directory.write("config.json", text);
        EXPECT_THROW(DecoderConfig::from_directory(directory.path("")), Error);
    }
    try {
        DecoderConfig::from_directory("/nonexistent");
        FAIL();
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::configuration);
        EXPECT_TRUE(mentions(error.what(), "/nonexistent/config.json"));
    }
}

TEST(DecoderConfig, RewardModelsHaveOneLabel)
{
    const auto classifier = [](json labels) {
        return [labels](json& c) {
            c["architectures"] = {"LlamaForSequenceClassification"};
            c.update(labels);
        };
    };
    EXPECT_TRUE(with(classifier({{"num_labels", 1}})).sequence_classifier);
    EXPECT_TRUE(with(classifier({{"id2label", {{"0", "LABEL_0"}}}})).sequence_classifier); // as transformers writes it
    EXPECT_TRUE(mentions(refusal(classifier(json::object())), "num_labels is 2"));
    EXPECT_TRUE(mentions(refusal(classifier({{"num_labels", 3}})), "num_labels is 3"));
}

TEST(DecoderConfig, RewardModelsOfEachFamily)
{
    for (const char* family : {"Llama", "Mistral", "Phi3"}) {
        const DecoderConfig config = with([&](json& c) {
            c["architectures"] = {cat(family, "ForSequenceClassification")};
            c["pad_token_id"] = nullptr;
            c["num_labels"] = 1;
        });
        EXPECT_TRUE(config.sequence_classifier);
        EXPECT_EQ(decoder_parameters(config).back().name, "score.weight");
    }
}

TEST(DecoderParameters, AreInTheOrderOfParameterIndex)
{
    DecoderConfig config = parse(llama());
    auto specs = decoder_parameters(config);
    const auto name = [&](std::int64_t index) { return specs.at(static_cast<std::size_t>(index)).name; };
    EXPECT_EQ(name(ParameterIndex::embedding), "model.embed_tokens.weight");
    EXPECT_EQ(name(ParameterIndex::input_norm(1)), "model.layers.1.input_layernorm.weight");
    EXPECT_EQ(name(ParameterIndex::out(1)), "model.layers.1.self_attn.o_proj.weight");
    EXPECT_EQ(name(ParameterIndex::post_norm(0)), "model.layers.0.post_attention_layernorm.weight");
    EXPECT_EQ(name(ParameterIndex::down(1)), "model.layers.1.mlp.down_proj.weight");
    EXPECT_EQ(name(ParameterIndex::final_norm(config)), "model.norm.weight");
    EXPECT_EQ(specs.size(), 14U);
    EXPECT_EQ(ParameterIndex::head(config), 0);
    const ParameterSpec& qkv = specs[static_cast<std::size_t>(ParameterIndex::qkv(1))];
    ASSERT_EQ(qkv.parts.size(), 3U);
    EXPECT_EQ(qkv.parts[2].name, "model.layers.1.self_attn.v_proj.weight");
    EXPECT_EQ(qkv.parts[2].row_begin, 48);
    EXPECT_EQ(qkv.rows, 64);
    config.tied_embeddings = false;
    specs = decoder_parameters(config);
    EXPECT_EQ(name(ParameterIndex::head(config)), "lm_head.weight");
    config.sequence_classifier = true;
    specs = decoder_parameters(config);
    EXPECT_EQ(name(ParameterIndex::head(config)), "score.weight");
    EXPECT_EQ(specs.back().elements(), config.hidden);
    config.model_type = "phi3"; // the family whose checkpoints hold the fused matrices
    specs = decoder_parameters(config);
    EXPECT_EQ(specs[static_cast<std::size_t>(ParameterIndex::qkv(0))].parts.at(0).name,
              "model.layers.0.self_attn.qkv_proj.weight");
    EXPECT_EQ(specs[static_cast<std::size_t>(ParameterIndex::gate_up(0))].rows, 96);
}

TEST(ModelFiles, CopiesWhatBelongsToTheModelButItsWeights)
{
    const TemporaryDirectory from;
    const TemporaryDirectory to;
    json config = llama();
    config["torch_dtype"] = "bfloat16";
    from.write("config.json", config.dump());
    for (const char* name : {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
                             "tokenizer.model", "README.md"})
        from.write(name, std::string("content of ") + name);
    for (const char* name : {"model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
                             "pytorch_model.bin", "metrics.jsonl", "training_args.bin", "x.json.partial-17", ".hidden"})
        from.write(name, "stays");
    fs::create_directory(from.path("checkpoints"));
    copy_model_files(from.path(""), to.path(""), {.dtype = DType::f32});
    EXPECT_EQ(std::distance(fs::directory_iterator(to.path("")), {}), 7);
    EXPECT_EQ(read_file(to.path("chat_template.jinja")), "content of chat_template.jinja");
    const json written = json::parse(read_file(to.path("config.json")));
    EXPECT_EQ(written["torch_dtype"], "float32");
    EXPECT_FALSE(written.contains("dtype"));
    EXPECT_EQ(DecoderConfig::from_directory(to.path("")).rope_theta, 100000.0);
}

TEST(ModelFiles, MakesARewardModelsConfig)
{
    const TemporaryDirectory from;
    const TemporaryDirectory to;
    json config = llama();
    config["dtype"] = "float32";
    from.write("config.json", config.dump());
    copy_model_files(from.path(""), to.path(""), {.dtype = DType::bf16, .sequence_classifier = true});
    const json written = json::parse(read_file(to.path("config.json")));
    EXPECT_EQ(written["architectures"], json({"LlamaForSequenceClassification"}));
    EXPECT_EQ(written["dtype"], "bfloat16");
    EXPECT_EQ(written["id2label"]["0"], "LABEL_0");
    EXPECT_TRUE(DecoderConfig::from_directory(to.path("")).sequence_classifier);
}

TEST(ModelFiles, ARewardModelHasNoPaddingTokenThatEndsAnswers)
{
    for (const bool stated : {true, false}) { // phi3: transformers assumes 32000, its end token
        const TemporaryDirectory from;
        const TemporaryDirectory to;
        json config = phi3_mini();
        if (!stated)
            config.erase("pad_token_id");
        from.write("config.json", config.dump());
        copy_model_files(from.path(""), to.path(""), {.dtype = DType::bf16, .sequence_classifier = true});
        const json written = json::parse(read_file(to.path("config.json")));
        EXPECT_EQ(written["architectures"], json({"Phi3ForSequenceClassification"}));
        ASSERT_TRUE(written.contains("pad_token_id"));
        EXPECT_TRUE(written["pad_token_id"].is_null());
    }
}

} // namespace
} // namespace selm
