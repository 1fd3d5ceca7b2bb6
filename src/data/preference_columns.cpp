#include "selm/data/preference_columns.hpp"

#include <algorithm>
#include <cstring>
#include <new>

namespace selm {

void TextBlob::grow(std::size_t bytes)
{
    const std::size_t wanted = std::max({bytes, capacity_ + capacity_ / 2, std::size_t{4096}});
    auto* grown = static_cast<char*>(std::realloc(data_.get(), wanted));
    if (grown == nullptr)
        throw std::bad_alloc();
    static_cast<void>(data_.release()); // realloc has it
    data_.reset(grown);
    capacity_ = wanted;
}

void TextBlob::append(std::string_view text)
{
    if (size_ + text.size() > capacity_)
        grow(size_ + text.size());
    if (!text.empty())
        std::memcpy(data_.get() + size_, text.data(), text.size());
    size_ += text.size();
    lengths_.push_back(static_cast<std::int64_t>(text.size()));
}

void PreferenceColumns::append(const PreferenceRowView& row)
{
    row_keys.push_back(row.row);
    row_sources.push_back(row.row_source);
    id.append(row.id);
    prompt.append(row.prompt);
    message_counts.push_back(static_cast<std::int64_t>(row.messages.size()));
    for (const MessageView& message : row.messages) {
        roles.push_back(static_cast<std::uint8_t>(message.role));
        message_text.append(message.content);
    }
    chosen.append(row.chosen);
    rejected.append(row.rejected);
    scores.push_back(row.score_chosen);
    scores.push_back(row.score_rejected);
}

void PreferenceColumns::append(const PreferenceRow& row)
{
    std::vector<MessageView> messages;
    messages.reserve(row.messages.size());
    for (const Message& message : row.messages)
        messages.push_back({message.role, message.content});
    append(PreferenceRowView{.row = row.row, .row_source = row.row_source, .id = row.id, .prompt = row.prompt, .messages = messages,
                             .chosen = row.chosen, .rejected = row.rejected, .score_chosen = row.score_chosen,
                             .score_rejected = row.score_rejected});
}

} // namespace selm
