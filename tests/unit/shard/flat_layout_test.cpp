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

TEST(FlatLayout, PlacesDoNotDependOnTheNumberOfRanks)
{
    const auto parameters = test::toy_parameters();
    const FlatLayout one(parameters, 1);
    const FlatLayout many(parameters, 4096);
    EXPECT_EQ(one.total(), many.total());
    for (std::size_t i = 0; i < parameters.size(); ++i)
        EXPECT_EQ(one.offset(i), many.offset(i));
}

class FlatLayoutRanks : public ::testing::TestWithParam<int> {};

TEST_P(FlatLayoutRanks, ShardsPartitionTheSpaceAndPartSlicesCoverEveryTensor)
{
    const int ranks = GetParam();
    const auto parameters = test::toy_parameters();
    const FlatLayout layout(parameters, ranks);
    std::size_t next = 0;
    std::vector<std::size_t> covered;
    for (int rank = 0; rank < ranks; ++rank) {
        const auto comm = make_dry_run_communicator(rank, ranks);
        const ShardInfo shard = layout.shard(comm->rank());
        EXPECT_EQ(shard.offset, next);
        EXPECT_EQ(shard.offset % 64, 0U);
        next += shard.size;
        const auto slices = part_slices(parameters, layout, shard);
        covered.resize(slices.size(), 0);
        for (std::size_t i = 0; i < slices.size(); ++i) {
            if (slices[i].count == 0)
                continue;
            EXPECT_EQ(slices[i].part_begin, covered[i]); // ranks hold consecutive stretches of a part
            EXPECT_LE(slices[i].shard_begin + slices[i].count, shard.size);
            covered[i] += slices[i].count;
        }
    }
    EXPECT_EQ(next, layout.total());
    const auto slices = part_slices(parameters, layout, {0, layout.total()});
    for (std::size_t i = 0; i < slices.size(); ++i)
        EXPECT_EQ(covered[i], slices[i].count) << slices[i].part->name;
}

INSTANTIATE_TEST_SUITE_P(DryRun, FlatLayoutRanks, ::testing::Values(1, 2, 3, 8, 512, 4096));

TEST(FlatLayout, FusedParametersKeepTheirPartsApart)
{
    const auto parameters = test::toy_parameters();
    const FlatLayout layout(parameters, 1);
    const auto slices = part_slices(parameters, layout, {0, layout.total()});
    ASSERT_EQ(slices.size(), 1U + 2 * 9 + 1); // embedding, nine tensors a layer, the final norm
    EXPECT_EQ(slices[3].part->name, "model.layers.0.self_attn.k_proj.weight");
    EXPECT_EQ(slices[3].shard_begin, layout.offset(2) + 12 * 12); // after the 12 rows of the queries, 12 columns each
    EXPECT_EQ(slices[3].count, 4U * 12U);
}

} // namespace
} // namespace selm
