#include "pre_tokenizer.hpp"

#include <algorithm>
#include <optional>
#include <utility>

#include "byte_alphabet.hpp"
#include "selm/text/utf8.hpp"

namespace selm::text {
namespace {

/// The expression inside `tokenizers`' ByteLevel.
constexpr std::string_view gpt2_pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

/// Collects the parts of one word: they arrive in order, are not empty and together cover it.
class SplitCollector {
  public:
    SplitCollector(SplitBehavior behavior, std::vector<Words::Range>& out) : behavior_(behavior), out_(out) {}

    void add(std::size_t begin, std::size_t end, bool is_match)
    {
        const Previous current = is_match ? Previous::match : Previous::gap;
        const bool joins =
            (behavior_ == SplitBehavior::contiguous && previous_ == current) ||
            (behavior_ == SplitBehavior::merged_with_previous && is_match && previous_ == Previous::gap) ||
            (behavior_ == SplitBehavior::merged_with_next && !is_match && previous_ == Previous::match);
        if (joins)
            out_.back().end = end;
        else if (behavior_ != SplitBehavior::removed || !is_match)
            out_.push_back({begin, end});
        previous_ = current;
    }

  private:
    enum class Previous { none, gap, match };

    SplitBehavior behavior_;
    std::vector<Words::Range>& out_;
    Previous previous_ = Previous::none;
};

} // namespace

void SequencePreTokenizer::apply(Words& words, PreTokenizerScratch& scratch) const
{
    for (const auto& step : steps_)
        step->apply(words, scratch);
}

void SplitPreTokenizer::apply(Words& words, PreTokenizerScratch& scratch) const
{
    scratch.ranges.clear();
    for (const Words::Range& range : words.ranges) {
        const std::string_view word = words.word(range);
        SplitCollector collector(behavior_, scratch.ranges);
        std::size_t done = 0;
        std::size_t search = 0;
        while (search <= word.size()) {
            const std::optional<Match> match = regex_.find(word, search, scratch.match);
            if (!match)
                break;
            search = match->end;
            if (match->begin == match->end) { // an empty match splits nothing off: look behind the next character
                if (search == word.size())
                    break;
                next_code_point(word, search);
                continue;
            }
            if (done != match->begin)
                collector.add(range.begin + done, range.begin + match->begin, invert_);
            collector.add(range.begin + match->begin, range.begin + match->end, !invert_);
            done = match->end;
        }
        if (done != word.size())
            collector.add(range.begin + done, range.end, invert_);
    }
    words.ranges.swap(scratch.ranges);
}

std::unique_ptr<PreTokenizer> make_digits_pre_tokenizer(bool individual_digits)
{
    return std::make_unique<SplitPreTokenizer>(
        Regex(R"(\p{N})"), individual_digits ? SplitBehavior::isolated : SplitBehavior::contiguous, false);
}

ByteLevelPreTokenizer::ByteLevelPreTokenizer(bool add_prefix_space, bool use_regex)
    : add_prefix_space_(add_prefix_space)
{
    if (use_regex)
        split_ = std::make_unique<SplitPreTokenizer>(Regex(gpt2_pattern), SplitBehavior::isolated, false);
}

void ByteLevelPreTokenizer::apply(Words& words, PreTokenizerScratch& scratch) const
{
    if (add_prefix_space_) {
        scratch.text.clear();
        for (Words::Range& range : words.ranges) {
            const std::string_view word = words.word(range);
            range.begin = scratch.text.size();
            if (word.front() != ' ')
                scratch.text.push_back(' ');
            scratch.text.append(word);
            range.end = scratch.text.size();
        }
        words.text.swap(scratch.text);
    }
    if (split_)
        split_->apply(words, scratch);
    scratch.text.clear();
    const ByteAlphabet& alphabet = ByteAlphabet::instance();
    for (Words::Range& range : words.ranges) {
        const std::string_view word = words.word(range);
        range.begin = scratch.text.size();
        alphabet.append(scratch.text, word);
        range.end = scratch.text.size();
    }
    words.text.swap(scratch.text);
}

void MetaspacePreTokenizer::apply(Words& words, PreTokenizerScratch& scratch) const
{
    scratch.text.clear();
    scratch.ranges.clear();
    for (const Words::Range& range : words.ranges) {
        const std::string_view word = words.word(range);
        const std::size_t begin = scratch.text.size();
        const bool wanted = scheme_ == PrependScheme::always ||
                            (scheme_ == PrependScheme::first && words.at_start && range.begin == 0);
        if (wanted && word.front() != ' ' && !word.starts_with(replacement_))
            scratch.text.append(replacement_);
        for (std::size_t done = 0; done < word.size();) {
            const std::size_t space = std::min(word.find(' ', done), word.size());
            scratch.text.append(word, done, space - done);
            if (space < word.size())
                scratch.text.append(replacement_);
            done = space + 1;
        }
        std::size_t first = begin;
        for (std::size_t next = begin; split_; next += replacement_.size()) {
            next = scratch.text.find(replacement_, next);
            if (next == std::string::npos)
                break;
            if (next > first)
                scratch.ranges.push_back({first, next});
            first = next;
        }
        scratch.ranges.push_back({first, scratch.text.size()});
    }
    words.text.swap(scratch.text);
    words.ranges.swap(scratch.ranges);
}

} // namespace selm::text
