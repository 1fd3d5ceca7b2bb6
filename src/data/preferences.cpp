#include "selm/data/preferences.hpp"

#include <algorithm>
#include <utility>

#include "row_columns.hpp"
#include "scratch.hpp"
#include "selm/comm/agree.hpp"
#include "selm/h5/publish.hpp"

namespace selm {

namespace {

/// Offsets must start at 0, never fall, and end at @p total.
void check_offsets(const h5::File& file, const std::string& path, const std::vector<std::int64_t>& offsets, std::int64_t total)
{
    const auto complain = [&](const std::string& problem) {
        throw data_error(cat(file.path(), ": ", path, " ", problem, " (texts cannot be told apart). The file is damaged; make it anew"));
    };
    if (offsets.empty() || offsets.front() != 0)
        complain("does not start at 0");
    for (std::size_t i = 1; i < offsets.size(); ++i)
        if (offsets[i] < offsets[i - 1])
            complain(cat("falls at entry ", i));
    if (offsets.back() != total)
        complain(cat("ends at ", offsets.back(), " where ", total, " elements are stored"));
}

void check_count(const h5::File& file, const std::string& path, std::int64_t found, std::int64_t expected)
{
    if (found != expected)
        throw data_error(cat(file.path(), ": ", path, " has ", found, " entries (", expected,
                             " were expected, one per row). The file is damaged; make it anew"));
}

} // namespace

TextColumn::TextColumn(const h5::File& file, std::string path, std::string offsets_path) : file_(&file), path_(std::move(path))
{
    if (offsets_path.empty())
        offsets_path = path_ + "_offsets";
    offsets_ = file.read<std::int64_t>(offsets_path);
    check_offsets(file, offsets_path, offsets_, file.info(path_).elements());
}

std::string TextColumn::text(std::int64_t row) const
{
    SELM_EXPECT(row >= 0 && row < rows());
    return file_->read_text(path_, offsets_[static_cast<std::size_t>(row)], bytes(row));
}

std::size_t TextColumn::read(std::int64_t begin, std::int64_t end, std::byte* place) const
{
    SELM_EXPECT(begin >= 0 && begin <= end && end <= rows());
    const std::int64_t first = offsets_[static_cast<std::size_t>(begin)], count = offsets_[static_cast<std::size_t>(end)] - first;
    file_->read_into(path_, h5::ElementType::uint8, first, count, place);
    return static_cast<std::size_t>(count);
}

RowColumns::RowColumns(const std::string& path, const std::string& format) : file(h5::File::open(path))
{
    check_format(file, format);
    prompt = TextColumn(file, "/prompts/text");
    id = TextColumn(file, "/prompts/id");
    message_text = TextColumn(file, "/prompts/messages/text");
    chosen = TextColumn(file, "/responses/chosen/text");
    rejected = TextColumn(file, "/responses/rejected/text");
    row_key = file.read<std::int64_t>("/prompts/row");
    row_source = file.read<std::int64_t>("/prompts/row_source");
    message_offsets = file.read<std::int64_t>("/prompts/messages/row_offsets");
    roles = file.read<std::uint8_t>("/prompts/messages/role");
    scores = file.read<double>("/scores");
    const std::int64_t n = rows();
    check_count(file, "/prompts/id_offsets", id.rows(), n);
    check_count(file, "/responses/chosen/text_offsets", chosen.rows(), n);
    check_count(file, "/responses/rejected/text_offsets", rejected.rows(), n);
    check_count(file, "/prompts/row", static_cast<std::int64_t>(row_key.size()), n);
    check_count(file, "/prompts/row_source", static_cast<std::int64_t>(row_source.size()), n);
    check_count(file, "/prompts/messages/row_offsets", static_cast<std::int64_t>(message_offsets.size()) - 1, n);
    check_offsets(file, "/prompts/messages/row_offsets", message_offsets, static_cast<std::int64_t>(roles.size()));
    check_count(file, "/prompts/messages/text_offsets", message_text.rows(), static_cast<std::int64_t>(roles.size()));
    check_count(file, "/scores", static_cast<std::int64_t>(scores.size()), 2 * n);
    for (const std::uint8_t role : roles)
        if (role > static_cast<std::uint8_t>(Role::assistant))
            throw data_error(cat(file.path(), ": /prompts/messages/role holds ", static_cast<int>(role),
                                 " (0 system, 1 user, 2 assistant are defined). The file is damaged; make it anew"));
}

void RowColumns::check_row(std::int64_t i) const
{
    if (i < 0 || i >= rows())
        throw data_error(cat(file.path(), " has no row ", i, " (it has ", rows(), ", counted from 0). Ask for 0 to ", rows() - 1));
}

std::vector<Message> RowColumns::messages(std::int64_t i) const
{
    check_row(i);
    std::vector<Message> found;
    for (std::int64_t m = message_offsets[static_cast<std::size_t>(i)]; m < message_offsets[static_cast<std::size_t>(i) + 1]; ++m)
        found.push_back({static_cast<Role>(roles[static_cast<std::size_t>(m)]), message_text.text(m)});
    return found;
}

std::int64_t RowColumns::message_bytes(std::int64_t i) const
{
    check_row(i);
    const auto first = static_cast<std::size_t>(message_offsets[static_cast<std::size_t>(i)]);
    const auto last = static_cast<std::size_t>(message_offsets[static_cast<std::size_t>(i) + 1]);
    return message_text.offsets()[last] - message_text.offsets()[first];
}

PreferenceRow RowColumns::row(std::int64_t i) const
{
    check_row(i);
    const auto index = static_cast<std::size_t>(i);
    PreferenceRow found;
    found.row = row_key[index];
    found.row_source = row_source[index];
    found.id = id.text(i);
    found.prompt = prompt.text(i);
    found.messages = messages(i);
    found.chosen = chosen.text(i);
    found.rejected = rejected.text(i);
    found.score_chosen = scores[2 * index];
    found.score_rejected = scores[2 * index + 1];
    return found;
}

std::vector<std::string> RowColumns::ids() const
{
    // One read of the whole blob: ids are short and many.
    const std::string joined = file.read_text("/prompts/id", 0, id.offsets().back());
    std::vector<std::string> found;
    for (std::int64_t i = 0; i < rows(); ++i)
        found.push_back(joined.substr(static_cast<std::size_t>(id.offsets()[static_cast<std::size_t>(i)]),
                                      static_cast<std::size_t>(id.bytes(i))));
    return found;
}

namespace {

/// The numbers of a rank's rows.
struct RowNumbers {
    std::span<const std::int64_t> keys, sources, message_counts;
    std::span<const std::uint8_t> roles;
    std::span<const double> scores; ///< [N, 2]
};

/**
 * @brief Writes the datasets that both kinds of file share, in the order of their places in the file. Collective.
 * @param texts (field) the bytes() and lengths() of this rank's texts; a field is a function from PreferenceColumns or RowColumns
 * to its member. What it gives is written before it is called again.
 */
template<typename Texts>
void write_rows(h5::File& file, const Texts& texts, const RowNumbers& numbers)
{
    const auto write = [&](const std::string& path, const auto& field) {
        const auto& column = texts(field);
        file.write_blocks(path, column.bytes());
        file.write_offsets(path + "_offsets", column.lengths());
    };
    write("/prompts/text", [](auto& columns) -> auto& { return columns.prompt; });
    write("/prompts/id", [](auto& columns) -> auto& { return columns.id; });
    write("/responses/chosen/text", [](auto& columns) -> auto& { return columns.chosen; });
    write("/responses/rejected/text", [](auto& columns) -> auto& { return columns.rejected; });
    file.write_blocks("/prompts/row", numbers.keys);
    file.write_blocks("/prompts/row_source", numbers.sources);
    file.write_blocks("/prompts/messages/role", numbers.roles);
    write("/prompts/messages/text", [](auto& columns) -> auto& { return columns.message_text; });
    file.write_offsets("/prompts/messages/row_offsets", numbers.message_counts);
    file.write_blocks("/scores", numbers.scores, {2});
}

/// Rows [begin, end) that follow one another in a file, of messages or rows.
struct Run {
    std::int64_t begin = 0, end = 0;
};

/// Texts of runs of rows, read into memory that serves the next column too.
class TextsOfRuns {
  public:
    void read(const TextColumn& column, const std::vector<Run>& runs)
    {
        lengths_.clear();
        std::size_t total = 0;
        for (const Run& run : runs)
            for (std::int64_t i = run.begin; i < run.end; ++i) {
                lengths_.push_back(column.bytes(i));
                total += static_cast<std::size_t>(lengths_.back());
            }
        bytes_ = memory_.take(total);
        std::byte* place = bytes_.data();
        for (const Run& run : runs)
            place += column.read(run.begin, run.end, place);
    }
    std::span<const std::uint8_t> bytes() const { return {reinterpret_cast<const std::uint8_t*>(bytes_.data()), bytes_.size()}; }
    std::span<const std::int64_t> lengths() const { return lengths_; }

  private:
    Scratch memory_;
    std::span<std::byte> bytes_;
    std::vector<std::int64_t> lengths_;
};

} // namespace

void write_row_columns(h5::File& file, const PreferenceColumns& mine)
{
    write_rows(file, [&](const auto& field) -> const TextBlob& { return field(mine); },
               {.keys = mine.row_keys, .sources = mine.row_sources, .message_counts = mine.message_counts, .roles = mine.roles,
                .scores = mine.scores});
}

void RowColumns::copy_rows(h5::File& target, std::span<const std::int64_t> rows, Communicator& comm) const
{
    std::vector<Run> runs, message_runs;
    std::vector<std::int64_t> keys, sources, message_counts;
    std::vector<std::uint8_t> role;
    std::vector<double> score;
    agree(comm, "rows of " + file.path(), [&] {
        for (const std::int64_t row : rows) {
            check_row(row);
            const auto i = static_cast<std::size_t>(row);
            const Run messages{message_offsets[i], message_offsets[i + 1]};
            if (!runs.empty() && runs.back().end == row) {
                runs.back().end = row + 1;
                message_runs.back().end = messages.end;
            } else {
                runs.push_back({row, row + 1});
                message_runs.push_back(messages);
            }
            keys.push_back(row_key[i]);
            sources.push_back(row_source[i]);
            message_counts.push_back(messages.end - messages.begin);
            role.insert(role.end(), roles.begin() + messages.begin, roles.begin() + messages.end);
            score.insert(score.end(), {scores[2 * i], scores[2 * i + 1]});
        }
    });
    TextsOfRuns texts;
    write_rows(target, [&](const auto& field) -> const TextsOfRuns& {
        const TextColumn& column = field(*this);
        agree(comm, "reading " + file.path(), [&] { texts.read(column, &column == &message_text ? message_runs : runs); });
        return texts;
    }, {.keys = keys, .sources = sources, .message_counts = message_counts, .roles = role, .scores = score});
}

std::string write_preferences(const std::string& path, PreferenceColumns mine, const FileAttributes& attributes, Communicator& comm)
{
    const auto counts = all_gather_value(comm, mine.rows(), "rows per rank");
    std::int64_t next = 0;
    for (int rank = 0; rank < comm.rank(); ++rank)
        next += counts[static_cast<std::size_t>(rank)];
    for (std::int64_t& key : mine.row_keys)
        key = next++;
    std::string digest;
    h5::write_and_publish(
        path, comm,
        [&](h5::File& file) {
            write_root_attributes(file, preferences_format, attributes);
            write_row_columns(file, mine);
        },
        [&](const h5::File& file) { digest = data_digest(file); });
    return digest;
}

void write_preferences(const std::string& path, const std::vector<PreferenceRow>& mine, const FileAttributes& attributes,
                       Communicator& comm)
{
    PreferenceColumns columns;
    for (const PreferenceRow& row : mine)
        columns.append(row);
    write_preferences(path, std::move(columns), attributes, comm);
}

struct PreferencesReader::Columns : RowColumns {
    using RowColumns::RowColumns;
};

PreferencesReader::PreferencesReader(const std::string& path)
    : columns_(std::make_unique<Columns>(path, preferences_format))
{
    for (std::int64_t i = 0; i < rows(); ++i)
        if (columns_->row_key[static_cast<std::size_t>(i)] != i)
            throw data_error(cat(path, ": /prompts/row holds ", columns_->row_key[static_cast<std::size_t>(i)], " at entry ", i,
                                 " (in such a file it counts the rows). The file is damaged; make it anew"));
}

PreferencesReader::~PreferencesReader() = default;
PreferencesReader::PreferencesReader(PreferencesReader&&) noexcept = default;
PreferencesReader& PreferencesReader::operator=(PreferencesReader&&) noexcept = default;

const std::string& PreferencesReader::path() const noexcept { return columns_->file.path(); }
std::int64_t PreferencesReader::rows() const noexcept { return columns_->rows(); }
PreferenceRow PreferencesReader::row(std::int64_t i) const { return columns_->row(i); }
std::vector<Message> PreferencesReader::messages(std::int64_t i) const { return columns_->messages(i); }
std::vector<std::string> PreferencesReader::ids() const { return columns_->ids(); }
std::int64_t PreferencesReader::message_bytes(std::int64_t i) const { return columns_->message_bytes(i); }
const h5::File& PreferencesReader::file() const noexcept { return columns_->file; }

std::vector<PreferenceRow> PreferencesReader::range(std::int64_t begin, std::int64_t end) const
{
    std::vector<PreferenceRow> found;
    for (std::int64_t i = begin; i < end; ++i)
        found.push_back(row(i));
    return found;
}

void PreferencesReader::copy_rows(h5::File& target, std::span<const std::int64_t> rows, Communicator& comm) const
{
    columns_->copy_rows(target, rows, comm);
}

std::string PreferencesReader::id(std::int64_t i) const
{
    columns_->check_row(i);
    return columns_->id.text(i);
}

std::string PreferencesReader::prompt(std::int64_t i) const
{
    columns_->check_row(i);
    return columns_->prompt.text(i);
}

std::int64_t PreferencesReader::chosen_bytes(std::int64_t i) const
{
    columns_->check_row(i);
    return columns_->chosen.bytes(i);
}

std::int64_t PreferencesReader::rejected_bytes(std::int64_t i) const
{
    columns_->check_row(i);
    return columns_->rejected.bytes(i);
}

} // namespace selm
