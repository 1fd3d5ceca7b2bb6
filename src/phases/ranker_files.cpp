#include "ranker_files.hpp"

#include <algorithm>
#include <array>
#include <filesystem>
#include <utility>

#include <nlohmann/json.hpp>

#include "selm/base/error.hpp"
#include "selm/base/files.hpp"

namespace selm {
namespace {

using nlohmann::ordered_json;
namespace fs = std::filesystem;

constexpr const char* copied_files[] = {"ranker_config.json", "tokenizer_config.json", "spm.model",
                                        "special_tokens_map.json"};
constexpr const char* mask_token = "[MASK]";

ordered_json read_object(const std::string& path)
{
    ordered_json json = ordered_json::parse(read_file(path), nullptr, false);
    SELM_VALIDATE(json.is_object(), ExitCode::configuration,
                  path << " is not a JSON object (the model cannot be copied). Use the original file");
    return json;
}

void write_json(const std::string& path, const ordered_json& json)
{
    write_file_atomically(path, json.dump(2) + "\n");
}

/// PairRM's tokens and the mask token with their ids, by id.
std::vector<std::pair<std::string, std::int32_t>> appended_tokens(const UnigramTokenizer& tokenizer)
{
    std::vector<std::pair<std::string, std::int32_t>> tokens;
    if (const auto mask = tokenizer.token_id(mask_token))
        tokens.emplace_back(mask_token, *mask);
    for (const std::string& token : pair_prefix_tokens)
        tokens.emplace_back(token, tokenizer.token_id(token).value());
    return tokens;
}

void write_added_tokens(const std::string& from, const std::string& to, const UnigramTokenizer& tokenizer)
{
    ordered_json json = fs::exists(from) ? read_object(from) : ordered_json::object();
    for (const auto& [token, id] : appended_tokens(tokenizer))
        json[token] = id;
    write_json(to, json);
}

void write_tokenizer_json(const std::string& from, const std::string& to, const UnigramTokenizer& tokenizer)
{
    ordered_json json = read_object(from);
    ordered_json& added = json["added_tokens"];
    for (const auto& [token, id] : appended_tokens(tokenizer)) {
        const auto same = [&, &text = token](const ordered_json& entry) { return entry.value("content", "") == text; };
        if (std::none_of(added.begin(), added.end(), same))
            added.push_back({{"id", id},
                             {"content", token},
                             {"single_word", false},
                             {"lstrip", false},
                             {"rstrip", false},
                             {"normalized", false},
                             {"special", false}});
    }
    write_json(to, json);
}

void write_config(const std::string& from, const std::string& to, const DebertaConfig& config, const PairTokens& tokens,
                  DType save_dtype)
{
    ordered_json json = read_object(from);
    if (json.contains("hidden_size")) { // not a RankerConfig, which names neither shapes nor ids
        json["architectures"] = {"DebertaV2PairRM"};
        json["vocab_size"] = config.vocabulary;
        json["n_tasks"] = 1;
        json["sep_token_id"] = tokens.sep;
        json["source_prefix_id"] = tokens.source;
        json["cand1_prefix_id"] = tokens.candidate1;
        json["cand2_prefix_id"] = tokens.candidate2;
        json["cand_prefix_id"] = tokens.candidate;
        if (!json.contains("drop_out"))
            json["drop_out"] = 0.05;
        for (const char* key : {"torch_dtype", "dtype"})
            if (json.contains(key))
                json[key] = save_dtype == DType::f32 ? "float32" : "bfloat16";
    }
    write_json(to, json);
}

} // namespace

void write_ranker_files(const std::string& from, const std::string& to, const DebertaConfig& config,
                        const PairTokens& tokens, const UnigramTokenizer& tokenizer, DType save_dtype)
{
    for (const char* name : copied_files) {
        const fs::path source = fs::path(from) / name;
        std::error_code error;
        if (fs::exists(source))
            fs::copy_file(source, fs::path(to) / name, fs::copy_options::overwrite_existing, error);
        if (error)
            throw io_error(cat("cannot copy ", source.string(), " to ", to, ": ", error.message()));
    }
    if (fs::exists(from + "/tokenizer.json"))
        write_tokenizer_json(from + "/tokenizer.json", to + "/tokenizer.json", tokenizer);
    write_added_tokens(from + "/added_tokens.json", to + "/added_tokens.json", tokenizer);
    write_config(from + "/config.json", to + "/config.json", config, tokens, save_dtype);
}

} // namespace selm
