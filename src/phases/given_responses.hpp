#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "selm/data/iteration.hpp"
#include "selm/data/preferences.hpp"

namespace selm {

/**
 * @brief Answers made elsewhere for rows [begin, end) of @p prefs, from lines {"prompt_id": ..., "response": ...}, as given.
 *
 * Rows of one id and one prompt share its line. Ids of other rows of prefs are passed over.
 * @throws Error bad_data naming file and line: no JSON object, a field missing or no text, an id twice, an id that prefs does
 * not have, a row without a line, rows of one id but different prompts.
 */
std::vector<GeneratedAnswer> read_given_responses(const std::string& path, const PreferencesReader& prefs, std::int64_t begin,
                                                  std::int64_t end);

} // namespace selm
