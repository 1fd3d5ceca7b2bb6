#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "error_message.hpp"
#include "selm/text/encoding.hpp"

namespace selm::test {

using Ids = std::vector<std::int32_t>;

inline const std::string tiny_directory = std::string(SELM_SOURCE_DIR) + "/tests/data/tiny_tokenizer";

inline const std::vector<Message> greeting{{Role::user, "Hi"}};

} // namespace selm::test
