#include "tokenizer_normalizer.hpp"

#include "selm/text/utf8.hpp"

namespace selm::text {

void Replacer::apply(std::string& text, MatchScratch& scratch) const
{
    if (regex_)
        return replace_matches(text, scratch);
    std::size_t found = literal_.empty() ? std::string::npos : text.find(literal_);
    if (found == std::string::npos)
        return;
    std::string out;
    out.reserve(text.size() + text.size() / 2);
    std::size_t done = 0;
    for (; found != std::string::npos; found = text.find(literal_, done)) {
        out.append(text, done, found - done).append(content_);
        done = found + literal_.size();
    }
    out.append(text, done);
    text.swap(out);
}

/// As Oniguruma's iterator: an empty match counts but for one right behind another match.
void Replacer::replace_matches(std::string& text, MatchScratch& scratch) const
{
    std::string out;
    std::size_t done = 0;
    std::size_t search = 0;
    std::optional<std::size_t> last_end;
    while (search <= text.size()) {
        const std::optional<Match> match = regex_->find(text, search, scratch);
        if (!match)
            break;
        const bool empty = match->begin == match->end;
        if (!empty || last_end != match->end) {
            out.append(text, done, match->begin - done).append(content_);
            done = match->end;
        }
        last_end = match->end;
        search = match->end;
        if (empty) {
            if (search == text.size())
                break;
            next_code_point(text, search);
        }
    }
    out.append(text, done);
    text.swap(out);
}

void PrependNormalizer::apply(std::string& text, MatchScratch& /*scratch*/) const
{
    if (!text.empty())
        text.insert(0, text_);
}

void SequenceNormalizer::apply(std::string& text, MatchScratch& scratch) const
{
    for (const auto& step : steps_)
        step->apply(text, scratch);
}

} // namespace selm::text
