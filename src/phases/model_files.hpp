#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace selm {

/// eos_token_id (a number or a list) of DIRECTORY/generation_config.json, else of config.json; empty when neither has one.
/// @throws Error configuration naming the file: no JSON, or an id that is no whole number.
std::vector<std::int32_t> end_of_sequence_ids(const std::string& directory);

} // namespace selm
