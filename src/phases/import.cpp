#include "selm/phases/import.hpp"

#include <charconv>
#include <filesystem>
#include <future>
#include <limits>

#include "import_source.hpp"
#include "selm/base/hash.hpp"
#include "selm/comm/agree.hpp"
#include "selm/comm/claim.hpp"
#include "selm/data/preference_columns.hpp"
#include "selm/data/preferences.hpp"
#include "selm/phases/config_text.hpp"

namespace selm {

namespace {

using import_detail::BadRow;
using import_detail::CheckedRow;
using import_detail::Source;

struct RowRange {
    std::int64_t begin = 0;
    std::optional<std::int64_t> end; ///< nothing: to the end of the file
};

std::int64_t parse_bound(const std::string& text, const std::string& whole)
{
    std::int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value < 0)
        throw usage_error(cat("--rows ", whole, " is not A:B (rows A up to, not including, B; counted from 0). Write for example --rows 0:96"));
    return value;
}

RowRange parse_rows(const std::string& text)
{
    RowRange range;
    if (text.empty())
        return range;
    const std::size_t colon = text.find(':');
    if (colon == std::string::npos)
        parse_bound("", text);
    if (colon > 0)
        range.begin = parse_bound(text.substr(0, colon), text);
    if (colon + 1 < text.size())
        range.end = parse_bound(text.substr(colon + 1), text);
    if (range.end && *range.end <= range.begin)
        throw usage_error(cat("--rows ", text, " holds no row (the end is not part of it). Write for example --rows 0:96"));
    return range;
}

bool ends_with(const std::string& text, std::string_view end)
{
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

void check_word(const char* option, const std::string& value, std::initializer_list<const char*> words)
{
    std::string list;
    for (const char* word : words) {
        if (value == word)
            return;
        list += (list.empty() ? "" : ", ") + std::string(word);
    }
    throw usage_error(cat("--", option, " ", value, " is unknown. Use one of: ", list));
}

std::unique_ptr<Source> open_source(const std::string& path)
{
    std::error_code error;
    if (!std::filesystem::exists(path, error))
        throw data_error(cat(path, " does not exist (it is the input). Check the path"));
    if (!std::filesystem::is_regular_file(path, error))
        throw data_error(cat(path, " is not a file (a .jsonl or .parquet file was expected). Give the file's path"));
    return ends_with(path, ".parquet") ? import_detail::open_parquet(path) : import_detail::open_jsonl(path);
}

/// Reads on one rank; holds what was kept.
class Importer {
  public:
    Importer(const ImportOptions& options, ImportReport& report) : options_(options), report_(report), range_(parse_rows(options.rows)) {}

    PreferenceColumns run()
    {
        const auto source = open_source(options_.input);
        std::int64_t last = -1;
        while ((options_.limit == 0 || rows_.rows() < options_.limit) && !(range_.end && last + 1 >= *range_.end)
               && source->next()) {
            last = source->index();
            if (range_.end && last >= *range_.end)
                break;
            if (last < range_.begin)
                continue;
            ++report_.rows_read;
            take(*source);
        }
        const bool limited = options_.limit != 0 && rows_.rows() == options_.limit;
        if (range_.end && !limited && last + 1 < *range_.end)
            throw data_error(cat(options_.input, " has ", last + 1, " rows (--rows ", options_.rows, " asks for more). Ask for rows that exist"));
        if (rows_.rows() == 0)
            throw data_error(cat(options_.input, " gives no row (", report_.rows_read, " looked at, ", skipped(), " skipped; there is nothing to train on). "
                                 "Check the file and --rows"));
        return std::move(rows_);
    }

  private:
    void take(Source& source)
    {
        try {
            const CheckedRow checked = import_detail::check_row(source.parse(), source.index());
            if (checked.empty_answer) {
                if (options_.on_empty_answer == "stop")
                    throw BadRow{"empty answer", "an answer is empty (there is nothing to score)",
                                 "Pass --on-empty-answer keep to keep such rows or skip to leave them out"};
                if (options_.on_empty_answer == "skip") {
                    ++report_.skipped["empty answer"];
                    return;
                }
                ++report_.empty_answers;
            }
            rows_.append(checked.view(source.index()));
        } catch (const BadRow& bad) {
            if (options_.on_bad_row == "skip") {
                ++report_.skipped[bad.reason];
                return;
            }
            const bool empty = bad.reason == "empty answer";
            throw data_error(cat(options_.input, " ", source.place(), ": ", bad.problem, ". ", bad.advice,
                                 empty ? "" : ", or pass --on-bad-row skip to leave such rows out"));
        }
    }

    std::int64_t skipped() const
    {
        std::int64_t count = 0;
        for (const auto& [reason, rows] : report_.skipped)
            count += rows;
        return count;
    }

    const ImportOptions& options_;
    ImportReport& report_;
    RowRange range_;
    PreferenceColumns rows_;
};

/// True when the output is there and was made from this input with these options. On one rank.
bool already_complete(const ImportOptions& options, const std::string& recipe_hash, const std::string& source_digest, ImportReport& report)
{
    std::error_code error;
    if (!std::filesystem::exists(options.output, error))
        return false;
    const auto other = [&](const std::string& what) {
        return data_error(cat(options.output, " exists and ", what, " (it would be lost). Remove it or write to another file"));
    };
    try {
        const PreferencesReader reader(options.output);
        const std::string hash = reader.file().string_attribute("/", "config_hash");
        const std::string digest = reader.file().string_attribute("/", "source_digest");
        if (digest != source_digest)
            throw other("was made from another input");
        if (hash != recipe_hash)
            throw other("was made with another --rows, --limit, --on-bad-row or --on-empty-answer");
        report.rows = reader.rows();
        report.digest = reader.digest();
    } catch (const Error& problem) {
        if (std::string(problem.what()).find("would be lost") != std::string::npos)
            throw;
        throw other(cat("is not a whole file of preference rows: ", problem.what()));
    }
    report.already_complete = true;
    return true;
}

void broadcast_report(Communicator& comm, ImportReport& report)
{
    std::string text;
    if (comm.is_root())
        for (const auto& [reason, rows] : report.skipped)
            text += cat(rows, " ", reason, "\n");
    broadcast_string(comm, text, 0, "skipped rows");
    broadcast_string(comm, report.digest, 0, "digest");
    broadcast_value(comm, report.rows, 0, "rows");
    broadcast_value(comm, report.rows_read, 0, "rows");
    broadcast_value(comm, report.empty_answers, 0, "rows");
    if (comm.is_root())
        return;
    for (std::size_t begin = 0; begin < text.size();) {
        const std::size_t space = text.find(' ', begin);
        const std::size_t end = text.find('\n', begin);
        report.skipped[text.substr(space + 1, end - space - 1)] = std::stoll(text.substr(begin, space - begin));
        begin = end + 1;
    }
}

} // namespace

void ImportOptions::describe(OptionVisitor& visitor)
{
    visitor.option("import", "input", input, "preference rows: .jsonl or .parquet", OptionRole::operational);
    visitor.option("import", "output", output, "file to write: prefs.h5", OptionRole::operational);
    visitor.option("import", "on-bad-row", on_bad_row, "stop | skip (and count)", OptionRole::recipe);
    visitor.option("import", "on-empty-answer", on_empty_answer, "stop | skip | keep rows with an empty answer", OptionRole::recipe);
    visitor.option("import", "limit", limit, "import at most so many rows; 0: all", OptionRole::recipe);
    visitor.option("import", "rows", rows, "A:B: lines A up to, not including, B of the input, counted from 0", OptionRole::recipe);
}

void ImportOptions::validate() const
{
    if (input.empty())
        throw usage_error("--input is missing (the rows to import). Pass --input FILE.jsonl or FILE.parquet");
    if (output.empty())
        throw usage_error("--output is missing (the file to write). Pass --output prefs.h5");
    if (!ends_with(input, ".jsonl") && !ends_with(input, ".parquet"))
        throw usage_error(cat("--input ", input, " is of an unknown kind (.jsonl and .parquet are read). Rename or convert it"));
    check_word("on-bad-row", on_bad_row, {"stop", "skip"});
    check_word("on-empty-answer", on_empty_answer, {"stop", "skip", "keep"});
    if (limit < 0)
        throw usage_error(cat("--limit ", limit, " is negative. Pass a number of rows, or 0 for all"));
    parse_rows(rows);
}

std::string ImportReport::text() const
{
    std::string lines = already_complete ? cat("already complete: ", rows, " rows\n") : cat("imported ", rows, " rows of ", rows_read, " read\n");
    for (const auto& [reason, count] : skipped)
        lines += cat("skipped ", count, ": ", reason, "\n");
    if (empty_answers > 0)
        lines += cat("kept ", empty_answers, " with an empty answer\n");
    return lines + cat("digest ", digest, "\n");
}

ImportReport run_import(const ImportOptions& options, Communicator& comm)
{
    options.validate();
    const ConfigText config = config_text(options);
    ImportReport report;
    PreferenceColumns rows;
    FileAttributes attributes{.config = config.ini, .config_hash = config.recipe_hash, .source_digest = "", .extra = {}};
    agree(comm, "import", [&] {
        if (!comm.is_root())
            return;
        open_source(options.input); // a missing input is heard of before an old output is
        // Another thread reads the input once more for its digest; only an output that is there has to wait for it.
        std::future<std::string> source_digest = std::async(std::launch::async, hash_file, options.input);
        std::error_code error;
        if (std::filesystem::exists(options.output, error)) {
            attributes.source_digest = source_digest.get();
            if (already_complete(options, config.recipe_hash, attributes.source_digest, report))
                return;
        }
        rows = Importer(options, report).run();
        if (source_digest.valid())
            attributes.source_digest = source_digest.get();
    });
    broadcast_value(comm, report.already_complete, 0, "import");
    if (!report.already_complete) {
        claim_phase_output(options.output, comm);
        broadcast_string(comm, attributes.source_digest, 0, "digest of the input");
        broadcast_report(comm, report);
        attributes.extra = {{"source", options.input}, {"rows_read", report.rows_read}, {"rows_with_empty_answer", report.empty_answers}};
        for (const auto& [reason, count] : report.skipped)
            attributes.extra.emplace("skipped: " + reason, count);
        report.rows = rows.rows();
        report.digest = write_preferences(options.output, std::move(rows), attributes, comm);
    }
    broadcast_report(comm, report);
    return report;
}

} // namespace selm
