#include "selm/text/recipe_encoding.hpp"

#include <algorithm>
#include <charconv>

#include "selm/base/error.hpp"

namespace selm {

namespace {

constexpr std::int32_t not_scored = -100;

std::int64_t length(const std::vector<std::int32_t>& ids)
{
    return static_cast<std::int64_t>(ids.size());
}

/// The id that a text of digits is, or that of the token with this text.
std::int32_t named_id(const Tokenizer& tokenizer, const char* option, std::string_view name)
{
    std::int64_t id = -1;
    const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), id);
    if (error == std::errc() && end == name.data() + name.size()) {
        SELM_VALIDATE(id >= 0 && id < tokenizer.vocabulary_size(), ExitCode::configuration,
                      option << " " << name << " is no id of the tokenizer (it has " << tokenizer.vocabulary_size()
                             << " ids). Pass an id or the text of a token");
        return static_cast<std::int32_t>(id);
    }
    const std::optional<std::int32_t> found = tokenizer.token_id(name);
    SELM_VALIDATE(found.has_value(), ExitCode::configuration,
                  option << " " << name << " is no token of the tokenizer. Pass an id or the text of a token");
    return *found;
}

} // namespace

RecipeIds recipe_ids(const Tokenizer& tokenizer, const ChatFormat& format, std::string_view bos, std::string_view eos)
{
    const SpecialIds of_format = format.default_special_ids();
    const auto choose = [&](const char* option, const char* what, std::string_view name,
                            std::optional<std::int32_t> of_tokenizer, std::optional<std::int32_t> standard) {
        if (!name.empty())
            return named_id(tokenizer, option, name);
        const std::optional<std::int32_t> id = of_tokenizer ? of_tokenizer : standard;
        SELM_VALIDATE(id.has_value(), ExitCode::configuration,
                      "neither the tokenizer nor the chat format " << format.name() << " says which token is " << what
                                                                   << " (the recipe's encoding adds it). Pass "
                                                                   << option << " with an id or the text of a token");
        SELM_VALIDATE(*id < tokenizer.vocabulary_size(), ExitCode::configuration,
                      "the " << what << " id " << *id << " is not in the tokenizer (it has "
                             << tokenizer.vocabulary_size() << " ids). Pass " << option
                             << " with an id or the text of a token");
        return *id;
    };
    RecipeIds ids;
    if (bos != "none")
        ids.bos = choose("--bos-token", "BOS", bos, tokenizer.bos_id(), of_format.bos);
    ids.eos = choose("--eos-token", "EOS", eos, tokenizer.eos_id(), of_format.eos);
    return ids;
}

std::string render_prompt_recipe(const ChatFormat& format, std::span<const Message> messages)
{
    return format.render(messages, false);
}

std::string render_response_recipe(const ChatFormat& format, std::string_view text)
{
    const Message message{Role::assistant, std::string(text)};
    return format.render(std::span(&message, 1), false);
}

PromptAndAnswer split_at_prompt(std::span<const std::int32_t> prompt_alone, std::span<const std::int32_t> joined)
{
    SELM_VALIDATE(joined.size() >= prompt_alone.size(), ExitCode::bad_data,
                  "prompt and answer have " << joined.size() << " tokens, the prompt alone " << prompt_alone.size()
                                            << " (the recipe cannot tell which are the answer's). Take the row out, or "
                                               "use --encoding chat");
    std::size_t split = prompt_alone.size();
    if (!std::equal(prompt_alone.begin(), prompt_alone.end(), joined.begin()))
        --split; // not empty: an empty beginning is equal
    const auto middle = joined.begin() + static_cast<std::ptrdiff_t>(split);
    return {{joined.begin(), middle}, {middle, joined.end()}};
}

void check_same_prompt(std::span<const std::int32_t> best_prompt, std::span<const std::int32_t> worst_prompt)
{
    const std::size_t common = std::min(best_prompt.size(), worst_prompt.size());
    std::size_t different = 0;
    for (std::size_t i = 0; i < common; ++i)
        different += best_prompt[i] != worst_prompt[i];
    SELM_VALIDATE(different <= 1 && std::max(best_prompt.size(), worst_prompt.size()) - common <= 1, ExitCode::bad_data,
                  "before the best and the worst answer the prompt has "
                      << best_prompt.size() << " and " << worst_prompt.size() << " tokens, " << different
                      << " of them different (only the last one may merge with the answer). Take the row out, or use "
                         "--encoding chat");
}

void add_special_ids(PromptAndAnswer& sequence, const RecipeIds& ids)
{
    if (ids.bos)
        sequence.prompt.insert(sequence.prompt.begin(), *ids.bos);
    sequence.answer.push_back(ids.eos);
}

void cut_prompt(PromptAndAnswer& sequence, std::int64_t longer_answer, const EncodingLimits& limits)
{
    const std::int64_t prompt = length(sequence.prompt);
    if (prompt + longer_answer > limits.max_length && prompt > limits.max_prompt_length)
        sequence.prompt.erase(sequence.prompt.begin(), sequence.prompt.end() - limits.max_prompt_length);
}

void cut_response(PromptAndAnswer& sequence, std::int64_t longer_answer, const EncodingLimits& limits)
{
    const std::int64_t room = limits.max_length - limits.max_prompt_length;
    if (length(sequence.prompt) + longer_answer > limits.max_length && length(sequence.answer) > room)
        sequence.answer.resize(static_cast<std::size_t>(room));
}

LabelledSequence join(const PromptAndAnswer& sequence)
{
    LabelledSequence joined{sequence.prompt, length(sequence.prompt)};
    joined.ids.insert(joined.ids.end(), sequence.answer.begin(), sequence.answer.end());
    return joined;
}

std::vector<std::int32_t> labels_of(const LabelledSequence& sequence)
{
    std::vector<std::int32_t> labels = sequence.ids;
    std::fill_n(labels.begin(), sequence.label_start, not_scored);
    return labels;
}

SequenceRow encode_row_recipe(const Tokenizer& tokenizer, const ChatFormat& format, std::span<const Message> messages,
                              const std::array<std::optional<std::string_view>, candidates_per_row>& responses,
                              std::size_t best, std::size_t worst, const RecipeIds& ids, const EncodingLimits& limits)
{
    limits.validate();
    SELM_EXPECT(responses.at(best).has_value() && responses.at(worst).has_value());
    const std::string prompt = render_prompt_recipe(format, messages);
    const std::vector<std::int32_t> prompt_alone = tokenizer.encode(prompt, SpecialText::parse);
    std::array<PromptAndAnswer, candidates_per_row> parts;
    for (std::size_t c = 0; c < responses.size(); ++c)
        if (responses[c])
            parts[c] = split_at_prompt(
                prompt_alone,
                tokenizer.encode(prompt + render_response_recipe(format, *responses[c]), SpecialText::parse));
    check_same_prompt(parts[best].prompt, parts[worst].prompt);
    for (std::size_t c = 0; c < responses.size(); ++c)
        if (responses[c])
            add_special_ids(parts[c], ids);
    const std::int64_t longer = std::max(length(parts[best].answer), length(parts[worst].answer));
    SequenceRow row;
    for (std::size_t c = 0; c < responses.size(); ++c) {
        if (!responses[c])
            continue;
        cut_prompt(parts[c], longer, limits);
        cut_response(parts[c], longer, limits);
        SELM_VALIDATE(!parts[c].prompt.empty(), ExitCode::bad_data,
                      "the prompt has no token before the answer (nothing would predict the answer's first token). "
                      "Pass a --bos-token, or take the row out");
        row[c] = join(parts[c]);
    }
    return row;
}

std::vector<std::int32_t> encode_prompt_recipe(const Tokenizer& tokenizer, const ChatFormat& format,
                                               std::span<const Message> messages)
{
    return tokenizer.encode_with_special_tokens(format.render(messages, true));
}

bool cap_length(LabelledSequence& sequence, std::int64_t length)
{
    SELM_EXPECT(length > sequence.label_start);
    if (static_cast<std::int64_t>(sequence.ids.size()) <= length)
        return false;
    sequence.ids.resize(static_cast<std::size_t>(length));
    return true;
}

} // namespace selm
