#include "given_responses.hpp"

#include <fstream>
#include <map>
#include <string_view>
#include <unordered_map>
#include <utility>

#include <nlohmann/json.hpp>

#include "selm/base/error.hpp"
#include "selm/text/utf8.hpp"

namespace selm {
namespace {

struct Line {
    std::int64_t number = 0; ///< from 1
    std::string response;
};

std::string text_field(const nlohmann::json& object, const char* name)
{
    const auto field = object.find(name);
    SELM_VALIDATE(
        field != object.end() && field->is_string(), ExitCode::bad_data,
        "field \"" << name
                   << "\" is missing or no text. Every line is {\"prompt_id\": \"...\", \"response\": \"...\"}");
    return field->get<std::string>();
}

std::pair<std::string, std::string> parse_line(const std::string& line)
{
    if (find_invalid_utf8(line))
        throw data_error("not UTF-8. Write the file as UTF-8");
    const auto object = nlohmann::json::parse(line, nullptr, false);
    SELM_VALIDATE(object.is_object(), ExitCode::bad_data,
                  "not a JSON object. Every line is {\"prompt_id\": \"...\", \"response\": \"...\"}");
    return {text_field(object, "prompt_id"), text_field(object, "response")};
}

std::unordered_map<std::string, Line> read_lines(const std::string& path)
{
    std::ifstream file(path);
    SELM_VALIDATE(file, ExitCode::bad_data, path << ": cannot be read. Pass --responses FILE.jsonl or none");
    std::unordered_map<std::string, Line> lines;
    std::int64_t number = 0;
    for (std::string line; std::getline(file, line);) {
        ++number;
        if (line.find_first_not_of(" \t\r") == std::string::npos)
            continue;
        with_context(cat(path, " line ", number), [&] {
            auto [id, response] = parse_line(line);
            const auto [place, added] = lines.try_emplace(std::move(id), Line{number, std::move(response)});
            if (!added)
                throw data_error(cat("prompt_id \"", place->first, "\" is also on line ", place->second.number,
                                     " (which answer is meant?). Keep one of them"));
        });
    }
    SELM_VALIDATE(!file.bad(), ExitCode::bad_data, path << ": reading failed after line " << number);
    return lines;
}

} // namespace

std::vector<GeneratedAnswer> read_given_responses(const std::string& path, const PreferencesReader& prefs,
                                                  std::int64_t begin, std::int64_t end)
{
    const auto lines = read_lines(path);
    const std::vector<std::string> ids = prefs.ids();
    std::unordered_map<std::string_view, std::int64_t> first_row; // of each id within the range
    std::vector<GeneratedAnswer> answers;
    for (std::int64_t row = begin; row < end; ++row) {
        const std::string& id = ids[static_cast<std::size_t>(row)];
        const auto line = lines.find(id);
        SELM_VALIDATE(line != lines.end(), ExitCode::bad_data,
                      path << ": no line for row " << row << " (prompt_id \"" << id << "\" of " << prefs.path()
                           << "). Add its answer, or generate it");
        const auto [first, added] = first_row.try_emplace(id, row);
        SELM_VALIDATE(added || prefs.prompt(first->second) == prefs.prompt(row), ExitCode::bad_data,
                      path << " line " << line->second.number << ": prompt_id \"" << id << "\" belongs to rows "
                           << first->second << " and " << row
                           << " with different prompts (whose answer is it?). Give the rows ids of their own");
        answers.push_back({.row = row,
                           .text = line->second.response,
                           .tokens = {},
                           .logprobs = {},
                           .finish_reason = FinishReason::elsewhere});
    }
    if (first_row.size() == lines.size())
        return answers;
    std::unordered_map<std::string_view, bool> known;
    for (const std::string& id : ids)
        known.emplace(id, true);
    std::map<std::int64_t, std::string> unknown; // by line
    for (const auto& [id, line] : lines) {
        if (!known.contains(id))
            unknown.emplace(line.number, id);
    }
    if (!unknown.empty())
        throw data_error(cat(path, " line ", unknown.begin()->first, ": prompt_id \"", unknown.begin()->second,
                             "\" is not in ", prefs.path(), " (", unknown.size(),
                             " such line(s)). Use the answers to these prompts"));
    return answers;
}

} // namespace selm
