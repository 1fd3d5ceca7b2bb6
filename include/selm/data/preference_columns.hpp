#pragma once

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "selm/data/preferences.hpp"

namespace selm {

struct MessageView {
    Role role = Role::user;
    std::string_view content;
};

/// One preference pair whose texts lie elsewhere; the fields of PreferenceRow.
struct PreferenceRowView {
    std::int64_t row = 0;
    std::int64_t row_source = 0;
    std::string_view id, prompt;
    std::span<const MessageView> messages;
    std::string_view chosen, rejected;
    double score_chosen = std::numeric_limits<double>::quiet_NaN();
    double score_rejected = std::numeric_limits<double>::quiet_NaN();
};

/// Texts one behind the other and their lengths: a ragged column in memory.
class TextBlob {
  public:
    void append(std::string_view text);
    std::span<const std::uint8_t> bytes() const { return {reinterpret_cast<const std::uint8_t*>(data_.get()), size_}; }
    std::span<const std::int64_t> lengths() const { return lengths_; }

  private:
    struct Free {
        void operator()(char* data) const { std::free(data); }
    };
    void grow(std::size_t bytes);

    std::unique_ptr<char, Free> data_; ///< grown by realloc, which moves pages of large blocks instead of copying them
    std::size_t size_ = 0, capacity_ = 0;
    std::vector<std::int64_t> lengths_;
};

/// Preference rows as their files store them, column by column: every text is copied once on its way into a file.
struct PreferenceColumns {
    void append(const PreferenceRowView& row);
    void append(const PreferenceRow& row);
    std::int64_t rows() const { return static_cast<std::int64_t>(row_keys.size()); }

    TextBlob prompt, id, message_text, chosen, rejected;
    std::vector<std::int64_t> row_keys, row_sources, message_counts;
    std::vector<std::uint8_t> roles;
    std::vector<double> scores; ///< [N, 2]
};

/// write_preferences of rows in columns. @returns on rank 0 the file's digest (data_digest), on others nothing.
std::string write_preferences(const std::string& path, PreferenceColumns mine, const FileAttributes& attributes, Communicator& comm);

} // namespace selm
