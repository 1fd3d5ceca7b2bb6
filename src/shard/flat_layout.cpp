#include "selm/shard/flat_layout.hpp"

#include <algorithm>

#include "selm/base/error.hpp"

namespace selm {

namespace {

std::size_t round_up(std::size_t value, std::size_t multiple)
{
    return (value + multiple - 1) / multiple * multiple;
}

} // namespace

FlatLayout::FlatLayout(std::span<const ParameterSpec> parameters, int ranks, std::size_t alignment)
    : alignment_(alignment)
{
    SELM_EXPECT(ranks >= 1 && alignment >= 1);
    offsets_.reserve(parameters.size());
    for (const ParameterSpec& parameter : parameters) {
        offsets_.push_back(total_);
        total_ += round_up(static_cast<std::size_t>(parameter.elements()), alignment);
    }
    const auto n = static_cast<std::size_t>(ranks);
    const std::size_t shard_size = round_up((total_ + n - 1) / n, alignment);
    shard_offsets_.reserve(n + 1);
    for (std::size_t rank = 0; rank <= n; ++rank)
        shard_offsets_.push_back(std::min(total_, rank * shard_size));
}

ShardInfo FlatLayout::shard(int rank) const
{
    SELM_EXPECT(rank >= 0 && rank < ranks());
    const auto r = static_cast<std::size_t>(rank);
    return {shard_offsets_[r], shard_offsets_[r + 1] - shard_offsets_[r]};
}

std::vector<PartSlice> part_slices(std::span<const ParameterSpec> parameters, const FlatLayout& layout, ShardInfo shard)
{
    SELM_EXPECT(parameters.size() == layout.parameters());
    std::vector<PartSlice> slices;
    for (std::size_t i = 0; i < parameters.size(); ++i) {
        const auto columns = static_cast<std::size_t>(parameters[i].columns);
        for (const ParameterSpec::Part& part : parameters[i].parts) {
            const std::size_t begin = layout.offset(i) + static_cast<std::size_t>(part.row_begin) * columns;
            const std::size_t end = begin + static_cast<std::size_t>(part.rows) * columns;
            const std::size_t low = std::max(begin, shard.offset);
            const std::size_t high = std::min(end, shard.offset + shard.size);
            if (low < high)
                slices.push_back({&part, low - begin, low - shard.offset, high - low});
            else
                slices.push_back({&part, 0, 0, 0});
        }
    }
    return slices;
}

} // namespace selm
