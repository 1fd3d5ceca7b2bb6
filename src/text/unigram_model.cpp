#include "unigram_model.hpp"

#include <algorithm>
#include <numeric>

#include "selm/base/error.hpp"
#include "selm/text/utf8.hpp"

namespace selm::text {
namespace {

constexpr double unknown_penalty = 10; // SentencePiece's and Hugging Face's

/// Pieces [begin, end) of the sorted order share the first `depth` bytes: a node that waits for its children.
struct Pending {
    std::size_t node, begin, end, depth;
};

} // namespace

UnigramModel::UnigramModel(std::vector<UnigramPiece> pieces, std::int32_t unknown) : unknown_(unknown)
{
    SELM_EXPECT(unknown >= 0 && static_cast<std::size_t>(unknown) < pieces.size());
    scores_.reserve(pieces.size());
    for (const UnigramPiece& piece : pieces)
        scores_.push_back(piece.score);
    unknown_score_ = *std::min_element(scores_.begin(), scores_.end()) - unknown_penalty;
    build(pieces);
}

void UnigramModel::build(const std::vector<UnigramPiece>& pieces)
{
    std::vector<std::int32_t> order(pieces.size());
    std::iota(order.begin(), order.end(), 0);
    const auto text = [&](std::size_t i) -> const std::string& {
        return pieces[static_cast<std::size_t>(order[i])].text;
    };
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
        return pieces[static_cast<std::size_t>(a)].text < pieces[static_cast<std::size_t>(b)].text;
    });
    nodes_.emplace_back();
    std::vector<Pending> queue{{0, 0, order.size(), 0}}; // breadth first, so that children are consecutive
    for (std::size_t done = 0; done < queue.size(); ++done) {
        const Pending now = queue[done];
        std::size_t i = now.begin;
        for (; i < now.end && text(i).size() == now.depth; ++i)
            nodes_[now.node].piece = order[i];
        nodes_[now.node].first_child = static_cast<std::uint32_t>(nodes_.size());
        while (i < now.end) {
            const char byte = text(i)[now.depth];
            std::size_t end = i + 1;
            while (end < now.end && text(end)[now.depth] == byte)
                ++end;
            queue.push_back({nodes_.size(), i, end, now.depth + 1});
            nodes_.push_back({.byte = static_cast<std::uint8_t>(byte)});
            ++nodes_[now.node].children;
            i = end;
        }
    }
}

std::int64_t UnigramModel::child(std::int64_t node, std::uint8_t byte) const
{
    const Node& parent = nodes_[static_cast<std::size_t>(node)];
    const auto first = nodes_.begin() + parent.first_child;
    const auto last = first + parent.children;
    const auto found = std::lower_bound(first, last, byte, [](const Node& n, std::uint8_t b) { return n.byte < b; });
    return found == last || found->byte != byte ? -1 : found - nodes_.begin();
}

std::optional<std::int32_t> UnigramModel::find(std::string_view piece) const
{
    std::int64_t node = 0;
    for (const char byte : piece)
        if ((node = child(node, static_cast<std::uint8_t>(byte))) < 0)
            return std::nullopt;
    const std::int32_t id = nodes_[static_cast<std::size_t>(node)].piece;
    return id < 0 ? std::nullopt : std::optional(id);
}

void UnigramModel::encode(std::string_view word, Scratch& scratch, std::vector<std::int32_t>& out) const
{
    auto& best = scratch.best;
    best.assign(word.size() + 1, {});
    const auto offer = [&](std::size_t begin, std::size_t end, double score, std::int32_t id) {
        const double sum = best[begin].score + score;
        if (best[end].begin < 0 || sum > best[end].score)
            best[end] = {sum, static_cast<std::int64_t>(begin), id};
    };
    for (std::size_t begin = 0, next = 0; begin < word.size(); begin = next) {
        next_code_point(word, next);
        bool single = false; // is this character a piece?
        std::int64_t node = 0;
        for (std::size_t end = begin; end < word.size();) {
            node = child(node, static_cast<std::uint8_t>(word[end++]));
            if (node < 0)
                break;
            const std::int32_t id = nodes_[static_cast<std::size_t>(node)].piece;
            if (id < 0)
                continue;
            offer(begin, end, scores_[static_cast<std::size_t>(id)], id);
            single = single || end == next;
        }
        if (!single)
            offer(begin, next, unknown_score_, unknown_);
    }
    // Backwards; a run of unknown characters is one token, which is looked up as a whole as Hugging Face does.
    auto& ids = scratch.ids;
    ids.clear();
    for (std::size_t end = word.size(); end > 0;) {
        auto begin = static_cast<std::size_t>(best[end].begin);
        std::int32_t id = best[end].id;
        if (id == unknown_) {
            while (begin > 0 && best[begin].id == unknown_)
                begin = static_cast<std::size_t>(best[begin].begin);
            id = find(word.substr(begin, end - begin)).value_or(unknown_);
        }
        ids.push_back(id);
        end = begin;
    }
    out.insert(out.end(), ids.rbegin(), ids.rend());
}

} // namespace selm::text
