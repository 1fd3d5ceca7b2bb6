#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "added_tokens.hpp"
#include "unigram_model.hpp"
#include "unigram_normalizer.hpp"

namespace selm::text {

/// The components of a unigram tokenizer.
struct UnigramParts {
    std::vector<AddedToken> added_tokens;
    std::vector<std::unique_ptr<UnigramNormalizer>> normalizers; ///< in order
    std::unique_ptr<UnigramModel> model;
    bool prefix_space = true; ///< Metaspace puts a space in front of every stretch of text
    bool split_at_spaces = true;
};

/// @throws Error configuration naming the entry that is missing, wrong or not supported.
UnigramParts read_unigram_json(std::string_view json);

/**
 * @brief A SentencePiece model with the rules of transformers' DebertaV2Converter: control and user-defined pieces are
 * added tokens; text is stripped, mapped by the model's table, runs of spaces become one.
 * @param model content of spm.model, a protocol buffer of type ModelProto (sentencepiece_model.proto)
 * @param added_tokens content of added_tokens.json, {"token": id}; empty: there is none, and [MASK] follows the pieces
 */
UnigramParts read_sentencepiece_model(std::string_view model, std::string_view added_tokens);

/// The entries of an added_tokens.json, by id. @throws Error configuration.
std::vector<AddedToken> read_added_tokens_json(std::string_view json);

} // namespace selm::text
