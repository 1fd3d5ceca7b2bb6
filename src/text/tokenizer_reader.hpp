#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "added_tokens.hpp"
#include "bpe.hpp"
#include "pre_tokenizer.hpp"
#include "token_decoder.hpp"
#include "tokenizer_normalizer.hpp"

namespace selm::text {

/// Tokens that are put around a text's own.
struct TextFrame {
    std::vector<std::int32_t> before;
    std::vector<std::int32_t> after;
};

/// The components of a tokenizer.json.
struct TokenizerParts {
    std::vector<AddedToken> added_tokens;
    std::unique_ptr<Normalizer> normalizer;      ///< null where the file has none
    std::unique_ptr<PreTokenizer> pre_tokenizer; ///< null where the file has none
    std::unique_ptr<Bpe> model;
    std::unique_ptr<TokenDecoder> decoder;
    TextFrame frame;                 ///< what the post-processor adds
    bool frame_is_default = false;   ///< the file says nothing about it (SentencePiece models)
    std::optional<std::int32_t> bos; ///< as the file itself says (SentencePiece models)
    std::optional<std::int32_t> eos;
};

/// @throws Error configuration naming @p name and the entry that is missing, wrong or not supported.
TokenizerParts read_tokenizer_json(std::string_view json, const std::string& name);

/// Adds tokens that another file of the model directory lists; the flags of a token that is there already are replaced.
/// @throws Error configuration when a token contradicts the vocabulary.
void add_tokens(TokenizerParts& parts, const std::vector<AddedToken>& tokens);

} // namespace selm::text
