#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace selm::apps {

/// One `key = value` of a configuration file.
struct ConfigLine {
    std::string section;
    std::string key;
    std::string value; ///< without quotes and comment
    int line = 0;      ///< from 1
};

/**
 * @brief Reads an INI text: `[section]`, `key = value`, comments from `#` or `;` at the start of a line or after a blank.
 * A value in double quotes keeps blanks and comment signs; in it \" \\ and \n stand for a quote, a backslash, a new line.
 * @throws Error configuration "FILE:LINE: problem" on any other line, and on a key that a section has twice.
 */
std::vector<ConfigLine> parse_config(std::string_view text, const std::string& file);

/// The value as parse_config reads it back: in quotes where it needs them.
std::string quote_config_value(const std::string& value);

/// The candidate that is most like @p word (edit distance at most a third of its length, at least 2), or "".
std::string nearest_word(const std::string& word, const std::vector<std::string>& candidates);

} // namespace selm::apps
