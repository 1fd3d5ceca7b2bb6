#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "selm/base/conversation.hpp"
#include "selm/comm/communicator.hpp"
#include "selm/data/attributes.hpp"
#include "selm/h5/file.hpp"

namespace selm {

/// One preference pair.
struct PreferenceRow {
    std::int64_t row = 0;          ///< index in prefs.h5: the key of a row everywhere (ids may repeat)
    std::int64_t row_source = 0;   ///< 0-based line (JSONL) or row (Parquet) of the source file
    std::string id;                ///< prompt_id of the source
    std::string prompt;            ///< raw prompt text (what a ranker sees)
    std::vector<Message> messages; ///< the conversation before the answer, the prompt as its last user message included
    std::string chosen, rejected;
    double score_chosen = std::numeric_limits<double>::quiet_NaN(); ///< NaN: unknown
    double score_rejected = std::numeric_limits<double>::quiet_NaN();
};

/**
 * @brief Writes a selm-prefs file: the ranks' rows in rank order (field `row` is ignored and counted anew from 0). Written
 * as a whole or not at all. Collective. @throws Error io on every rank.
 */
void write_preferences(const std::string& path, const std::vector<PreferenceRow>& mine, const FileAttributes& attributes,
                       Communicator& comm);

/// A ragged text dataset with its offsets in memory; texts are read on demand.
class TextColumn {
  public:
    TextColumn() = default;
    /// @param path of the uint8 dataset; offsets at @p offsets_path (default path + "_offsets").
    /// @throws Error bad_data when the offsets do not describe the data.
    TextColumn(const h5::File& file, std::string path, std::string offsets_path = {});
    std::int64_t rows() const noexcept { return static_cast<std::int64_t>(offsets_.size()) - 1; }
    std::int64_t bytes(std::int64_t row) const { return offsets_[static_cast<std::size_t>(row) + 1] - offsets_[static_cast<std::size_t>(row)]; }
    std::string text(std::int64_t row) const;
    /// Texts of rows [begin, end), one behind the other, to @p place. @returns their bytes.
    std::size_t read(std::int64_t begin, std::int64_t end, std::byte* place) const;
    const std::vector<std::int64_t>& offsets() const noexcept { return offsets_; }

  private:
    const h5::File* file_ = nullptr;
    std::string path_;
    std::vector<std::int64_t> offsets_;
};

/**
 * @brief Reads a selm-prefs file; any rank alone. Offsets are in memory (a few bytes per row), texts are read on demand.
 * @throws Error bad_data in the constructor: not such a file, another version, datasets missing or inconsistent.
 */
class PreferencesReader {
  public:
    explicit PreferencesReader(const std::string& path);
    ~PreferencesReader();
    PreferencesReader(PreferencesReader&&) noexcept;
    PreferencesReader& operator=(PreferencesReader&&) noexcept;

    const std::string& path() const noexcept;
    std::int64_t rows() const noexcept;
    PreferenceRow row(std::int64_t i) const;                                    ///< @throws Error bad_data out of range
    std::vector<PreferenceRow> range(std::int64_t begin, std::int64_t end) const;
    /// Writes the datasets of @p rows (each rank its own, in rank order) to a file that is being created by @p comm. Collective.
    /// @throws Error bad_data on every rank: a row out of range, the file cannot be read.
    void copy_rows(h5::File& target, std::span<const std::int64_t> rows, Communicator& comm) const;
    std::string id(std::int64_t i) const;
    std::string prompt(std::int64_t i) const;
    std::vector<Message> messages(std::int64_t i) const;
    std::vector<std::string> ids() const; ///< all prompt ids
    /// UTF-8 bytes of row i's messages together: a cheap estimate of its length, without reading text.
    std::int64_t message_bytes(std::int64_t i) const;
    std::int64_t chosen_bytes(std::int64_t i) const;
    std::int64_t rejected_bytes(std::int64_t i) const;
    std::string digest() const { return data_digest(file()); }
    const h5::File& file() const noexcept;

  private:
    struct Columns;
    std::unique_ptr<Columns> columns_;
};

} // namespace selm
