#include <cmath>
#include <deque>
#include <exception>
#include <fstream>
#include <future>

#include <nlohmann/json.hpp>

#include "import_source.hpp"
#include "selm/base/error.hpp"
#include "selm/text/utf8.hpp"

namespace selm::import_detail {

namespace {

using Json = nlohmann::json;

constexpr int deepest = 64; // a preference row needs 3; the parser's tree is freed recursively

/// Nesting is checked before parsing: a line of a million brackets would exhaust the stack.
void check_depth(const std::string& line)
{
    int depth = 0;
    bool in_text = false;
    for (std::size_t i = 0; i < line.size(); ++i) {
        const char c = line[i];
        if (in_text) {
            if (c == '\\')
                ++i;
            else if (c == '"')
                in_text = false;
        } else if (c == '"') {
            in_text = true;
        } else if (c == '[' || c == '{') {
            if (++depth > deepest)
                throw BadRow{"too deeply nested", cat("JSON nested deeper than ", deepest, " levels (no preference row is)"), "Correct the row"};
        } else if (c == ']' || c == '}') {
            --depth;
        }
    }
}

BadRow wrong_type(const std::string& field, const char* expected)
{
    return {"wrong type", cat("\"", field, "\" is not ", expected, " (it cannot be used)"), "Correct the row"};
}

Cell cell_of(const Json& object, const char* field)
{
    const auto found = object.find(field);
    if (found == object.end() || found->is_null())
        return {};
    if (found->is_string())
        return std::string_view(found->get_ref<const std::string&>());
    if (!found->is_array())
        throw wrong_type(field, "a text or a list of messages");
    std::vector<SourceMessage> messages;
    for (const Json& message : *found) {
        const auto role = message.is_object() ? message.find("role") : message.end();
        const auto content = message.is_object() ? message.find("content") : message.end();
        if (role == message.end() || content == message.end())
            throw BadRow{"missing field", cat("a message of \"", field, "\" lacks \"role\" or \"content\" (both are needed)"), "Correct the row"};
        if (!role->is_string() || !content->is_string())
            throw wrong_type(field, "a list of messages with texts as role and content");
        messages.push_back({role->get_ref<const std::string&>(), content->get_ref<const std::string&>()});
    }
    return messages;
}

double score_of(const Json& object, const char* field)
{
    const auto found = object.find(field);
    if (found == object.end() || found->is_null())
        return std::numeric_limits<double>::quiet_NaN();
    if (!found->is_number())
        throw wrong_type(field, "a number");
    return found->get<double>();
}

/// @param written holds an id that is a number.
std::optional<std::string_view> id_of(const Json& object, std::string& written)
{
    const auto found = object.find("prompt_id");
    if (found == object.end() || found->is_null())
        return std::nullopt;
    if (found->is_number_integer())
        return written = found->dump();
    if (!found->is_string())
        throw wrong_type("prompt_id", "a text");
    return found->get_ref<const std::string&>();
}

Json parse_line(const std::string& line)
{
    if (const auto at = find_invalid_utf8(line))
        throw BadRow{"invalid UTF-8", cat("not valid UTF-8 at byte ", *at, " of the line (tokens of such text are undefined)"), "Correct the row"};
    check_depth(line);
    try {
        return Json::parse(line);
    } catch (const Json::parse_error& error) {
        throw BadRow{"not JSON", cat("not JSON, at byte ", error.byte, " of the line (every line holds one JSON object)"), "Correct the row"};
    } catch (const Json::exception&) {
        throw BadRow{"not JSON", "a number beyond the range of double (it cannot be stored)", "Correct the row"};
    }
}

struct Line {
    std::int64_t index = 0;
    std::string text;
    Json object;            ///< once it is parsed
    std::exception_ptr bad; ///< the BadRow that it gave instead
};

std::vector<Line> parsed(std::vector<Line> lines)
{
    for (Line& line : lines)
        try {
            line.object = parse_line(line.text);
            if (!line.object.is_object())
                throw BadRow{"not an object", "not a JSON object (every line holds one, with prompt, chosen and rejected)", "Correct the row"};
        } catch (const BadRow&) {
            line.bad = std::current_exception();
        }
    return lines;
}

/// Parsing takes most of the time: batches of lines are parsed ahead by other threads.
class JsonLines final : public Source {
  public:
    explicit JsonLines(const std::string& path) : path_(path), in_(path, std::ios::binary)
    {
        if (!in_)
            throw data_error(cat(path, " cannot be read (it is the input). Check the path and its permissions"));
    }

    bool next() override
    {
        if (++at_ < lines_.size())
            return true;
        while (upcoming_.size() < batches_ahead && read_batch()) {
        }
        if (upcoming_.empty())
            return false;
        lines_ = upcoming_.front().get();
        upcoming_.pop_front();
        at_ = 0;
        read_batch(); // parsed while these lines are looked at
        return true;
    }

    std::int64_t index() const override { return lines_[at_].index; }
    std::string place() const override { return cat("line ", index() + 1); }

    SourceRow parse() override
    {
        if (lines_[at_].bad)
            std::rethrow_exception(lines_[at_].bad);
        const Json& object = lines_[at_].object;
        SourceRow row;
        row.prompt = cell_of(object, "prompt");
        row.chosen = cell_of(object, "chosen");
        row.rejected = cell_of(object, "rejected");
        row.id = id_of(object, written_id_);
        row.score_chosen = score_of(object, "score_chosen");
        row.score_rejected = score_of(object, "score_rejected");
        return row;
    }

  private:
    static constexpr std::size_t batch_lines = 256, batches_ahead = 2;

    /// Reads lines that are not blank and has them parsed; false: there are none left.
    bool read_batch()
    {
        std::vector<Line> lines;
        std::string text;
        while (lines.size() < batch_lines && std::getline(in_, text)) {
            ++read_;
            if (text.find_first_not_of(" \t\r") != std::string::npos)
                lines.push_back({.index = read_, .text = std::move(text), .object = {}, .bad = {}});
        }
        if (in_.bad())
            throw io_error(cat(path_, ": reading failed after line ", read_ + 1, ". Check its file system"));
        if (lines.empty())
            return false;
        upcoming_.push_back(std::async(std::launch::async, parsed, std::move(lines)));
        return true;
    }

    std::string path_;
    std::ifstream in_;
    std::int64_t read_ = -1; ///< index of the last line that was read
    std::deque<std::future<std::vector<Line>>> upcoming_;
    std::vector<Line> lines_; ///< parsed; what parse() gives points into the one at at_
    std::size_t at_ = 0;
    std::string written_id_;
};

} // namespace

std::unique_ptr<Source> open_jsonl(const std::string& path)
{
    return std::make_unique<JsonLines>(path);
}

} // namespace selm::import_detail
