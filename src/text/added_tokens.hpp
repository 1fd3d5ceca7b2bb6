#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "regex.hpp"

namespace selm::text {

/// An entry of `added_tokens` in a tokenizer.json.
struct AddedToken {
    std::int32_t id = 0;
    std::string content;
    bool special = false;
    bool single_word = false; ///< only where no word character touches it
    bool lstrip = false;      ///< takes the whitespace before it along
    bool rstrip = false;      ///< takes the whitespace behind it along
    bool normalized = false;  ///< looked for in the normalised text
};

/// A stretch of a text: an added token, or (id -1) text in between.
struct Stretch {
    std::int32_t id;
    std::size_t begin;
    std::size_t end;
};

/// Finds added tokens in a text: leftmost, longest first, without overlap. Immutable, shared by threads.
class AddedTokenFinder {
  public:
    /// @param tokens with content that is not empty
    explicit AddedTokenFinder(std::vector<AddedToken> tokens);

    /// Appends the stretches of @p text in order. @param skip_special special tokens count as text.
    void split(std::string_view text, bool skip_special, std::vector<Stretch>& out, MatchScratch& scratch) const;

  private:
    struct Node {
        std::vector<std::pair<char, std::size_t>> next;
        int token = -1; ///< index of the token that ends here
    };
    int longest_at(std::string_view text, std::size_t position) const;
    bool touches_word(std::string_view text, std::size_t begin, std::size_t end, MatchScratch& scratch) const;

    std::vector<AddedToken> tokens_;
    std::vector<Node> nodes_;
    std::string first_bytes_; ///< each once
    Regex word_character_;
    Regex space_;
};

} // namespace selm::text
