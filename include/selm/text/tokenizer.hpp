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
 * @brief A Hugging Face tokenizer (tokenizer.json): the ids that `tokenizers` gives, without tokens that a
 * post-processor would add (add_special_tokens = False).
 *
 * Read: BPE models; pre-tokenizers ByteLevel, Digits, Split and Sequence of these; added tokens with all their flags;
 * ByteLevel decoders. Any other component is refused by name. The file's truncation and padding entries are ignored: a
 * caller cuts by itself. Const members may be called from several threads at once.
 */
class Tokenizer {
  public:
    /// Reads @p directory/tokenizer.json. @throws Error configuration naming the file and the component in question.
    static Tokenizer from_directory(const std::string& directory);

    /// Reads the content of a tokenizer.json; @p name stands for it in messages. @throws Error configuration.
    static Tokenizer from_json(std::string_view json, const std::string& name);

    ~Tokenizer();
    Tokenizer(Tokenizer&&) noexcept;
    Tokenizer& operator=(Tokenizer&&) noexcept;
    Tokenizer(const Tokenizer&) = delete;
    Tokenizer& operator=(const Tokenizer&) = delete;

    /// Ids of @p text (UTF-8; ill-formed bytes are read as U+FFFD). Added tokens split the text first.
    std::vector<std::int32_t> encode(std::string_view text, SpecialText special = SpecialText::parse) const;

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

  private:
    struct Data;
    explicit Tokenizer(std::unique_ptr<const Data> data);
    std::unique_ptr<const Data> data_;
};

} // namespace selm
