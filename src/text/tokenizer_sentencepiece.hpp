#pragma once

#include <string>

#include "tokenizer_reader.hpp"

namespace selm::text {

/**
 * @brief The components of a SentencePiece BPE model (tokenizer.model), read by the sentencepiece library.
 *
 * The library's own encoder needs seconds for a megabyte where Bpe needs tenths; the rules are the same: of adjacent
 * symbols that together are a piece, those with the best score merge first, the leftmost among equals, and unknown
 * characters become byte tokens or one unknown token. Control symbols and the unknown token are special added tokens.
 * @param legacy the model's prefix space goes before each stretch of text between added tokens; otherwise before the
 * text alone, and only where it does not begin with a space (transformers' legacy = True or False)
 * @throws Error configuration: no SentencePiece model; another model than BPE; a normalizer that rewrites characters;
 * pieces that are user-defined or unused. Each is named.
 */
TokenizerParts read_sentencepiece_model_file(const std::string& path, bool legacy);

} // namespace selm::text
