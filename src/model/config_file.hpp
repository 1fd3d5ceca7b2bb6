#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <utility>

#include <nlohmann/json.hpp>

namespace selm {

/// Largest width of a matrix (vocabulary, hidden size, ...): products of two of them are far from overflowing.
inline constexpr std::int64_t most_columns = std::int64_t{1} << 24;
inline constexpr std::int64_t most_positions = std::numeric_limits<std::int32_t>::max();

/// An object of a config.json: the whole, or a part such as rope_scaling. What it throws (Error configuration) names the
/// file, the part and the key. Borrows the JSON.
class ConfigSection {
  public:
    using Json = nlohmann::json;

    /// @param name empty for the whole file.
    ConfigSection(std::string path, std::string name, const Json& object)
        : path_(std::move(path)), name_(std::move(name)), object_(&object)
    {
    }
    const std::string& name() const { return name_; }
    [[noreturn]] void fail(const std::string& problem) const;

    bool has(const char* key) const { return object_->contains(key); } ///< null counts as there
    bool has_sections() const;                                         ///< is any value an object?
    /// The value of a key, or nullptr when the key is missing or null.
    const Json* find(const char* key) const;
    /// An object in this one. @throws when it is something else, or the value of find() is nullptr.
    ConfigSection section(const char* key) const;

    /// An integer from 1 to `most`.
    std::int64_t count(const char* key, std::int64_t most = most_columns) const;
    std::int64_t count_or(const char* key, std::int64_t fallback, std::int64_t most = most_columns) const;
    double positive(const char* key) const;
    double positive_or(const char* key, double fallback) const;
    bool flag(const char* key) const; ///< false when missing or null
    /// A word, or empty when missing or null.
    std::string word(const char* key) const;

  private:
    const Json& required(const char* key) const;
    std::string label(const char* key) const;

    std::string path_;
    std::string name_;
    const Json* object_;
};

/// A config.json that has been read: a JSON object. @throws Error configuration: missing, unreadable or malformed.
class ConfigFile {
  public:
    explicit ConfigFile(const std::string& path);
    ConfigSection root() const { return {path_, "", json_}; }

  private:
    std::string path_;
    nlohmann::json json_;
};

} // namespace selm
