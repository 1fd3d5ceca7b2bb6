#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "added_tokens.hpp"

namespace selm::text {

/// What the files beside the tokenizer say about it; nothing where they say nothing.
struct TokenizerSettings {
    std::optional<std::string> bos_token; ///< texts: tokenizer_config.json, else special_tokens_map.json
    std::optional<std::string> eos_token;
    std::optional<bool> add_bos_token; ///< tokenizer_config.json; tokenizer.json has its post-processor instead
    std::optional<bool> add_eos_token;
    std::optional<bool> legacy;
    std::optional<std::int32_t> bos_id; ///< config.json
    std::optional<std::int32_t> eos_id;
    std::vector<AddedToken> added_tokens; ///< added_tokens_decoder of tokenizer_config.json
};

/// Reads tokenizer_config.json, special_tokens_map.json and config.json of @p directory, each where it is there.
/// @throws Error configuration naming the file and the entry.
TokenizerSettings read_tokenizer_settings(const std::string& directory);

} // namespace selm::text
