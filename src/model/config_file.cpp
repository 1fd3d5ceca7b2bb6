#include "config_file.hpp"

#include <algorithm>
#include <cmath>

#include "selm/base/error.hpp"
#include "selm/base/files.hpp"

namespace selm {
namespace {

constexpr int most_nested = 32;

} // namespace

void ConfigSection::fail(const std::string& problem) const
{
    throw config_error(cat(path_, ": ", problem));
}

std::string ConfigSection::label(const char* key) const
{
    return cat("key '", name_, name_.empty() ? "" : ".", key, "'");
}

bool ConfigSection::has_sections() const
{
    return std::any_of(object_->begin(), object_->end(), [](const Json& value) { return value.is_object(); });
}

const nlohmann::json* ConfigSection::find(const char* key) const
{
    const auto found = object_->find(key);
    return found == object_->end() || found->is_null() ? nullptr : &*found;
}

const nlohmann::json& ConfigSection::required(const char* key) const
{
    const Json* value = find(key);
    if (!value)
        fail(cat(label(key), " is missing"));
    return *value;
}

ConfigSection ConfigSection::section(const char* key) const
{
    const Json& value = required(key);
    if (!value.is_object())
        fail(cat(label(key), " is ", value.dump(), ", but must be an object or null"));
    return {path_, name_.empty() ? key : cat(name_, ".", key), value};
}

std::int64_t ConfigSection::count(const char* key, std::int64_t most) const
{
    const Json& value = required(key);
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() < 1 ||
        value.get<std::uint64_t>() > static_cast<std::uint64_t>(most))
        fail(cat(label(key), " is ", value.dump(), ", but must be an integer from 1 to ", most));
    return value.get<std::int64_t>();
}

std::int64_t ConfigSection::count_or(const char* key, std::int64_t fallback, std::int64_t most) const
{
    return find(key) ? count(key, most) : fallback;
}

double ConfigSection::positive(const char* key) const
{
    const Json& value = required(key);
    if (!value.is_number() || !(value.get<double>() > 0) || !std::isfinite(value.get<double>()))
        fail(cat(label(key), " is ", value.dump(), ", but must be a positive number"));
    return value.get<double>();
}

double ConfigSection::positive_or(const char* key, double fallback) const
{
    return find(key) ? positive(key) : fallback;
}

bool ConfigSection::flag(const char* key) const
{
    const Json* value = find(key);
    if (value && !value->is_boolean())
        fail(cat(label(key), " is ", value->dump(), ", but must be true or false"));
    return value && value->get<bool>();
}

std::string ConfigSection::word(const char* key) const
{
    const Json* value = find(key);
    if (value && !value->is_string())
        fail(cat(label(key), " is ", value->dump(), ", but must be a word"));
    return value ? value->get<std::string>() : std::string();
}

ConfigFile::ConfigFile(const std::string& path) : path_(path)
{
    const auto refuse = [&](const std::string& problem) { throw config_error(cat(path_, ": ", problem)); };
    std::string text;
    try {
        text = read_file(path_);
    } catch (const Error& error) {
        throw config_error(error.what());
    }
    try {
        json_ = nlohmann::json::parse(text, [&](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
            if (depth > most_nested)
                refuse(cat("nested deeper than ", most_nested, " levels"));
            return true;
        });
    } catch (const nlohmann::json::exception& error) {
        refuse(cat("not valid JSON (", error.what(), ")"));
    }
    if (!json_.is_object())
        refuse("not a JSON object");
}

} // namespace selm
