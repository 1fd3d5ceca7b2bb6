#pragma once

#include <string>

#include "selm/kernels/tensor.hpp"
#include "selm/model/deberta.hpp"
#include "selm/rank/pairrm_inputs.hpp"
#include "selm/text/unigram_tokenizer.hpp"

namespace selm {

/**
 * @brief Writes what belongs to a trained pair ranker besides its weights into @p to, from its start directory: the
 * tokenizer's files, with PairRM's tokens where they lacked them, and config.json. A RankerConfig stays as it is; a
 * DebertaV2 config becomes PairRM-hf's (architecture, prefix ids, vocabulary).
 * @throws Error io or configuration naming the file.
 */
void write_ranker_files(const std::string& from, const std::string& to, const DebertaConfig& config,
                        const PairTokens& tokens, const UnigramTokenizer& tokenizer, DType save_dtype);

} // namespace selm
