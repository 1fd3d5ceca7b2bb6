#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "selm/base/conversation.hpp"
#include "selm/text/chat_format.hpp"
#include "selm/text/tokenizer.hpp"

namespace selm {

/// A row as token ids: the prompt and the answers after it, by Candidate; an answer that does not exist is absent.
struct EncodedRow {
    std::vector<std::int32_t> prompt;
    std::array<std::optional<std::vector<std::int32_t>>, candidates_per_row> responses;
};

/// Token ids of a prompt and an answer after it; the first label_start (>= 1) are the prompt's and are not scored.
struct LabelledSequence {
    std::vector<std::int32_t> ids;
    std::int64_t label_start = 0;
    bool operator==(const LabelledSequence&) const = default;
};

/// A row as sequences, by Candidate; their prompts may differ. An answer that does not exist is absent.
using SequenceRow = std::array<std::optional<LabelledSequence>, candidates_per_row>;

/// Limits of an encoded row, in tokens. @invariant 1 <= max_prompt_length < max_length.
struct EncodingLimits {
    std::int64_t max_length = 1024;       ///< prompt and one answer together
    std::int64_t max_prompt_length = 512; ///< a longer prompt keeps its BOS, if any, and its last tokens

    /// @throws Error usage when the invariant does not hold.
    void validate() const;
};

/// Id of the token that ends an answer. @throws Error configuration when the tokenizer does not have it.
std::int32_t end_of_turn_id(const Tokenizer& tokenizer, const ChatFormat& format);

/**
 * @brief The prompt with the generation header, at most @p max_prompt_length tokens (>= 1, with a BOS >= 2).
 *
 * Tokenised as one text with special-token text parsed: equal to apply_chat_template(messages, tokenize=True,
 * add_generation_prompt=True). A longer prompt keeps its BOS, where the format has one, and its last tokens.
 */
std::vector<std::int32_t> encode_prompt_chat(const Tokenizer& tokenizer, const ChatFormat& format,
                                             std::span<const Message> messages, std::int64_t max_prompt_length);

/**
 * @brief An answer: its content, tokenised apart from the prompt (special-token text parsed), and one end-of-turn
 * token; at most @p max_response_tokens (>= 1) tokens. A longer answer is cut, and its end token is then not put back.
 */
std::vector<std::int32_t> encode_response_chat(const Tokenizer& tokenizer, const ChatFormat& format,
                                               std::string_view text, std::int64_t max_response_tokens);

/// A whole row; each answer is cut alone to max_length - (length of the prompt). An empty text is an answer (its end
/// token alone); nullopt is none.
EncodedRow encode_row_chat(const Tokenizer& tokenizer, const ChatFormat& format, std::span<const Message> messages,
                           const std::array<std::optional<std::string_view>, candidates_per_row>& responses,
                           const EncodingLimits& limits);

/// The same row with the prompt before each of its answers.
SequenceRow sequences_of(const EncodedRow& row);

} // namespace selm
