#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "selm/base/conversation.hpp"
#include "selm/text/chat_format.hpp"
#include "selm/text/encoding.hpp"
#include "selm/text/tokenizer.hpp"

namespace selm {

/**
 * The encoding of the authors' trainer (tokenize_row and build_tokenized_answer of TRL 0.8.6 with the reference
 * response of SELM beside chosen and rejected), to the token, in its steps:
 *
 * 1. the prompt rendered without a generation header, each answer rendered alone (so its header is scored), both joined
 *    and tokenised as one text, and split where the prompt's tokens end: split_at_prompt();
 * 2. the prompts of best and worst compared: check_same_prompt();
 * 3. BOS before each prompt, EOS after each answer: add_special_ids();
 * 4. L = the longer answer of best and worst; a prompt that leaves no room for L keeps its last tokens: cut_prompt();
 * 5. an answer whose prompt still leaves no room for L is cut: cut_response();
 * 6. the prompt part is not scored: join(), labels_of().
 *
 * "Best" and "worst" are the iteration's chosen and rejected. A generated answer between them takes no part in L, so it
 * is not cut: prompt and answer may be longer than max_length (cap_length() is the remedy).
 */

/// An answer and the prompt before it, in tokens of their joined text.
struct PromptAndAnswer {
    std::vector<std::int32_t> prompt, answer;
    bool operator==(const PromptAndAnswer&) const = default;
};

/// The tokens around a sequence: BOS may be none, EOS may not.
struct RecipeIds {
    std::optional<std::int32_t> bos;
    std::int32_t eos = 0;
};

/**
 * @brief BOS and EOS: as named (@p bos, @p eos: an id, or the text of a token; "none" for no BOS; empty: not named),
 * else the tokenizer's, else the format's.
 * @throws Error configuration: a name that is no token, or no one says which.
 */
RecipeIds recipe_ids(const Tokenizer& tokenizer, const ChatFormat& format, std::string_view bos, std::string_view eos);

std::string render_prompt_recipe(const ChatFormat& format, std::span<const Message> messages);

/// An assistant's message alone, with whatever the format puts before a first message.
std::string render_response_recipe(const ChatFormat& format, std::string_view text);

/// Step 1. Splits @p joined behind the tokens of the prompt alone, or one token earlier where these are not its
/// beginning (the last token has merged with the answer). @throws Error bad_data: the joined text has fewer tokens than
/// the prompt.
PromptAndAnswer split_at_prompt(std::span<const std::int32_t> prompt_alone, std::span<const std::int32_t> joined);

/// Step 2. @throws Error bad_data: the two prompts differ in more than one token or in length by more than one.
void check_same_prompt(std::span<const std::int32_t> best_prompt, std::span<const std::int32_t> worst_prompt);

void add_special_ids(PromptAndAnswer& sequence, const RecipeIds& ids);                                      ///< step 3
void cut_prompt(PromptAndAnswer& sequence, std::int64_t longer_answer, const EncodingLimits& limits);   ///< step 4
void cut_response(PromptAndAnswer& sequence, std::int64_t longer_answer, const EncodingLimits& limits); ///< step 5
LabelledSequence join(const PromptAndAnswer& sequence);

/// As PyTorch wants them: the ids, -100 where a token is not scored.
std::vector<std::int32_t> labels_of(const LabelledSequence& sequence);

/**
 * @brief All steps for a row.
 * @param best, worst candidates of the pair; they may be the same. @throws Error internal: one of them has no answer;
 * bad_data: steps 1 and 2, or a sequence without any prompt token (a prompt of one token that merged, and no BOS).
 */
SequenceRow encode_row_recipe(const Tokenizer& tokenizer, const ChatFormat& format, std::span<const Message> messages,
                              const std::array<std::optional<std::string_view>, candidates_per_row>& responses,
                              std::size_t best, std::size_t worst, const RecipeIds& ids, const EncodingLimits& limits);

/// The prompt that is generated from: with the generation header, and the tokens that the tokenizer itself adds to a
/// text (Llama-3's format and tokenizer both begin with BOS: it is there twice, as in the authors' generation).
std::vector<std::int32_t> encode_prompt_recipe(const Tokenizer& tokenizer, const ChatFormat& format,
                                               std::span<const Message> messages);

/// Cuts the answer so that prompt and answer are @p length tokens at most. @return whether anything was cut.
/// @throws Error internal: no room for one token of the answer.
bool cap_length(LabelledSequence& sequence, std::int64_t length);

} // namespace selm
