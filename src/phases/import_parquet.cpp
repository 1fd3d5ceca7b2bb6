#include <algorithm>
#include <array>
#include <deque>
#include <future>

#include <arrow/api.h>
#include <arrow/io/file.h>
#include <parquet/arrow/reader.h>
#include <parquet/file_reader.h>
#include <parquet/schema.h>

#include "import_source.hpp"
#include "selm/base/error.hpp"

namespace selm::import_detail {

namespace {

constexpr std::array<const char*, 6> wanted{"prompt", "prompt_id", "chosen", "rejected", "score_chosen", "score_rejected"};

constexpr std::int64_t batch_rows = 1024;
constexpr std::int64_t buffer_bytes = 1 << 20; ///< of each column

Error unreadable(const std::string& path, const arrow::Status& status)
{
    return data_error(cat(path, " cannot be read as Parquet (", status.message(), "). Check that it is whole"));
}

template<typename T>
T unwrap(arrow::Result<T> result, const std::string& path)
{
    if (!result.ok())
        throw unreadable(path, result.status());
    return std::move(result).ValueUnsafe();
}

Error unexpected_type(const std::string& path, const std::string& column, const arrow::DataType& type, const char* expected)
{
    return data_error(cat(path, ": column \"", column, "\" has type ", type.ToString(), " (", expected, " was expected). Convert the file"));
}

/// Numbers that stand where texts are expected, in decimal; a deque, so that earlier ones stay where they are.
using Written = std::deque<std::string>;

std::optional<std::string_view> text_at(const arrow::Array& values, std::int64_t i, const std::string& path, const char* column,
                                        Written& written)
{
    if (values.IsNull(i))
        return std::nullopt;
    switch (values.type_id()) {
    case arrow::Type::STRING: return static_cast<const arrow::StringArray&>(values).GetView(i);
    case arrow::Type::LARGE_STRING: return static_cast<const arrow::LargeStringArray&>(values).GetView(i);
    case arrow::Type::STRING_VIEW: return static_cast<const arrow::StringViewArray&>(values).GetView(i);
    case arrow::Type::INT32: return written.emplace_back(cat(static_cast<const arrow::Int32Array&>(values).Value(i)));
    case arrow::Type::INT64: return written.emplace_back(cat(static_cast<const arrow::Int64Array&>(values).Value(i)));
    default: throw unexpected_type(path, column, *values.type(), "a text");
    }
}

double number_at(const arrow::Array& values, std::int64_t i, const std::string& path, const char* column)
{
    if (values.IsNull(i))
        return std::numeric_limits<double>::quiet_NaN();
    switch (values.type_id()) {
    case arrow::Type::NA: return std::numeric_limits<double>::quiet_NaN();
    case arrow::Type::DOUBLE: return static_cast<const arrow::DoubleArray&>(values).Value(i);
    case arrow::Type::FLOAT: return static_cast<double>(static_cast<const arrow::FloatArray&>(values).Value(i));
    case arrow::Type::INT64: return static_cast<double>(static_cast<const arrow::Int64Array&>(values).Value(i));
    case arrow::Type::INT32: return static_cast<double>(static_cast<const arrow::Int32Array&>(values).Value(i));
    default: throw unexpected_type(path, column, *values.type(), "a number");
    }
}

/// A column of the batch at hand, and of lists of messages their parts (looked up once per batch).
struct Column {
    std::shared_ptr<arrow::Array> values; ///< null: the file has no such column
    std::shared_ptr<arrow::Array> items, role, content;
};

/// Looks up the parts of a column of lists: list<struct<role, content>>, whatever the order of the struct's fields.
void find_messages(Column& column, const std::string& path, const char* name)
{
    if (column.values->type_id() == arrow::Type::LIST)
        column.items = static_cast<const arrow::ListArray&>(*column.values).values();
    else
        column.items = static_cast<const arrow::LargeListArray&>(*column.values).values();
    if (column.items->type_id() == arrow::Type::STRUCT) {
        const auto& messages = static_cast<const arrow::StructArray&>(*column.items);
        column.role = messages.GetFieldByName("role");
        column.content = messages.GetFieldByName("content");
    }
    if (!column.role || !column.content)
        throw unexpected_type(path, name, *column.items->type(), "messages with role and content");
}

/// Entries [first, last) of a list of messages.
std::vector<SourceMessage> messages_at(const Column& column, std::int64_t first, std::int64_t last, const std::string& path,
                                       const char* name, Written& written)
{
    std::vector<SourceMessage> found;
    found.reserve(static_cast<std::size_t>(last - first));
    for (std::int64_t i = first; i < last; ++i) {
        const bool is_null = column.items->IsNull(i);
        const auto role = is_null ? std::nullopt : text_at(*column.role, i, path, name, written);
        const auto content = is_null ? std::nullopt : text_at(*column.content, i, path, name, written);
        if (!role || !content)
            throw BadRow{"missing field", cat("a message of \"", name, "\" lacks \"role\" or \"content\" (both are needed)"), "Correct the row"};
        found.push_back({*role, *content});
    }
    return found;
}

Cell cell_at(Column& column, std::int64_t i, const std::string& path, const char* name, Written& written)
{
    const arrow::Array& values = *column.values;
    if (values.IsNull(i))
        return {};
    const bool is_list = values.type_id() == arrow::Type::LIST;
    if (!is_list && values.type_id() != arrow::Type::LARGE_LIST)
        return *text_at(values, i, path, name, written);
    if (!column.content)
        find_messages(column, path, name);
    if (is_list) {
        const auto& list = static_cast<const arrow::ListArray&>(values);
        return messages_at(column, list.value_offset(i), list.value_offset(i + 1), path, name, written);
    }
    const auto& list = static_cast<const arrow::LargeListArray&>(values);
    return messages_at(column, list.value_offset(i), list.value_offset(i + 1), path, name, written);
}

class ParquetRows final : public Source {
  public:
    explicit ParquetRows(const std::string& path) : path_(path)
    {
        file_ = unwrap(arrow::io::ReadableFile::Open(path), path);
        // Pages are read as they are needed: whole column chunks would be as large as the file where it has one row group.
        parquet::ReaderProperties properties = parquet::default_reader_properties();
        properties.enable_buffered_stream();
        properties.set_buffer_size(buffer_bytes);
        parquet::arrow::FileReaderBuilder builder;
        if (const auto status = builder.Open(file_, properties); !status.ok())
            throw unreadable(path, status);
        reader_ = unwrap(builder.Build(), path);
        reader_->set_use_threads(true); // columns are decoded side by side
        reader_->set_batch_size(batch_rows);
        batches_ = unwrap(reader_->GetRecordBatchReader(all_row_groups(), wanted_leaves()), path);
        for (const char* column : {"chosen", "rejected"})
            if (batches_->schema()->GetFieldIndex(column) < 0)
                throw data_error(cat(path, " has no column \"", column, "\" (a preference row needs chosen and rejected). "
                                     "Give a file of preference pairs"));
    }

    bool next() override
    {
        ++index_;
        ++in_batch_;
        written_.clear();
        while (!batch_ || in_batch_ >= batch_->num_rows()) {
            if (!upcoming_.valid())
                read_ahead();
            Batch read = upcoming_.get();
            if (!read.status.ok())
                throw data_error(cat(path_, ": reading failed after row ", index_, " (", read.status.message(), "). Check that it is whole"));
            batch_ = std::move(read.batch);
            if (!batch_)
                return false;
            read_ahead();
            in_batch_ = 0;
            for (std::size_t i = 0; i < wanted.size(); ++i)
                columns_[i] = {.values = batch_->GetColumnByName(wanted[i]), .items = {}, .role = {}, .content = {}};
        }
        return true;
    }

    std::int64_t index() const override { return index_; }
    std::string place() const override { return cat("row ", index_ + 1); }

    SourceRow parse() override
    {
        SourceRow row;
        const auto cell = [&](std::size_t i) {
            return columns_[i].values ? cell_at(columns_[i], in_batch_, path_, wanted[i], written_) : Cell{};
        };
        const auto number = [&](std::size_t i, double& target) {
            if (columns_[i].values)
                target = number_at(*columns_[i].values, in_batch_, path_, wanted[i]);
        };
        row.prompt = cell(0);
        row.chosen = cell(2);
        row.rejected = cell(3);
        if (columns_[1].values)
            row.id = text_at(*columns_[1].values, in_batch_, path_, wanted[1], written_);
        number(4, row.score_chosen);
        number(5, row.score_rejected);
        return row;
    }

  private:
    struct Batch {
        arrow::Status status;
        std::shared_ptr<arrow::RecordBatch> batch; ///< null at the end
    };

    /// The next batch is decoded by another thread while this one is looked at.
    void read_ahead()
    {
        upcoming_ = std::async(std::launch::async, [this] {
            Batch read;
            read.status = batches_->ReadNext(&read.batch);
            return read;
        });
    }

    std::vector<int> all_row_groups() const
    {
        std::vector<int> groups(static_cast<std::size_t>(reader_->num_row_groups()));
        for (std::size_t i = 0; i < groups.size(); ++i)
            groups[i] = static_cast<int>(i);
        return groups;
    }

    /// Leaf columns that belong to the fields that are used: others (a whole conversation once more) are not read.
    std::vector<int> wanted_leaves() const
    {
        const auto* schema = reader_->parquet_reader()->metadata()->schema();
        std::vector<int> leaves;
        for (int i = 0; i < schema->num_columns(); ++i) {
            const std::string field = schema->Column(i)->path()->ToDotVector().front();
            if (std::find(wanted.begin(), wanted.end(), field) != wanted.end())
                leaves.push_back(i);
        }
        return leaves;
    }

    std::string path_;
    std::shared_ptr<arrow::io::ReadableFile> file_;
    std::unique_ptr<parquet::arrow::FileReader> reader_;
    std::shared_ptr<arrow::RecordBatchReader> batches_;
    std::shared_ptr<arrow::RecordBatch> batch_;
    std::array<Column, wanted.size()> columns_; ///< of the batch
    Written written_;                           ///< of the row
    std::int64_t index_ = -1;
    std::int64_t in_batch_ = -1;
    std::future<Batch> upcoming_; ///< last: what it uses must outlive it
};

} // namespace

std::unique_ptr<Source> open_parquet(const std::string& path)
{
    return std::make_unique<ParquetRows>(path);
}

} // namespace selm::import_detail
