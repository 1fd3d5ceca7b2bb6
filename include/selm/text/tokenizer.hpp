#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace selm {

/// What the text of a special token ("<|im_end|>") inside a text to encode means.
enum class SpecialText {
    parse,  ///< the token itself, as Hugging Face does by default
    literal ///< ordinary text (Hugging Face: encode_special_tokens = true)
};

/// What decode() does with special tokens.
enum class SpecialTokens { skip, keep };

/**
 * @brief The tokenizer of a model directory: tokenizer.json, or where there is none, a SentencePiece tokenizer.model.
 *
 * tokenizer.json: the ids that Hugging Face's `tokenizers` gives. Read: BPE models with byte fallback, unknown tokens
 * and ignore_merges; normalizers Prepend, Replace and Sequence; pre-tokenizers ByteLevel, Digits, Metaspace, Split and
 * Sequence; added tokens with all their flags; post-processors ByteLevel, TemplateProcessing and Sequence; decoders
 * ByteFallback, ByteLevel, Fuse, Metaspace, Replace, Strip and Sequence. Any other component is refused by name. The
 * file's truncation and padding entries are ignored: a caller cuts by itself.
 *
 * tokenizer.model: the ids that the sentencepiece library gives to each stretch of text between special tokens
 * (control symbols, and the added tokens of tokenizer_config.json), as LlamaTokenizer did in transformers 4; where
 * tokenizer_config.json says legacy = false, a prefix space is put before the whole text alone.
 *
 * Const members may be called from several threads at once.
 */
class Tokenizer {
  public:
    /// Reads @p directory/tokenizer.json, or tokenizer.model, and what tokenizer_config.json, special_tokens_map.json
    /// and config.json say about BOS and EOS. @throws Error configuration naming the file and the component.
    static Tokenizer from_directory(const std::string& directory);

    /// Reads the content of a tokenizer.json; @p name stands for it in messages. @throws Error configuration.
    static Tokenizer from_json(std::string_view json, const std::string& name);

    ~Tokenizer();
    Tokenizer(Tokenizer&&) noexcept;
    Tokenizer& operator=(Tokenizer&&) noexcept;
    Tokenizer(const Tokenizer&) = delete;
    Tokenizer& operator=(const Tokenizer&) = delete;

    /// Ids of @p text (UTF-8; ill-formed bytes are read as U+FFFD), nothing added around them (Hugging Face:
    /// add_special_tokens = False). Added tokens split the text first.
    std::vector<std::int32_t> encode(std::string_view text, SpecialText special = SpecialText::parse) const;

    /// Ids of @p text, special-token text parsed, with what the tokenizer adds around a text: Hugging Face's ids by
    /// default (add_special_tokens = True). That is what the post-processor of tokenizer.json says; for a
    /// tokenizer.model alone, BOS unless add_bos_token in tokenizer_config.json is false, and EOS where add_eos_token
    /// is true (the defaults of transformers 4).
    std::vector<std::int32_t> encode_with_special_tokens(std::string_view text) const;

    /// Text of @p ids, well-formed UTF-8 (bytes that form no character become U+FFFD); ids without a token are left
    /// out.
    std::string decode(std::span<const std::int32_t> ids, SpecialTokens special = SpecialTokens::skip) const;

    /// Id of the token with exactly this text (in the file's alphabet: "Ġthe"), added tokens first.
    std::optional<std::int32_t> token_id(std::string_view token) const;

    /// The token with this id as it is in the file; nothing when there is none.
    std::optional<std::string> token_text(std::int32_t id) const;

    /// Highest id + 1, added tokens included: a model needs at least as many embedding rows.
    std::int64_t vocabulary_size() const;

    bool is_special(std::int32_t id) const;

    /// BOS and EOS as the model directory says: bos_token of tokenizer_config.json, else of special_tokens_map.json,
    /// else of the tokenizer.model, else bos_token_id of config.json (the first of a list). Nothing where none says
    /// one, and for from_json().
    std::optional<std::int32_t> bos_id() const;
    std::optional<std::int32_t> eos_id() const;

  private:
    struct Data;
    explicit Tokenizer(std::unique_ptr<const Data> data);
    std::unique_ptr<const Data> data_;
};

} // namespace selm
