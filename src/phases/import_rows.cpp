#include <array>
#include <cstdio>

#include "import_source.hpp"
#include "selm/base/error.hpp"
#include "selm/text/utf8.hpp"

namespace selm::import_detail {

namespace {

constexpr const char* fix_source = "Correct the row";

struct Dialogue {
    std::vector<MessageView> conversation; ///< before the answer
    std::string_view answer;
};

Role role_of(std::string_view word, const char* field)
{
    if (word == "user")
        return Role::user;
    if (word == "assistant")
        return Role::assistant;
    if (word == "system")
        return Role::system;
    throw BadRow{"unknown role", cat("\"", field, "\" has a message of role \"", word, "\" (system, user and assistant are known)"), fix_source};
}

std::vector<MessageView> checked_messages(const std::vector<SourceMessage>& list, const char* field)
{
    std::vector<MessageView> messages;
    messages.reserve(list.size());
    for (const SourceMessage& message : list) {
        check_text(message.content, field);
        messages.push_back({role_of(message.role, field), message.content});
    }
    return messages;
}

/// An optional system message, then user and assistant in turn, a user last.
void check_order(const std::vector<MessageView>& conversation, const char* field)
{
    const auto complain = [&](const std::string& problem) {
        throw BadRow{"wrong role order", cat("the conversation of \"", field, "\" ", problem,
                     " (an optional system message, then user and assistant in turn, then the assistant's answer)"), fix_source};
    };
    const std::size_t first = !conversation.empty() && conversation.front().role == Role::system ? 1 : 0;
    if (conversation.size() == first)
        complain("has no user message before the answer");
    for (std::size_t i = first; i < conversation.size(); ++i) {
        const Role expected = (i - first) % 2 == 0 ? Role::user : Role::assistant;
        if (conversation[i].role != expected)
            complain(cat("has at message ", i + 1, " another role than ", expected == Role::user ? "user" : "assistant"));
    }
    if (conversation.back().role != Role::user)
        complain("does not end with the user before the answer");
}

/// The conversation that the prompt cell alone gives.
std::vector<MessageView> prompt_conversation(const Cell& prompt, const char* answer_field)
{
    if (const auto* text = std::get_if<std::string_view>(&prompt))
        return {{Role::user, *text}};
    if (const auto* list = std::get_if<std::vector<SourceMessage>>(&prompt))
        return checked_messages(*list, "prompt");
    throw BadRow{"missing field", cat("\"prompt\" is missing (\"", answer_field, "\" is a plain text: it does not hold the prompt)"), fix_source};
}

Dialogue dialogue_of(const Cell& cell, const Cell& prompt, const char* field)
{
    if (std::holds_alternative<std::monostate>(cell))
        throw BadRow{"missing field", cat("\"", field, "\" is missing (a row needs two answers to compare)"), fix_source};
    if (const auto* text = std::get_if<std::string_view>(&cell)) {
        check_text(*text, field);
        return {prompt_conversation(prompt, field), *text};
    }
    std::vector<MessageView> messages = checked_messages(std::get<std::vector<SourceMessage>>(cell), field);
    if (messages.empty() || messages.back().role != Role::assistant)
        throw BadRow{"wrong role order", cat("\"", field, "\" does not end with a message of the assistant (that is the answer)"), fix_source};
    Dialogue dialogue;
    dialogue.answer = messages.back().content;
    messages.pop_back();
    const bool answer_alone = messages.empty() && std::holds_alternative<std::vector<SourceMessage>>(prompt);
    dialogue.conversation = answer_alone ? prompt_conversation(prompt, field) : std::move(messages);
    return dialogue;
}

bool same(const std::vector<MessageView>& a, const std::vector<MessageView>& b)
{
    if (a.size() != b.size())
        return false;
    for (std::size_t i = 0; i < a.size(); ++i)
        if (a[i].role != b[i].role || a[i].content != b[i].content)
            return false;
    return true;
}

std::string id_of_line(std::int64_t index)
{
    std::array<char, 32> text{};
    std::snprintf(text.data(), text.size(), "row-%08lld", static_cast<long long>(index));
    return text.data();
}

} // namespace

void check_text(std::string_view text, const char* field)
{
    if (const auto at = find_invalid_utf8(text))
        throw BadRow{"invalid UTF-8", cat("\"", field, "\" is not valid UTF-8 at byte ", *at, " (tokens of such text are undefined)"), fix_source};
    if (text.find('\0') != std::string::npos)
        throw BadRow{"NUL", cat("\"", field, "\" contains a NUL character (most tools cut the text there)"), fix_source};
}

CheckedRow check_row(const SourceRow& source, std::int64_t index)
{
    if (const auto* text = std::get_if<std::string_view>(&source.prompt))
        check_text(*text, "prompt");
    Dialogue chosen = dialogue_of(source.chosen, source.prompt, "chosen");
    const Dialogue rejected = dialogue_of(source.rejected, source.prompt, "rejected");
    check_order(chosen.conversation, "chosen");
    if (!same(chosen.conversation, rejected.conversation))
        throw BadRow{"different conversations", "\"chosen\" and \"rejected\" differ before their last message (only answers to the same "
                     "conversation can be compared)", fix_source};
    CheckedRow checked;
    checked.messages = std::move(chosen.conversation);
    const auto* prompt = std::get_if<std::string_view>(&source.prompt);
    checked.prompt = prompt != nullptr ? *prompt : checked.messages.back().content;
    checked.id = source.id;
    if (source.id)
        check_text(*source.id, "prompt_id");
    else
        checked.made_id = id_of_line(index);
    checked.chosen = chosen.answer;
    checked.rejected = rejected.answer;
    checked.score_chosen = source.score_chosen;
    checked.score_rejected = source.score_rejected;
    checked.empty_answer = strip_whitespace(checked.chosen).empty() || strip_whitespace(checked.rejected).empty();
    return checked;
}

} // namespace selm::import_detail
