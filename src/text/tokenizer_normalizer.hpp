#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "regex.hpp"

namespace selm::text {

/// Replaces every match of a literal or an expression by a text. Immutable, shared by threads.
class Replacer {
  public:
    Replacer(std::string literal, std::string content) : literal_(std::move(literal)), content_(std::move(content)) {}
    Replacer(Regex regex, std::string content) : regex_(std::move(regex)), content_(std::move(content)) {}
    void apply(std::string& text, MatchScratch& scratch) const;

  private:
    void replace_matches(std::string& text, MatchScratch& scratch) const;

    std::optional<Regex> regex_;
    std::string literal_; ///< where there is no expression; an empty one replaces nothing
    std::string content_;
};

/// What happens to a stretch of text (well-formed UTF-8, not empty) before it is cut into words. Immutable, shared by
/// threads.
class Normalizer {
  public:
    virtual ~Normalizer() = default;
    virtual void apply(std::string& text, MatchScratch& scratch) const = 0;
};

class PrependNormalizer : public Normalizer {
  public:
    explicit PrependNormalizer(std::string text) : text_(std::move(text)) {}
    void apply(std::string& text, MatchScratch& scratch) const override;

  private:
    std::string text_;
};

class ReplacingNormalizer : public Normalizer {
  public:
    explicit ReplacingNormalizer(Replacer replacer) : replacer_(std::move(replacer)) {}
    void apply(std::string& text, MatchScratch& scratch) const override { replacer_.apply(text, scratch); }

  private:
    Replacer replacer_;
};

class SequenceNormalizer : public Normalizer {
  public:
    explicit SequenceNormalizer(std::vector<std::unique_ptr<Normalizer>> steps) : steps_(std::move(steps)) {}
    void apply(std::string& text, MatchScratch& scratch) const override;

  private:
    std::vector<std::unique_ptr<Normalizer>> steps_;
};

} // namespace selm::text
