#include "selm/shard/flat_layout.hpp"

#include <gtest/gtest.h>

#include "selm/comm/communicator.hpp"
#include "shard_test_support.hpp"

namespace selm {
namespace {

TEST(FlatLayout, ParametersAreAlignedAndDoNotOverlap)
{
    const auto parameters = test::toy_parameters();
    const FlatLayout layout(parameters, 3);
    std::size_t end = 0;
    for (std::size_t i = 0; i < parameters.size(); ++i) {
        EXPECT_EQ(layout.offset(i) % 64, 0U);
        EXPECT_GE(layout.offset(i), end);
        EXPECT_LT(layout.offset(i) - end, 64U);
        end = layout.offset(i) + static_cast<std::size_t>(parameters[i].elements());
    }
    EXPECT_GE(layout.total(), end);
    EXPECT_EQ(layout.total() % 64, 0U);
}

TEST(FlatLayout, PlacesDependNeitherOnRanksNorOnUnits)
{
    const auto parameters = test::toy_parameters();
    const FlatLayout one(parameters, 1);
    const FlatLayout many(parameters, 4096, {.bucket = 512, .group_ends = test::toy_groups()});
    EXPECT_EQ(one.total(), many.total());
    for (std::size_t i = 0; i < parameters.size(); ++i)
        EXPECT_EQ(one.offset(i), many.offset(i));
}

TEST(FlatLayout, UnitsEndWhereGroupsEndBucketsAreFullOrParametersAreFrozen)
{
    const auto parameters = test::toy_parameters();
    const auto units = [&](const FlatLayoutOptions& options) {
        const FlatLayout layout(parameters, 2, options);
        std::vector<std::size_t> ends;
        for (std::size_t u = 0; u < layout.units(); ++u) {
            EXPECT_EQ(layout.unit(u).flat.offset, layout.offset(layout.unit(u).first));
            ends.push_back(layout.unit(u).first + layout.unit(u).parameters);
        }
        return ends;
    };
    using Ends = std::vector<std::size_t>;
    EXPECT_EQ(units({}), (Ends{14}));
    EXPECT_EQ(units({.group_ends = test::toy_groups()}), (Ends{1, 7, 13, 14}));
    // Sizes, aligned: 448 | 64 256 192 64 512 256 | the same | 64
    EXPECT_EQ(units({.bucket = 512, .group_ends = test::toy_groups()}), (Ends{1, 4, 5, 6, 7, 10, 11, 12, 13, 14}));
    EXPECT_EQ(units({.bucket = 1, .group_ends = test::toy_groups()}).size(), parameters.size());
    std::vector<bool> frozen(parameters.size(), false);
    frozen[0] = frozen[3] = true;
    EXPECT_EQ(units({.group_ends = test::toy_groups(), .frozen = frozen}), (Ends{1, 3, 4, 7, 13, 14}));
    const FlatLayout layout(parameters, 2, {.group_ends = test::toy_groups(), .frozen = frozen});
    EXPECT_TRUE(layout.unit(0).frozen);
    EXPECT_FALSE(layout.unit(1).frozen);
    EXPECT_EQ(layout.units_of_parameters(1, 7).offset, 1U);
    EXPECT_EQ(layout.units_of_parameters(1, 7).size, 3U);
}

class FlatLayoutRanks : public ::testing::TestWithParam<int> {};

TEST_P(FlatLayoutRanks, ShardsPartitionEveryUnitAndPartSlicesCoverEveryTensor)
{
    const int ranks = GetParam();
    const auto parameters = test::toy_parameters();
    const FlatLayout layout(parameters, ranks, {.bucket = 512, .group_ends = test::toy_groups()});
    std::vector<std::size_t> next(layout.units()), covered;
    for (std::size_t u = 0; u < layout.units(); ++u)
        next[u] = layout.unit(u).flat.offset;
    for (int rank = 0; rank < ranks; ++rank) {
        const auto comm = make_dry_run_communicator(rank, ranks);
        const auto pieces = rank_pieces(layout, comm->rank());
        for (std::size_t u = 0; u < layout.units(); ++u) {
            EXPECT_EQ(pieces[u].offset, next[u]);
            EXPECT_EQ(pieces[u].offset % 64, 0U);
            EXPECT_EQ(pieces[u].offset - layout.unit(u).flat.offset,
                      layout.shard_offsets(u)[static_cast<std::size_t>(rank)]);
            next[u] += pieces[u].size;
        }
        const auto slices = part_slices(parameters, layout, pieces);
        covered.resize(slices.size(), 0);
        for (std::size_t i = 0; i < slices.size(); ++i) {
            if (slices[i].count == 0)
                continue;
            EXPECT_EQ(slices[i].part_begin, covered[i]); // ranks hold consecutive stretches of a part
            EXPECT_LE(slices[i].piece_begin + slices[i].count, pieces[slices[i].unit].size);
            covered[i] += slices[i].count;
        }
    }
    for (std::size_t u = 0; u < layout.units(); ++u)
        EXPECT_EQ(next[u], layout.unit(u).flat.offset + layout.unit(u).flat.size);
    const auto slices = part_slices(parameters, layout, whole_pieces(layout));
    for (std::size_t i = 0; i < slices.size(); ++i)
        EXPECT_EQ(covered[i], slices[i].count) << slices[i].part->name;
}

INSTANTIATE_TEST_SUITE_P(DryRun, FlatLayoutRanks, ::testing::Values(1, 2, 3, 8, 512, 4096));

TEST(FlatLayout, FusedParametersKeepTheirPartsApart)
{
    const auto parameters = test::toy_parameters();
    const FlatLayout layout(parameters, 1, {.group_ends = test::toy_groups()});
    const auto slices = part_slices(parameters, layout, whole_pieces(layout));
    ASSERT_EQ(slices.size(), 1U + 2 * 9 + 1); // embedding, nine tensors a layer, the final norm
    EXPECT_EQ(slices[3].part->name, "model.layers.0.self_attn.k_proj.weight");
    EXPECT_EQ(slices[3].unit, 1U);
    // After the norm and the 12 rows of the queries, 12 columns each.
    EXPECT_EQ(slices[3].piece_begin, 64U + 12U * 12U);
    EXPECT_EQ(slices[3].count, 4U * 12U);
}

TEST(NodeMap, EveryShardReachesEveryOtherNodeOnce)
{
    for (const int ranks : {1, 8, 512, 4096})
        for (const int per_node : {1, 3, 8, 128}) {
            std::vector<int> node_of_rank;
            for (int rank = 0; rank < ranks; ++rank)
                node_of_rank.push_back(1000 - rank / per_node); // any numbers
            const NodeMap map(node_of_rank);
            ASSERT_EQ(map.nodes(), (ranks + per_node - 1) / per_node);
            std::vector<int> load(static_cast<std::size_t>(ranks), 0);
            for (int sender = 0; sender < ranks; ++sender)
                for (int node = 0; node < map.nodes(); ++node) {
                    if (node == map.node_of(sender))
                        continue;
                    const int receiver = map.receiver(sender, node);
                    EXPECT_EQ(map.node_of(receiver), node);
                    ++load[static_cast<std::size_t>(receiver)];
                }
            // The ranks of a full node share the receiving evenly, but for the last node's senders.
            if (map.nodes() > 1 && ranks % per_node == 0) {
                EXPECT_EQ(*std::min_element(load.begin(), load.end()), *std::max_element(load.begin(), load.end()));
            }
        }
}

} // namespace
} // namespace selm
