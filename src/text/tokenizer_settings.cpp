#include "tokenizer_settings.hpp"

#include <charconv>
#include <filesystem>

#include "selm/base/files.hpp"
#include "tokenizer_json.hpp"

namespace selm::text {
namespace {

/// An empty object where there is no such file.
Json read_object(const std::string& path)
{
    if (!std::filesystem::exists(path))
        return Json::object();
    try {
        Json root = Json::parse(read_file(path));
        if (!root.is_object())
            throw config_error("is not a JSON object");
        return root;
    } catch (const Json::exception& error) {
        throw config_error(cat("cannot be read (", error.what(), "). Is the file damaged?"));
    }
}

/// A token's text: "<s>", or an object with its content.
std::optional<std::string> special_token(const Json& root, const char* key)
{
    if (is_absent(root, key))
        return std::nullopt;
    const Json& entry = root[key];
    if (entry.is_object())
        return need_string(entry, "content", key);
    if (!entry.is_string())
        throw config_error(cat("the entry ", key, " is neither a token's text nor an object with its content"));
    return entry.get<std::string>();
}

std::optional<bool> optional_flag(const Json& root, const char* key)
{
    return is_absent(root, key) ? std::nullopt : std::optional(flag(root, key, false, "tokenizer_config"));
}

/// An id or a list of ids, of which the first counts.
std::optional<std::int32_t> first_id(const Json& root, const char* key)
{
    if (is_absent(root, key) || (root[key].is_array() && root[key].empty()))
        return std::nullopt;
    return token_id(root[key].is_array() ? root[key].front() : root[key], key);
}

/// {"32000": {"content": "<|endoftext|>", "lstrip": false, ...}, ...}
std::vector<AddedToken> added_tokens_decoder(const Json& root)
{
    std::vector<AddedToken> tokens;
    if (is_absent(root, "added_tokens_decoder"))
        return tokens;
    for (const auto& [id, entry] : root["added_tokens_decoder"].items()) {
        AddedToken token = read_added_token(entry, "added_tokens_decoder");
        const auto [end, error] = std::from_chars(id.data(), id.data() + id.size(), token.id);
        if (error != std::errc() || end != id.data() + id.size() || token.id < 0 || token.id >= most_ids)
            throw config_error(cat("the entry added_tokens_decoder has the id ", id, " of the token \"", token.content,
                                   "\", which is not a number from 0 to ", most_ids - 1));
        tokens.push_back(std::move(token));
    }
    return tokens;
}

} // namespace

TokenizerSettings read_tokenizer_settings(const std::string& directory)
{
    TokenizerSettings settings;
    const std::string config_path = directory + "/tokenizer_config.json";
    with_context(config_path, [&] {
        const Json config = read_object(config_path);
        settings.bos_token = special_token(config, "bos_token");
        settings.eos_token = special_token(config, "eos_token");
        settings.add_bos_token = optional_flag(config, "add_bos_token");
        settings.add_eos_token = optional_flag(config, "add_eos_token");
        settings.legacy = optional_flag(config, "legacy");
        settings.added_tokens = added_tokens_decoder(config);
    });
    const std::string map_path = directory + "/special_tokens_map.json";
    with_context(map_path, [&] {
        const Json map = read_object(map_path);
        if (!settings.bos_token)
            settings.bos_token = special_token(map, "bos_token");
        if (!settings.eos_token)
            settings.eos_token = special_token(map, "eos_token");
    });
    const std::string model_path = directory + "/config.json";
    with_context(model_path, [&] {
        const Json model = read_object(model_path);
        settings.bos_id = first_id(model, "bos_token_id");
        settings.eos_id = first_id(model, "eos_token_id");
    });
    return settings;
}

} // namespace selm::text
