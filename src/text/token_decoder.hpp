#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace selm::text {

/// Turns tokens (their texts) into the text that they stand for. Immutable, shared by threads.
class TokenDecoder {
  public:
    virtual ~TokenDecoder() = default;
    virtual std::string decode(const std::vector<std::string_view>& tokens) const = 0;
};

/// Each stand-in becomes its byte; a token with any other character (an added one) stands for its own bytes. What is
/// then no well-formed UTF-8 becomes U+FFFD.
class ByteLevelDecoder : public TokenDecoder {
  public:
    std::string decode(const std::vector<std::string_view>& tokens) const override;
};

/// A tokenizer.json without decoder: tokens with a space between them.
class SpaceJoinDecoder : public TokenDecoder {
  public:
    std::string decode(const std::vector<std::string_view>& tokens) const override;
};

} // namespace selm::text
