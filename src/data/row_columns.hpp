#pragma once

#include <span>
#include <string>
#include <vector>

#include "selm/data/preference_columns.hpp"

namespace selm {

/// The datasets that both kinds of file share, with offsets, keys, roles and scores in memory. Not movable once it is built
/// (columns point at the file).
struct RowColumns {
    /// @throws Error bad_data: another kind or version of file, datasets missing or inconsistent.
    RowColumns(const std::string& path, const std::string& format);
    RowColumns(const RowColumns&) = delete;
    RowColumns& operator=(const RowColumns&) = delete;

    std::int64_t rows() const { return prompt.rows(); }
    /// @throws Error bad_data: no such row.
    void check_row(std::int64_t i) const;
    PreferenceRow row(std::int64_t i) const;
    std::vector<Message> messages(std::int64_t i) const;
    std::int64_t message_bytes(std::int64_t i) const;
    std::vector<std::string> ids() const;
    /// Writes those datasets to @p target: @p rows of the ranks, in rank order. Rows that follow one another are read at once. Collective.
    void copy_rows(h5::File& target, std::span<const std::int64_t> rows, Communicator& comm) const;

    h5::File file;
    TextColumn prompt, id, message_text, chosen, rejected;
    std::vector<std::int64_t> row_key, row_source, message_offsets;
    std::vector<std::uint8_t> roles;
    std::vector<double> scores; ///< [N, 2]
};

/// Writes those datasets: the ranks' rows in rank order with their `row` fields. Collective.
void write_row_columns(h5::File& file, const PreferenceColumns& mine);

} // namespace selm
