#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "selm/base/conversation.hpp"

namespace selm {

class Tokenizer;

/**
 * @brief How a conversation becomes text: equal to Hugging Face's apply_chat_template of the models that use the
 * format.
 *
 * | name           | text                                                                                      |
 * |----------------|-------------------------------------------------------------------------------------------|
 * | chatml         | "<|im_start|>ROLE\nCONTENT<|im_end|>\n" per message; header "<|im_start|>assistant\n"       |
 * | chatml-smollm2 | the same, after SmolLM2's default system message where the first message is not a system's |
 *
 * Contents are inserted as they are. Text of special tokens inside a content is parsed as these tokens when the
 * rendered text is tokenised, as Hugging Face does.
 */
class ChatFormat {
  public:
    /// @throws Error configuration listing the formats when @p name is none of them.
    static ChatFormat by_name(std::string_view name);

    /// The format whose template is in @p directory (chat_template.jinja or tokenizer_config.json), checked to have its
    /// end token in @p tokenizer. @throws Error configuration listing the formats and naming --chat-format.
    static ChatFormat recognise(const std::string& directory, const Tokenizer& tokenizer);

    /// Names that by_name() accepts.
    static std::vector<std::string> names();

    std::string name() const;

    /// The conversation as text; @p add_generation_prompt appends the header of an assistant's answer.
    std::string render(std::span<const Message> messages, bool add_generation_prompt) const;

    /// Text of the token that ends an answer ("<|im_end|>"): generation stops at it.
    std::string end_of_turn() const;

    /// Text of the token that every conversation starts with, exactly once; nothing where the format has none (ChatML).
    std::optional<std::string> beginning_of_sequence() const;

    struct Definition;

  private:
    explicit ChatFormat(const Definition& definition) : definition_(&definition) {}
    const Definition* definition_; ///< static storage
};

} // namespace selm
