#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer_normalizer.hpp"

namespace selm::text {

/// A step from tokens (their texts) to the text that they stand for: rewrites the list. Immutable, shared by threads.
class TokenDecoder {
  public:
    virtual ~TokenDecoder() = default;
    virtual void apply(std::vector<std::string>& tokens) const = 0;

    /// What is left of @p tokens, put together.
    std::string decode(std::vector<std::string> tokens) const;
};

/// Each stand-in becomes its byte; a token with any other character (an added one) stands for its own bytes. What is
/// then no well-formed UTF-8 becomes U+FFFD.
class ByteLevelDecoder : public TokenDecoder {
  public:
    void apply(std::vector<std::string>& tokens) const override;
};

/// A tokenizer.json without decoder: tokens with a space between them.
class SpaceJoinDecoder : public TokenDecoder {
  public:
    void apply(std::vector<std::string>& tokens) const override;
};

/// Runs of byte tokens ("<0xE4>") become the characters they form; a run that is no well-formed UTF-8 becomes U+FFFD
/// for each byte.
class ByteFallbackDecoder : public TokenDecoder {
  public:
    void apply(std::vector<std::string>& tokens) const override;
};

/// All tokens become one.
class FuseDecoder : public TokenDecoder {
  public:
    void apply(std::vector<std::string>& tokens) const override;
};

class ReplaceDecoder : public TokenDecoder {
  public:
    explicit ReplaceDecoder(Replacer replacer) : replacer_(std::move(replacer)) {}
    void apply(std::vector<std::string>& tokens) const override;

  private:
    Replacer replacer_;
};

/// Takes at most @p left characters @p character off the beginning of each token and @p right off its end.
class StripDecoder : public TokenDecoder {
  public:
    StripDecoder(std::string character, std::size_t left, std::size_t right)
        : character_(std::move(character)), left_(left), right_(right)
    {
    }
    void apply(std::vector<std::string>& tokens) const override;

  private:
    std::string character_;
    std::size_t left_;
    std::size_t right_;
};

/// The replacement becomes a space again; in the first token, where a prefix may have been put, it goes away.
class MetaspaceDecoder : public TokenDecoder {
  public:
    MetaspaceDecoder(std::string replacement, bool has_prefix)
        : replacement_(std::move(replacement)), has_prefix_(has_prefix)
    {
    }
    void apply(std::vector<std::string>& tokens) const override;

  private:
    std::string replacement_;
    bool has_prefix_;
};

class SequenceDecoder : public TokenDecoder {
  public:
    explicit SequenceDecoder(std::vector<std::unique_ptr<TokenDecoder>> steps) : steps_(std::move(steps)) {}
    void apply(std::vector<std::string>& tokens) const override;

  private:
    std::vector<std::unique_ptr<TokenDecoder>> steps_;
};

} // namespace selm::text
