#include "dry_run_memory.hpp"

#include <gtest/gtest.h>

#include "selm/base/error.hpp"

namespace selm {
namespace {

using Shards = std::vector<ShardInfo>;

std::string refusal(std::size_t total, std::size_t alignment, const Shards& shards)
{
    try {
        check_shards(total, alignment, shards);
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::internal);
        return error.what();
    }
    return "";
}

TEST(DryRun, ShardsThatCoverEverythingOnceAreAccepted)
{
    const ShardBalance balance = check_shards(200, 64, Shards{{0, 64}, {64, 64}, {128, 64}, {192, 8}});
    EXPECT_EQ(balance.largest, 64U);
    EXPECT_EQ(balance.smallest, 8U);
    EXPECT_EQ(check_shards(64, 64, Shards{{0, 64}, {64, 0}, {64, 0}}).smallest, 0U); // more ranks than aligned blocks
}

TEST(DryRun, WrongShardsAreRefused)
{
    EXPECT_NE(refusal(128, 64, {{0, 64}, {80, 48}}).find("rank 1"), std::string::npos);  // gap
    EXPECT_NE(refusal(128, 64, {{0, 64}, {32, 96}}).find("two"), std::string::npos);     // overlap
    EXPECT_NE(refusal(192, 64, {{0, 64}, {64, 64}}).find("128 of 192"), std::string::npos); // the end has no owner
    EXPECT_NE(refusal(256, 64, {{0, 192}, {192, 64}}).find("equal share"), std::string::npos);
}

TEST(DryRun, ShardMapsOfManyRanksHold)
{
    DecoderConfig config;
    config.model_type = "llama";
    config.vocabulary = 3201; // odd sizes: parameters are padded, tensors cross shards
    config.hidden = 72;
    config.intermediate = 100;
    config.layers = 3;
    config.heads = 6;
    config.kv_heads = 3;
    config.head_dim = 12;
    config.max_positions = 64;
    const auto parameters = decoder_parameters(config);
    for (const int ranks : {1, 2, 3, 64, 1000, 4096}) {
        const FlatLayout layout(parameters, ranks);
        EXPECT_NO_THROW(check_shards(layout)) << ranks;
        EXPECT_NO_THROW(check_tensor_slices(parameters, layout)) << ranks;
    }
}

TEST(DryRun, ARowThatExceedsTheBudgetCounts)
{
    EncodingOptions encoding;
    encoding.max_length = 1024;
    EXPECT_EQ(most_tokens(2048, encoding, 1024), 3072);
    EXPECT_EQ(most_tokens(8192, encoding, 1024), 8192);
    encoding.encoding = "recipe"; // a middle-ranked answer is not cut
    EXPECT_EQ(most_tokens(2048, encoding, 1024), 4096);
}

TEST(DryRun, ANodeHoldsSharedPartsOnce)
{
    const PhaseMemory memory{"generate", {{"keys and values", 10}, {"logits", 3}}, {{"weights", 1000}}, {}};
    EXPECT_EQ(memory.rank_bytes(), 13);
    EXPECT_EQ(memory.node_bytes(64), 1000 + 64 * 13);
}

} // namespace
} // namespace selm
