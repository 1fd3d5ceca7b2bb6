#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace selm {

/**
 * @brief The tokenizer of a DeBERTa-v2/v3 directory: a SentencePiece unigram model (Kudo 2018) with the rules of
 * Hugging Face's fast tokenizer, without the [CLS] and [SEP] that its post-processor would add.
 *
 * Read from tokenizer.json where there is one, else from spm.model and added_tokens.json. Text is split at added
 * tokens; the rest is stripped, mapped by the model's character table, runs of spaces become one, every space becomes
 * U+2581 with one in front, and each word is cut by Viterbi search. A character that no piece holds gives the unknown
 * token, also where the SentencePiece model would fall back to bytes; neighbours are one token. Of normalisers Strip,
 * Precompiled and Replace are supported, of pre-tokenizers Metaspace: another component (a lower-casing tokenizer, say)
 * is refused by name. Const members may be called from several threads at once.
 */
class UnigramTokenizer {
  public:
    /// @throws Error configuration naming the file and what is missing, wrong or not supported in it: neither file,
    /// another kind of model, added_tokens.json with ids that tokenizer.json does not have.
    /// @param more tokens to append where the directory lacks them, in order, with the ids after its last one.
    static UnigramTokenizer from_directory(const std::string& directory, std::span<const std::string> more = {});

    ~UnigramTokenizer();
    UnigramTokenizer(UnigramTokenizer&&) noexcept;
    UnigramTokenizer& operator=(UnigramTokenizer&&) noexcept;

    /// Ids of @p text (UTF-8; ill-formed bytes are read as U+FFFD).
    std::vector<std::int32_t> encode(std::string_view text) const;

    /// Id of the token with exactly this text, added tokens first.
    std::optional<std::int32_t> token_id(std::string_view token) const;

    /// Highest id + 1, added tokens included: a model needs at least as many embedding rows.
    std::int64_t vocabulary_size() const;

  private:
    struct Data;
    explicit UnigramTokenizer(std::unique_ptr<const Data> data);
    std::unique_ptr<const Data> data_;
};

} // namespace selm
