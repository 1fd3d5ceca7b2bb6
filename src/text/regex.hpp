#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace selm::text {

struct Match {
    std::size_t begin; ///< offsets in bytes
    std::size_t end;
};

/// Scratch memory of a search; one per thread, for any number of expressions.
class MatchScratch {
  public:
    MatchScratch();
    ~MatchScratch();
    MatchScratch(MatchScratch&&) noexcept;
    MatchScratch& operator=(MatchScratch&&) noexcept;

  private:
    friend class Regex;
    struct State;
    std::unique_ptr<State> state_;
};

/**
 * @brief A regular expression of a tokenizer.json (Oniguruma's Ruby syntax over Unicode) on PCRE2, compiled to machine
 * code where PCRE2 can.
 *
 * What the two libraries read differently is translated (\s, \S) or refused (\h \w \b and their opposites, nested
 * and intersected character classes, {,n}). Subjects are well-formed UTF-8. Immutable, shared by threads.
 */
class Regex {
  public:
    /// @throws Error configuration with the expression and the reason.
    explicit Regex(std::string_view pattern);
    ~Regex();
    Regex(Regex&&) noexcept;
    Regex& operator=(Regex&&) noexcept;

    /// First match that begins at @p start or later. @throws Error bad_data when the search exceeds PCRE2's limits.
    std::optional<Match> find(std::string_view subject, std::size_t start, MatchScratch& scratch) const;

  private:
    struct State;
    std::unique_ptr<State> state_;
};

} // namespace selm::text
