#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace selm::text {

struct UnigramPiece {
    std::string text;
    double score = 0; ///< log-probability
};

/**
 * @brief Cuts a word into the pieces with the largest sum of scores (Viterbi). A character that is no piece costs ten
 * more than the worst piece and is the unknown token; neighbouring unknown characters are one token. Of two cuts with
 * the same sum the one whose last piece begins first wins. Immutable, shared by threads.
 */
class UnigramModel {
  public:
    /// @param pieces the id of a piece is its place; of equal pieces the last one counts. Texts are not empty.
    /// @param unknown id of the unknown token.
    UnigramModel(std::vector<UnigramPiece> pieces, std::int32_t unknown);

    /// Memory of a search; one per thread, for any number of words.
    struct Scratch {
        struct Best {
            double score = 0;
            std::int64_t begin = -1; ///< of the last piece; -1: nothing ends here
            std::int32_t id = 0;
        };
        std::vector<Best> best;
        std::vector<std::int32_t> ids;
    };

    /// Appends the ids of @p word, well-formed UTF-8.
    void encode(std::string_view word, Scratch& scratch, std::vector<std::int32_t>& out) const;

    std::optional<std::int32_t> find(std::string_view piece) const;
    std::int64_t size() const { return static_cast<std::int64_t>(scores_.size()); }

  private:
    /// A node of the tree of pieces; its children are consecutive, ascending by byte.
    struct Node {
        std::uint32_t first_child = 0;
        std::int32_t piece = -1; ///< id of the piece that ends here
        std::uint16_t children = 0;
        std::uint8_t byte = 0;
    };
    void build(const std::vector<UnigramPiece>& pieces);
    std::int64_t child(std::int64_t node, std::uint8_t byte) const; ///< -1: none

    std::vector<Node> nodes_;
    std::vector<double> scores_;
    std::int32_t unknown_;
    double unknown_score_ = 0;
};

} // namespace selm::text
