#include "added_tokens.hpp"

#include <algorithm>

#include "selm/text/utf8.hpp"

namespace selm::text {
namespace {

std::string_view first_character(std::string_view text)
{
    std::size_t end = 0;
    if (!text.empty())
        next_code_point(text, end);
    return text.substr(0, end);
}

std::string_view last_character(std::string_view text)
{
    std::size_t begin = text.size();
    while (begin > 0 && (static_cast<unsigned char>(text[--begin]) & 0xC0) == 0x80) {
    }
    return text.substr(begin);
}

} // namespace

AddedTokenFinder::AddedTokenFinder(std::vector<AddedToken> tokens)
    : tokens_(std::move(tokens)), nodes_(1),
      word_character_(R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}])"), // \w of Rust's regular expressions
      space_(R"(\s)")
{
    for (std::size_t t = 0; t < tokens_.size(); ++t) {
        std::size_t node = 0;
        for (const char byte : tokens_[t].content) {
            const auto& next = nodes_[node].next;
            const auto found =
                std::find_if(next.begin(), next.end(), [&](const auto& edge) { return edge.first == byte; });
            if (found != next.end()) {
                node = found->second;
            } else {
                nodes_[node].next.emplace_back(byte, nodes_.size());
                node = nodes_.size();
                nodes_.emplace_back();
            }
        }
        nodes_[node].token = static_cast<int>(t);
    }
    for (const auto& edge : nodes_[0].next)
        first_bytes_.push_back(edge.first);
}

int AddedTokenFinder::longest_at(std::string_view text, std::size_t position) const
{
    int longest = -1;
    std::size_t node = 0;
    while (position < text.size()) {
        const auto& next = nodes_[node].next;
        const auto found =
            std::find_if(next.begin(), next.end(), [&](const auto& edge) { return edge.first == text[position]; });
        if (found == next.end())
            break;
        node = found->second;
        ++position;
        if (nodes_[node].token >= 0)
            longest = nodes_[node].token;
    }
    return longest;
}

bool AddedTokenFinder::touches_word(std::string_view text, std::size_t begin, std::size_t end,
                                    MatchScratch& scratch) const
{
    const std::string_view before = last_character(text.substr(0, begin));
    const std::string_view after = first_character(text.substr(end));
    return word_character_.find(before, 0, scratch).has_value() || word_character_.find(after, 0, scratch).has_value();
}

void AddedTokenFinder::split(std::string_view text, bool skip_special, std::vector<Stretch>& out,
                             MatchScratch& scratch) const
{
    std::size_t done = 0;
    for (std::size_t search = 0; (search = text.find_first_of(first_bytes_, search)) != std::string_view::npos;) {
        const int found = longest_at(text, search);
        if (found < 0) {
            ++search;
            continue;
        }
        const AddedToken& token = tokens_[static_cast<std::size_t>(found)];
        std::size_t begin = search;
        std::size_t end = search + token.content.size();
        search = end; // a match that does not count still hides those that overlap it
        if ((skip_special && token.special) || (token.single_word && touches_word(text, begin, end, scratch)))
            continue;
        while (token.lstrip && begin > done) {
            const std::string_view before = last_character(text.substr(0, begin));
            if (!space_.find(before, 0, scratch))
                break;
            begin -= before.size();
        }
        while (token.rstrip && end < text.size()) {
            const std::string_view after = first_character(text.substr(end));
            if (!space_.find(after, 0, scratch))
                break;
            end += after.size();
        }
        if (done < begin)
            out.push_back({-1, done, begin});
        out.push_back({token.id, begin, end});
        done = end;
    }
    if (done < text.size())
        out.push_back({-1, done, text.size()});
}

} // namespace selm::text
