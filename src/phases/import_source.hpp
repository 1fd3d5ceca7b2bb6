#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "selm/data/preference_columns.hpp"

namespace selm::import_detail {

/// What is wrong with one row of the source; the caller adds file and line.
struct BadRow {
    std::string reason;  ///< for counting: "empty answer", "not JSON", ...
    std::string problem; ///< "problem (why it matters)"
    std::string advice;  ///< what to do
};

struct SourceMessage {
    std::string_view role, content;
};

/// A cell that may be absent, a plain text, or a list of messages. Texts belong to the source.
using Cell = std::variant<std::monostate, std::string_view, std::vector<SourceMessage>>;

struct SourceRow {
    Cell prompt, chosen, rejected;
    std::optional<std::string_view> id;
    double score_chosen = std::numeric_limits<double>::quiet_NaN();
    double score_rejected = std::numeric_limits<double>::quiet_NaN();
};

/// Rows of a source file, one after the other.
class Source {
  public:
    virtual ~Source() = default;
    /// Moves to the next row; false at the end. @throws Error bad_data or io: the file cannot be read further.
    virtual bool next() = 0;
    virtual std::int64_t index() const = 0; ///< 0-based line or row of the file
    virtual std::string place() const = 0;  ///< "line 7" (1-based), "row 7" (1-based)
    /// The row at hand; its texts hold until next(). @throws BadRow.
    virtual SourceRow parse() = 0;
};

std::unique_ptr<Source> open_jsonl(const std::string& path);   ///< @throws Error bad_data
std::unique_ptr<Source> open_parquet(const std::string& path); ///< @throws Error bad_data

/// A row that can be stored; its texts belong to the source, but for an id that was made here.
struct CheckedRow {
    std::string made_id;
    std::optional<std::string_view> id;
    std::string_view prompt, chosen, rejected;
    std::vector<MessageView> messages; ///< the conversation before the answer
    double score_chosen = std::numeric_limits<double>::quiet_NaN();
    double score_rejected = std::numeric_limits<double>::quiet_NaN();
    bool empty_answer = false;

    PreferenceRowView view(std::int64_t row_source) const
    {
        return {.row_source = row_source, .id = id ? *id : std::string_view(made_id), .prompt = prompt, .messages = messages, .chosen = chosen,
                .rejected = rejected, .score_chosen = score_chosen, .score_rejected = score_rejected};
    }
};

/// Turns a source row into a preference row: order of roles, one conversation for both answers, texts. @throws BadRow.
CheckedRow check_row(const SourceRow& source, std::int64_t index);

/// Text without NUL, valid UTF-8. @throws BadRow.
void check_text(std::string_view text, const char* field);

} // namespace selm::import_detail
