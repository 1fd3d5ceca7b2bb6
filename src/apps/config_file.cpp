#include "config_file.hpp"

#include <algorithm>
#include <map>
#include <numeric>
#include <utility>

#include "selm/base/error.hpp"

namespace selm::apps {

namespace {

constexpr std::string_view blanks = " \t\r";

std::string_view trim(std::string_view text)
{
    const std::size_t begin = text.find_first_not_of(blanks);
    if (begin == std::string_view::npos)
        return {};
    return text.substr(begin, text.find_last_not_of(blanks) - begin + 1);
}

bool starts_comment(std::string_view text, std::size_t at)
{
    return (text[at] == '#' || text[at] == ';') && (at == 0 || blanks.find(text[at - 1]) != std::string_view::npos);
}

std::string_view without_comment(std::string_view text)
{
    for (std::size_t at = 0; at < text.size(); ++at)
        if (starts_comment(text, at))
            return text.substr(0, at);
    return text;
}

/// @param text starts with a quote. Only a comment may follow the closing one.
std::string unquote(std::string_view text, const std::string& place)
{
    std::string value;
    std::size_t at = 1;
    for (; at < text.size() && text[at] != '"'; ++at) {
        if (text[at] != '\\') {
            value += text[at];
            continue;
        }
        ++at;
        const char escaped = at < text.size() ? text[at] : '\0';
        SELM_VALIDATE(escaped == '"' || escaped == '\\' || escaped == 'n', ExitCode::configuration,
                      place << "a backslash in quotes must be followed by \", \\ or n");
        value += escaped == 'n' ? '\n' : escaped;
    }
    SELM_VALIDATE(at < text.size(), ExitCode::configuration, place << "the closing quote is missing");
    SELM_VALIDATE(trim(without_comment(text.substr(at + 1))).empty(), ExitCode::configuration,
                  place << "there is text after the closing quote");
    return value;
}

std::string read_section(std::string_view line, const std::string& place)
{
    const std::string_view header = trim(without_comment(line));
    SELM_VALIDATE(header.size() > 2 && header.back() == ']', ExitCode::configuration,
                  place << "'" << header << "' is not a section. Write [name]");
    return std::string(trim(header.substr(1, header.size() - 2)));
}

} // namespace

std::vector<ConfigLine> parse_config(std::string_view text, const std::string& file)
{
    std::vector<ConfigLine> lines;
    std::map<std::pair<std::string, std::string>, int> first_seen;
    std::string section;
    int number = 0;
    while (!text.empty()) {
        const std::size_t end = std::min(text.find('\n'), text.size());
        const std::string_view line = trim(text.substr(0, end));
        text.remove_prefix(std::min(end + 1, text.size()));
        const std::string place = cat(file, ":", ++number, ": ");
        if (line.empty() || starts_comment(line, 0))
            continue;
        if (line.front() == '[') {
            section = read_section(line, place);
            continue;
        }
        const std::size_t equals = line.find('=');
        SELM_VALIDATE(equals != std::string_view::npos && equals > 0, ExitCode::configuration,
                      place << "'" << line << "' is not understood. Write key = value, [section] or # comment");
        ConfigLine entry{section, std::string(trim(line.substr(0, equals))), "", number};
        SELM_VALIDATE(!section.empty(), ExitCode::configuration,
                      place << "'" << entry.key << "' stands before the first section. Put it below [run] or another section");
        const std::string_view value = trim(line.substr(equals + 1));
        entry.value = value.starts_with('"') ? unquote(value, place) : std::string(trim(without_comment(value)));
        const auto [seen, is_new] = first_seen.emplace(std::pair(section, entry.key), number);
        SELM_VALIDATE(is_new, ExitCode::configuration,
                      place << "'" << entry.key << "' is already set in [" << section << "] on line " << seen->second
                            << ". Keep one of the two");
        lines.push_back(std::move(entry));
    }
    return lines;
}

std::string quote_config_value(const std::string& value)
{
    bool plain = trim(value) == value && !value.starts_with('"') && value.find('\n') == std::string::npos &&
                 without_comment(value) == value;
    if (plain)
        return value;
    std::string quoted = "\"";
    for (const char c : value) {
        if (c == '"' || c == '\\')
            quoted += '\\';
        if (c == '\n')
            quoted += "\\n";
        else
            quoted += c;
    }
    return quoted + "\"";
}

std::string nearest_word(const std::string& word, const std::vector<std::string>& candidates)
{
    std::string best;
    std::size_t best_distance = std::max<std::size_t>(2, word.size() / 3) + 1;
    for (const std::string& candidate : candidates) {
        // Levenshtein distance, one row at a time.
        std::vector<std::size_t> row(candidate.size() + 1);
        std::iota(row.begin(), row.end(), std::size_t{0});
        for (std::size_t i = 1; i <= word.size(); ++i) {
            std::size_t diagonal = row[0];
            row[0] = i;
            for (std::size_t j = 1; j <= candidate.size(); ++j) {
                const std::size_t replace = diagonal + (word[i - 1] == candidate[j - 1] ? 0 : 1);
                diagonal = row[j];
                row[j] = std::min({replace, row[j] + 1, row[j - 1] + 1});
            }
        }
        if (row.back() < best_distance) {
            best_distance = row.back();
            best = candidate;
        }
    }
    return best;
}

} // namespace selm::apps
