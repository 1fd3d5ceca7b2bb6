#include "selm/model/packed.hpp"

#include "selm/base/error.hpp"

namespace selm {
namespace {

/// Appends tokens at consecutive positions as one segment; returns the index of the first token.
std::int64_t append(PackedBatch& batch, std::span<const std::int32_t> tokens, std::int64_t position, std::int64_t trunk)
{
    const auto begin = static_cast<std::int64_t>(batch.tokens.size());
    batch.tokens.insert(batch.tokens.end(), tokens.begin(), tokens.end());
    for (std::size_t i = 0; i < tokens.size(); ++i)
        batch.positions.push_back(static_cast<std::int32_t>(position + static_cast<std::int64_t>(i)));
    if (!tokens.empty())
        batch.segments.push_back({begin, static_cast<std::int64_t>(tokens.size()), trunk});
    return begin;
}

struct Trunk {
    std::int64_t segment = -1;
    std::int64_t last_token = -1;
    std::int64_t length = 0;
};

Trunk append_trunk(PackedBatch& batch, std::span<const std::int32_t> tokens)
{
    if (tokens.empty())
        return {};
    const auto segment = static_cast<std::int64_t>(batch.segments.size());
    const auto length = static_cast<std::int64_t>(tokens.size());
    return {segment, append(batch, tokens, 0, -1) + length - 1, length};
}

} // namespace

void PackedBatch::add_scored(std::span<const std::int32_t> trunk_tokens, std::span<const Branch> row_branches)
{
    const Trunk trunk = append_trunk(*this, trunk_tokens);
    for (const Branch& branch : row_branches) {
        const auto length = static_cast<std::int64_t>(branch.tokens.size());
        SELM_EXPECT(branch.unscored >= (trunk.length == 0 ? 1 : 0) && branch.unscored <= length);
        const std::int64_t begin = append(*this, branch.tokens, trunk.length, trunk.segment);
        for (std::int64_t i = branch.unscored; i < length; ++i) {
            selected.push_back(i == 0 ? trunk.last_token : begin + i - 1);
            targets.push_back(branch.tokens[static_cast<std::size_t>(i)]);
            owner.push_back(branches);
        }
        ++branches;
    }
}

void PackedBatch::add_last_token(std::span<const std::int32_t> trunk_tokens, std::span<const Branch> row_branches)
{
    SELM_EXPECT(!trunk_tokens.empty());
    const Trunk trunk = append_trunk(*this, trunk_tokens);
    for (const Branch& branch : row_branches) {
        const auto length = static_cast<std::int64_t>(branch.tokens.size());
        const std::int64_t begin = append(*this, branch.tokens, trunk.length, trunk.segment);
        selected.push_back(length == 0 ? trunk.last_token : begin + length - 1);
        targets.push_back(-1);
        owner.push_back(branches++);
    }
}

} // namespace selm
