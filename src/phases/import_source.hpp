#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "selm/data/preferences.hpp"

namespace selm::import_detail {

/// What is wrong with one row of the source; the caller adds file and line.
struct BadRow {
    std::string reason;  ///< for counting: "empty answer", "not JSON", ...
    std::string problem; ///< "problem (why it matters)"
    std::string advice;  ///< what to do
};

struct SourceMessage {
    std::string role, content;
};

/// A cell that may be absent, a plain text, or a list of messages.
using Cell = std::variant<std::monostate, std::string, std::vector<SourceMessage>>;

struct SourceRow {
    Cell prompt, chosen, rejected;
    std::optional<std::string> id;
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
    /// The row at hand. @throws BadRow.
    virtual SourceRow parse() const = 0;
};

std::unique_ptr<Source> open_jsonl(const std::string& path);   ///< @throws Error bad_data
std::unique_ptr<Source> open_parquet(const std::string& path); ///< @throws Error bad_data

struct CheckedRow {
    PreferenceRow row; ///< without row and row_source
    bool empty_answer = false;
};

/// Turns a source row into a preference row: order of roles, one conversation for both answers, texts. @throws BadRow.
CheckedRow check_row(SourceRow source, std::int64_t index);

/// Text without NUL, valid UTF-8. @throws BadRow.
void check_text(const std::string& text, const std::string& field);

} // namespace selm::import_detail
