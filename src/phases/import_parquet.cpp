#include <array>
#include <algorithm>

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

template<typename T>
T unwrap(arrow::Result<T> result, const std::string& path)
{
    if (!result.ok())
        throw data_error(cat(path, " cannot be read as Parquet (", result.status().message(), "). Check that it is whole"));
    return std::move(result).ValueUnsafe();
}

Error unexpected_type(const std::string& path, const std::string& column, const arrow::DataType& type, const char* expected)
{
    return data_error(cat(path, ": column \"", column, "\" has type ", type.ToString(), " (", expected, " was expected). Convert the file"));
}

std::optional<std::string> text_at(const arrow::Array& values, std::int64_t i, const std::string& path, const std::string& column)
{
    if (values.IsNull(i))
        return std::nullopt;
    switch (values.type_id()) {
    case arrow::Type::STRING: return static_cast<const arrow::StringArray&>(values).GetString(i);
    case arrow::Type::LARGE_STRING: return static_cast<const arrow::LargeStringArray&>(values).GetString(i);
    case arrow::Type::STRING_VIEW: return static_cast<const arrow::StringViewArray&>(values).GetString(i);
    case arrow::Type::INT32: return cat(static_cast<const arrow::Int32Array&>(values).Value(i));
    case arrow::Type::INT64: return cat(static_cast<const arrow::Int64Array&>(values).Value(i));
    default: throw unexpected_type(path, column, *values.type(), "a text");
    }
}

double number_at(const arrow::Array& values, std::int64_t i, const std::string& path, const std::string& column)
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

/// Entries [first, last) of a list<struct<role, content>>, whatever the order of the struct's fields.
std::vector<SourceMessage> messages_at(const arrow::Array& items, std::int64_t first, std::int64_t last, const std::string& path,
                                       const std::string& column)
{
    if (items.type_id() != arrow::Type::STRUCT)
        throw unexpected_type(path, column, *items.type(), "messages with role and content");
    const auto& messages = static_cast<const arrow::StructArray&>(items);
    const auto role = messages.GetFieldByName("role");
    const auto content = messages.GetFieldByName("content");
    if (!role || !content)
        throw unexpected_type(path, column, *items.type(), "messages with role and content");
    std::vector<SourceMessage> found;
    for (std::int64_t i = first; i < last; ++i) {
        auto role_text = messages.IsNull(i) ? std::nullopt : text_at(*role, i, path, column);
        auto content_text = messages.IsNull(i) ? std::nullopt : text_at(*content, i, path, column);
        if (!role_text || !content_text)
            throw BadRow{"missing field", cat("a message of \"", column, "\" lacks \"role\" or \"content\" (both are needed)"), "Correct the row"};
        found.push_back({std::move(*role_text), std::move(*content_text)});
    }
    return found;
}

Cell cell_at(const arrow::Array& values, std::int64_t i, const std::string& path, const std::string& column)
{
    if (values.IsNull(i))
        return {};
    if (values.type_id() == arrow::Type::LIST) {
        const auto& list = static_cast<const arrow::ListArray&>(values);
        return messages_at(*list.values(), list.value_offset(i), list.value_offset(i + 1), path, column);
    }
    if (values.type_id() == arrow::Type::LARGE_LIST) {
        const auto& list = static_cast<const arrow::LargeListArray&>(values);
        return messages_at(*list.values(), list.value_offset(i), list.value_offset(i + 1), path, column);
    }
    return *text_at(values, i, path, column);
}

class ParquetRows final : public Source {
  public:
    explicit ParquetRows(const std::string& path) : path_(path)
    {
        file_ = unwrap(arrow::io::ReadableFile::Open(path), path);
        reader_ = unwrap(parquet::arrow::OpenFile(file_, arrow::default_memory_pool()), path);
        reader_->set_use_threads(false);
        reader_->set_batch_size(1024);
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
        while (!batch_ || in_batch_ >= batch_->num_rows()) {
            const auto status = batches_->ReadNext(&batch_);
            if (!status.ok())
                throw data_error(cat(path_, ": reading failed after row ", index_, " (", status.message(), "). Check that it is whole"));
            if (!batch_)
                return false;
            in_batch_ = 0;
        }
        return true;
    }

    std::int64_t index() const override { return index_; }
    std::string place() const override { return cat("row ", index_ + 1); }

    SourceRow parse() const override
    {
        SourceRow row;
        const auto column = [&](const char* name) { return batch_->GetColumnByName(name); };
        const auto cell = [&](const char* name) {
            const auto values = column(name);
            return values ? cell_at(*values, in_batch_, path_, name) : Cell{};
        };
        const auto number = [&](const char* name, double& target) {
            if (const auto values = column(name))
                target = number_at(*values, in_batch_, path_, name);
        };
        row.prompt = cell("prompt");
        row.chosen = cell("chosen");
        row.rejected = cell("rejected");
        if (const auto values = column("prompt_id"))
            row.id = text_at(*values, in_batch_, path_, "prompt_id");
        number("score_chosen", row.score_chosen);
        number("score_rejected", row.score_rejected);
        return row;
    }

  private:
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
    std::int64_t index_ = -1;
    std::int64_t in_batch_ = -1;
};

} // namespace

std::unique_ptr<Source> open_parquet(const std::string& path)
{
    return std::make_unique<ParquetRows>(path);
}

} // namespace selm::import_detail
