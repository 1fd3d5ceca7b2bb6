#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

#include "added_tokens.hpp"
#include "selm/base/error.hpp"

/// Typed access to entries of a tokenizer's JSON files; every error is one of the configuration and names the entry.
namespace selm::text {

using Json = nlohmann::json;

inline constexpr std::int64_t most_ids = 1 << 24; ///< guards memory against an absurd id

inline bool is_absent(const Json& object, const char* key)
{
    const auto found = object.find(key);
    return found == object.end() || found->is_null();
}

/// The entry @p key of @p object. @throws Error configuration naming it when it is absent.
inline const Json& need(const Json& object, const char* key, std::string_view where)
{
    const auto found = object.find(key);
    if (!object.is_object() || found == object.end())
        throw config_error(cat("the entry ", where, ".", key, " is missing"));
    return *found;
}

inline std::string need_string(const Json& object, const char* key, std::string_view where)
{
    const Json& value = need(object, key, where);
    if (!value.is_string())
        throw config_error(cat("the entry ", where, ".", key, " is not a string"));
    return value.get<std::string>();
}

inline const Json& need_list(const Json& object, const char* key, std::string_view where)
{
    const Json& value = need(object, key, where);
    if (!value.is_array())
        throw config_error(cat("the entry ", where, ".", key, " is not a list"));
    return value;
}

/// A boolean, @p missing where it is absent or null.
inline bool flag(const Json& object, const char* key, bool missing, std::string_view where)
{
    const auto found = object.find(key);
    if (found == object.end() || found->is_null())
        return missing;
    if (!found->is_boolean())
        throw config_error(cat("the entry ", where, ".", key, " is neither true nor false"));
    return found->get<bool>();
}

inline std::int32_t token_id(const Json& value, std::string_view token)
{
    if (!value.is_number_integer() || value.get<std::int64_t>() < 0 || value.get<std::int64_t>() >= most_ids)
        throw config_error(cat("the id of the token \"", token, "\" is not a number from 0 to ", most_ids - 1));
    return static_cast<std::int32_t>(value.get<std::int64_t>());
}

inline std::string type_of(const Json& component, std::string_view where)
{
    return need_string(component, "type", where);
}

inline Error unsupported(std::string_view what, std::string_view supported)
{
    return config_error(
        cat(what, " is not supported (the ids would differ from Hugging Face's). Supported: ", supported));
}

/// An added token but for its id.
inline AddedToken read_added_token(const Json& entry, std::string_view where)
{
    AddedToken token;
    token.content = need_string(entry, "content", where);
    token.special = flag(entry, "special", false, where);
    token.single_word = flag(entry, "single_word", false, where);
    token.lstrip = flag(entry, "lstrip", false, where);
    token.rstrip = flag(entry, "rstrip", false, where);
    token.normalized = flag(entry, "normalized", !token.special, where);
    return token;
}

} // namespace selm::text
