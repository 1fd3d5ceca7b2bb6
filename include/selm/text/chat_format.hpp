#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "selm/base/conversation.hpp"

namespace selm {

class Tokenizer;

/// Ids of the tokens that begin and end a sequence; absent where there is none.
struct SpecialIds {
    std::optional<std::int32_t> bos;
    std::optional<std::int32_t> eos;
};

/**
 * @brief How a conversation becomes text: equal to Hugging Face's apply_chat_template of the models that use the
 * format.
 *
 * - chatml: "<|im_start|>ROLE\nCONTENT<|im_end|>\n" per message; header "<|im_start|>assistant\n"
 * - chatml-smollm2: the same, after SmolLM2's default system message where the first message is not a system's
 * - zephyr (zephyr-7b, mistral-7b-sft): "<|ROLE|>\nCONTENT</s>\n"; header "<|assistant|>\n"
 * - llama3 (Meta-Llama-3-8B-Instruct): "<|start_header_id|>ROLE<|end_header_id|>\n\nCONTENT<|eot_id|>", the content
 *   stripped, "<|begin_of_text|>" before the first message; header "<|start_header_id|>assistant<|end_header_id|>\n\n"
 * - phi3 (Phi-3-mini-4k-instruct): "<|ROLE|>\nCONTENT<|end|>\n"; header "<|assistant|>\n", or "<|endoftext|>" in its
 *   place where no header is asked for
 * - phi3-2024-04 (its first revision): "<s>" before everything; a user's message is
 *   "<|user|>\nCONTENT<|end|>\n<|assistant|>\n", an assistant's "CONTENT<|end|>\n"; system messages are left out; no
 *   header, as the user's message ends with it
 *
 * Any list of messages is rendered, an answer alone too. Contents are inserted as they are, but stripped in llama3.
 * Text of special tokens inside a content is parsed as these tokens when the rendered text is tokenised, as Hugging
 * Face does.
 */
class ChatFormat {
  public:
    /// @throws Error configuration listing the formats when @p name is none of them.
    static ChatFormat by_name(std::string_view name);

    /// The format whose template is in @p directory (chat_template.jinja or tokenizer_config.json), however it is
    /// spaced and quoted. Checked: @p tokenizer has the format's end token, and its BOS and EOS are those that the
    /// format writes out. @throws Error configuration listing the formats and naming --chat-format.
    static ChatFormat recognise(const std::string& directory, const Tokenizer& tokenizer);

    /// Names that by_name() accepts.
    static std::vector<std::string> names();

    std::string name() const;

    /// The conversation as text; @p add_generation_prompt appends the header of an assistant's answer.
    std::string render(std::span<const Message> messages, bool add_generation_prompt) const;

    /// Text of the token that ends an answer ("<|im_end|>"): generation stops at it.
    std::string end_of_turn() const;

    /// Text of the token that a rendered conversation itself starts with (llama3, phi3-2024-04); nothing where the
    /// format has none or leaves it to the tokenizer (zephyr: Tokenizer::encode_with_special_tokens()).
    std::optional<std::string> beginning_of_sequence() const;

    /// BOS and EOS of the models that the format comes from, for tokenizers that do not say them: zephyr 1 and 2,
    /// llama3 128000 and 128009, phi3 1 and 32000; ChatML: none (the end token's id depends on the tokenizer).
    SpecialIds default_special_ids() const;

    struct Definition;

  private:
    explicit ChatFormat(const Definition& definition) : definition_(&definition) {}
    const Definition* definition_; ///< static storage
};

} // namespace selm
