#include "selm/shard/flat_layout.hpp"

#include <algorithm>

#include "selm/base/error.hpp"

namespace selm {

namespace {

std::size_t round_up(std::size_t value, std::size_t multiple)
{
    return (value + multiple - 1) / multiple * multiple;
}

/// Where [begin, end) of the flat space meets a piece.
ShardInfo intersection(std::size_t begin, std::size_t end, ShardInfo piece)
{
    const std::size_t low = std::max(begin, piece.offset);
    const std::size_t high = std::min(end, piece.offset + piece.size);
    return low < high ? ShardInfo{low, high - low} : ShardInfo{begin, 0};
}

} // namespace

FlatLayout::FlatLayout(std::span<const ParameterSpec> parameters, int ranks, const FlatLayoutOptions& options)
    : alignment_(options.alignment), ranks_(ranks)
{
    SELM_EXPECT(ranks >= 1 && options.alignment >= 1);
    SELM_EXPECT(options.frozen.empty() || options.frozen.size() == parameters.size());
    const auto is_frozen = [&](std::size_t parameter) { return !options.frozen.empty() && options.frozen[parameter]; };
    auto group_end = options.group_ends.begin();
    for (std::size_t i = 0; i < parameters.size(); ++i) {
        const std::size_t size = round_up(static_cast<std::size_t>(parameters[i].elements()), alignment_);
        while (group_end != options.group_ends.end() && *group_end < static_cast<std::int64_t>(i))
            ++group_end;
        const bool group_begins = group_end != options.group_ends.end() && *group_end == static_cast<std::int64_t>(i);
        const bool full = !units_.empty() && options.bucket > 0 && units_.back().flat.size + size > options.bucket;
        if (units_.empty() || group_begins || full || units_.back().frozen != is_frozen(i))
            units_.push_back({i, 0, {total_, 0}, is_frozen(i)});
        offsets_.push_back(total_);
        unit_of_.push_back(units_.size() - 1);
        ++units_.back().parameters;
        units_.back().flat.size += size;
        total_ += size;
    }
}

ShardInfo FlatLayout::units_of_parameters(std::size_t first, std::size_t end) const
{
    SELM_EXPECT(first < end && end <= parameters());
    return {unit_of_[first], unit_of_[end - 1] - unit_of_[first] + 1};
}

std::size_t FlatLayout::shard_size(std::size_t unit) const
{
    const auto n = static_cast<std::size_t>(ranks_);
    return round_up((units_[unit].flat.size + n - 1) / n, alignment_);
}

ShardInfo FlatLayout::shard(std::size_t unit, int rank) const
{
    SELM_EXPECT(unit < units() && rank >= 0 && rank < ranks_);
    const ShardInfo whole = units_[unit].flat;
    const std::size_t begin = std::min(whole.size, static_cast<std::size_t>(rank) * shard_size(unit));
    return {whole.offset + begin, std::min(shard_size(unit), whole.size - begin)};
}

std::vector<std::size_t> FlatLayout::shard_offsets(std::size_t unit) const
{
    std::vector<std::size_t> offsets;
    for (std::size_t rank = 0; rank <= static_cast<std::size_t>(ranks_); ++rank)
        offsets.push_back(std::min(units_[unit].flat.size, rank * shard_size(unit)));
    return offsets;
}

std::size_t FlatLayout::shard_elements(int rank, bool trained_only) const
{
    std::size_t elements = 0;
    for (std::size_t u = 0; u < units(); ++u)
        if (!trained_only || !units_[u].frozen)
            elements += shard(u, rank).size;
    return elements;
}

std::vector<ShardInfo> rank_pieces(const FlatLayout& layout, int rank)
{
    std::vector<ShardInfo> pieces;
    for (std::size_t u = 0; u < layout.units(); ++u)
        pieces.push_back(layout.shard(u, rank));
    return pieces;
}

std::vector<ShardInfo> whole_pieces(const FlatLayout& layout)
{
    std::vector<ShardInfo> pieces;
    for (std::size_t u = 0; u < layout.units(); ++u)
        pieces.push_back(layout.unit(u).flat);
    return pieces;
}

std::vector<ParameterSlice> parameter_slices(std::span<const ParameterSpec> parameters, const FlatLayout& layout,
                                             std::span<const ShardInfo> pieces)
{
    SELM_EXPECT(parameters.size() == layout.parameters() && pieces.size() == layout.units());
    std::vector<ParameterSlice> slices;
    for (std::size_t i = 0; i < parameters.size(); ++i) {
        const std::size_t begin = layout.offset(i);
        const std::size_t unit = layout.unit_of(i);
        const ShardInfo held =
            intersection(begin, begin + static_cast<std::size_t>(parameters[i].elements()), pieces[unit]);
        const std::size_t in_piece = held.size > 0 ? held.offset - pieces[unit].offset : 0;
        slices.push_back({i, unit, in_piece, held.offset - begin, held.size});
    }
    return slices;
}

std::vector<PartSlice> part_slices(std::span<const ParameterSpec> parameters, const FlatLayout& layout,
                                   std::span<const ShardInfo> pieces)
{
    SELM_EXPECT(parameters.size() == layout.parameters() && pieces.size() == layout.units());
    std::vector<PartSlice> slices;
    for (std::size_t i = 0; i < parameters.size(); ++i) {
        const auto columns = static_cast<std::size_t>(parameters[i].columns);
        const std::size_t unit = layout.unit_of(i);
        for (const ParameterSpec::Part& part : parameters[i].parts) {
            const std::size_t begin = layout.offset(i) + static_cast<std::size_t>(part.row_begin) * columns;
            const std::size_t end = begin + static_cast<std::size_t>(part.rows) * columns;
            const ShardInfo held = intersection(begin, end, pieces[unit]);
            const std::size_t in_piece = held.size > 0 ? held.offset - pieces[unit].offset : 0;
            slices.push_back({&part, unit, in_piece, held.offset - begin, held.size});
        }
    }
    return slices;
}

} // namespace selm
