#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "regex.hpp"

namespace selm::text {

/// A step that rewrites a text (well-formed UTF-8). Immutable, shared by threads.
class UnigramNormalizer {
  public:
    virtual ~UnigramNormalizer() = default;
    virtual void apply(std::string& text, MatchScratch& scratch) const = 0;
};

/// Removes whitespace (Unicode's White_Space) at the ends.
std::unique_ptr<UnigramNormalizer> make_strip_normalizer(bool left, bool right);

/// Replaces every match of the expression by the content.
std::unique_ptr<UnigramNormalizer> make_replace_normalizer(Regex pattern, std::string content);

/**
 * @brief SentencePiece's table of characters ("precompiled charsmap"), applied as Hugging Face's `Precompiled`: to
 * whole grapheme clusters of less than six bytes, of which the shortest prefix in the table stands for the cluster, and
 * to single characters otherwise.
 * @param table little-endian: bytes of a double-array trie, the trie, then the replacements, each ended by NUL.
 * @throws Error configuration when the table is malformed.
 */
std::unique_ptr<UnigramNormalizer> make_charsmap_normalizer(std::string_view table);

} // namespace selm::text
