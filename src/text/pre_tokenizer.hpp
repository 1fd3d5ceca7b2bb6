#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "regex.hpp"

namespace selm::text {

/// A text under way to the model and the words it is cut into so far, in order and not empty.
struct Words {
    struct Range {
        std::size_t begin;
        std::size_t end;
    };
    std::string text;
    std::vector<Range> ranges;
    bool at_start = false; ///< this text is the beginning of what encode() was given

    std::string_view word(const Range& range) const
    {
        return std::string_view(text).substr(range.begin, range.end - range.begin);
    }
};

/// Memory that pre-tokenizers reuse from call to call; one per thread.
struct PreTokenizerScratch {
    MatchScratch match;
    std::vector<Words::Range> ranges;
    std::string text;
};

/// One step between the added tokens and the model. Immutable, shared by threads.
class PreTokenizer {
  public:
    virtual ~PreTokenizer() = default;
    virtual void apply(Words& words, PreTokenizerScratch& scratch) const = 0;
};

class SequencePreTokenizer : public PreTokenizer {
  public:
    explicit SequencePreTokenizer(std::vector<std::unique_ptr<PreTokenizer>> steps) : steps_(std::move(steps)) {}
    void apply(Words& words, PreTokenizerScratch& scratch) const override;

  private:
    std::vector<std::unique_ptr<PreTokenizer>> steps_;
};

/// What becomes of the matches of a Split (names of the `tokenizers` library).
enum class SplitBehavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };

class SplitPreTokenizer : public PreTokenizer {
  public:
    SplitPreTokenizer(Regex regex, SplitBehavior behavior, bool invert)
        : regex_(std::move(regex)), behavior_(behavior), invert_(invert)
    {
    }
    void apply(Words& words, PreTokenizerScratch& scratch) const override;

  private:
    Regex regex_;
    SplitBehavior behavior_;
    bool invert_;
};

/// Digits = Split at every character of the categories Nd, Nl, No (Rust's char::is_numeric).
std::unique_ptr<PreTokenizer> make_digits_pre_tokenizer(bool individual_digits);

/// Split at GPT-2's expression (where asked for), then each byte becomes its printable stand-in.
class ByteLevelPreTokenizer : public PreTokenizer {
  public:
    ByteLevelPreTokenizer(bool add_prefix_space, bool use_regex);
    void apply(Words& words, PreTokenizerScratch& scratch) const override;

  private:
    bool add_prefix_space_;
    std::unique_ptr<SplitPreTokenizer> split_;
};

/// Where Metaspace puts its replacement in front: before the whole text's first word, before every one, never.
enum class PrependScheme { first, always, never };

/// Spaces become @p replacement (U+2581), one is put in front where the scheme says so and none is there, and (where
/// asked for) a word begins at every replacement.
class MetaspacePreTokenizer : public PreTokenizer {
  public:
    MetaspacePreTokenizer(std::string replacement, PrependScheme scheme, bool split)
        : replacement_(std::move(replacement)), scheme_(scheme), split_(split)
    {
    }
    void apply(Words& words, PreTokenizerScratch& scratch) const override;

  private:
    std::string replacement_;
    PrependScheme scheme_;
    bool split_;
};

} // namespace selm::text
