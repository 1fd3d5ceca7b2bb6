#pragma once

#include <string>
#include <vector>

#include "selm/data/preferences.hpp"

namespace selm::test {

/// n rows of unlike lengths: turns, system messages, empty answers, unknown scores.
inline std::vector<PreferenceRow> preference_rows(std::int64_t n)
{
    std::vector<PreferenceRow> rows;
    for (std::int64_t i = 0; i < n; ++i) {
        PreferenceRow row;
        row.row = i;
        row.row_source = 2 * i + 1;
        row.id = cat("id-", i % 5);
        row.prompt = std::string(static_cast<std::size_t>(i % 7), 'p') + "é";
        if (i % 3 == 0)
            row.messages.push_back({Role::system, cat("be ", i)});
        if (i % 4 == 0) {
            row.messages.push_back({Role::user, "earlier"});
            row.messages.push_back({Role::assistant, ""});
        }
        row.messages.push_back({Role::user, row.prompt});
        row.chosen = std::string(static_cast<std::size_t>(3 * i % 11), 'c');
        row.rejected = cat("rejected ", i);
        row.score_chosen = i % 2 == 0 ? 0.5 * static_cast<double>(i) : std::numeric_limits<double>::quiet_NaN();
        row.score_rejected = -static_cast<double>(i);
        rows.push_back(std::move(row));
    }
    return rows;
}

} // namespace selm::test
