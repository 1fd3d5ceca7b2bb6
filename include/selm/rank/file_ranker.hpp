#pragma once

#include <memory>
#include <string>

#include "selm/rank/ranker.hpp"

namespace selm {

/**
 * @brief Scores made elsewhere: a JSONL file, per line {"prompt_id", "scores": [generated, chosen, rejected]} and, where ids
 * repeat in the data, "row" (the key of /prompts/row). A score of a candidate that does not exist is null (or anything: it
 * is not read).
 *
 * @throws Error bad_data naming file and line: not JSON, a key missing, not three numbers, a non-finite score, one id (or
 * row) twice with different scores. score() throws bad_data naming the row that the file lacks.
 */
std::unique_ptr<Ranker> make_file_ranker(const std::string& path);

} // namespace selm
