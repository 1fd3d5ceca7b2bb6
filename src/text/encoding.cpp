#include "selm/text/encoding.hpp"

#include <algorithm>
#include <string>

#include "selm/base/error.hpp"

namespace selm {

void EncodingLimits::validate() const
{
    SELM_VALIDATE(max_prompt_length >= 1 && max_prompt_length < max_length, ExitCode::usage,
                  "max-prompt-length is "
                      << max_prompt_length << " and max-length " << max_length
                      << " (no room would be left for a prompt or an answer). Pass 1 <= max-prompt-length "
                         "< max-length");
}

std::int32_t end_of_turn_id(const Tokenizer& tokenizer, const ChatFormat& format)
{
    const std::optional<std::int32_t> id = tokenizer.token_id(format.end_of_turn());
    SELM_VALIDATE(id.has_value(), ExitCode::configuration,
                  "the chat format " << format.name() << " ends answers with " << format.end_of_turn()
                                     << ", which the tokenizer does not have. Pass another --chat-format");
    return *id;
}

std::vector<std::int32_t> encode_prompt_chat(const Tokenizer& tokenizer, const ChatFormat& format,
                                             std::span<const Message> messages, std::int64_t max_prompt_length)
{
    const bool keeps_first = format.beginning_of_sequence().has_value();
    SELM_EXPECT(max_prompt_length >= (keeps_first ? 2 : 1));
    std::vector<std::int32_t> ids = tokenizer.encode(format.render(messages, true), SpecialText::parse);
    const auto limit = static_cast<std::size_t>(max_prompt_length);
    if (ids.size() > limit) {
        const auto first_to_go = ids.begin() + (keeps_first ? 1 : 0);
        ids.erase(first_to_go, first_to_go + static_cast<std::ptrdiff_t>(ids.size() - limit));
    }
    return ids;
}

std::vector<std::int32_t> encode_response_chat(const Tokenizer& tokenizer, const ChatFormat& format,
                                               std::string_view text, std::int64_t max_response_tokens)
{
    SELM_EXPECT(max_response_tokens >= 1);
    std::vector<std::int32_t> ids = tokenizer.encode(text, SpecialText::parse);
    ids.push_back(end_of_turn_id(tokenizer, format));
    ids.resize(std::min(ids.size(), static_cast<std::size_t>(max_response_tokens)));
    return ids;
}

EncodedRow encode_row_chat(const Tokenizer& tokenizer, const ChatFormat& format, std::span<const Message> messages,
                           const std::array<std::optional<std::string_view>, candidates_per_row>& responses,
                           const EncodingLimits& limits)
{
    limits.validate();
    EncodedRow row;
    row.prompt = encode_prompt_chat(tokenizer, format, messages, limits.max_prompt_length);
    const std::int64_t room = limits.max_length - static_cast<std::int64_t>(row.prompt.size());
    for (std::size_t candidate = 0; candidate < responses.size(); ++candidate)
        if (responses[candidate])
            row.responses[candidate] = encode_response_chat(tokenizer, format, *responses[candidate], room);
    return row;
}

SequenceRow sequences_of(const EncodedRow& row)
{
    SequenceRow sequences;
    for (std::size_t candidate = 0; candidate < sequences.size(); ++candidate) {
        if (!row.responses[candidate])
            continue;
        LabelledSequence& sequence = sequences[candidate].emplace();
        sequence.ids = row.prompt;
        sequence.ids.insert(sequence.ids.end(), row.responses[candidate]->begin(), row.responses[candidate]->end());
        sequence.label_start = static_cast<std::int64_t>(row.prompt.size());
    }
    return sequences;
}

} // namespace selm
