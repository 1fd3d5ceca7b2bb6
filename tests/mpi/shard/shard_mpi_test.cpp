#include <algorithm>
#include <cmath>
#include <filesystem>

#include <gtest/gtest.h>

#include "mpi_test.hpp"
#include "selm/kernels/engine.hpp"
#include "selm/shard/checkpoint.hpp"
#include "selm/shard/optimizer.hpp"
#include "../../unit/shard/shard_test_support.hpp"

namespace selm {
namespace {

constexpr std::uint32_t steps = 4;

struct Trained {
    std::vector<float> weights; ///< of all ranks, flat
    std::vector<double> norms;
};

/// Four steps; each rank contributes another gradient.
Trained train(Communicator& comm, const test::ToyTraining::Options& options, Communicator* node = nullptr, int passes = 1)
{
    test::ToyTraining toy(comm, options, node);
    toy.fill(test::toy_flat(toy.parameters, toy.layout, 11));
    Trained out;
    for (std::uint32_t step = 0; step < steps; ++step)
        out.norms.push_back(
            toy.step(0.01, test::toy_flat(toy.parameters, toy.layout, 100 + 10 * step + static_cast<std::uint32_t>(comm.rank())),
                     passes));
    out.weights = toy.master();
    if (toy.shared && !options.optimizer.round_bf16) {
        EXPECT_EQ(toy.compute(), out.weights);
    }
    if (toy.shared && options.optimizer.round_bf16) {
        std::vector<float> rounded = out.weights;
        round_to_bf16(rounded);
        EXPECT_EQ(toy.compute(), rounded);
    }
    comm.barrier("before the weights go");
    return out;
}

test::ToyTraining::Options of_stage(int stage, bool bf16 = false)
{
    return {.optimizer = {.stage = stage, .max_grad_norm = 0.5, .round_bf16 = bf16}};
}

TEST(ShardedAdamWMpi, AllStagesGiveTheSameBitsInOnePass)
{
    Communicator& comm = test::test_world();
    const Trained zero = train(comm, of_stage(0));
    for (const int stage : {1, 2, 3}) {
        const Trained other = train(comm, of_stage(stage));
        EXPECT_EQ(zero.weights, other.weights) << stage;
        EXPECT_EQ(zero.norms, other.norms) << stage;
    }
}

TEST(ShardedAdamWMpi, BucketsDoNotChangeTheWeights)
{
    Communicator& comm = test::test_world();
    const Trained whole = train(comm, of_stage(2));
    for (const int stage : {1, 2, 3})
        for (const std::size_t bucket : {1, 300, 5000}) {
            auto options = of_stage(stage);
            options.layout.bucket = bucket;
            const Trained cut = train(comm, options);
            for (std::size_t i = 0; i < whole.weights.size(); ++i) // the norm is summed in another order
                ASSERT_NEAR(whole.weights[i], cut.weights[i], 1e-7) << stage << " " << bucket;
        }
}

TEST(ShardedAdamWMpi, SeveralPassesGiveTheSameSums)
{
    Communicator& comm = test::test_world();
    const Trained one = train(comm, of_stage(1));
    for (const int stage : {0, 1, 2, 3}) {
        const Trained four = train(comm, of_stage(stage), nullptr, 4); // a quarter is exact: only sums round
        for (std::size_t i = 0; i < one.weights.size(); ++i)
            ASSERT_NEAR(one.weights[i], four.weights[i], 1e-6) << stage;
    }
}

TEST(ShardedAdamWMpi, Bf16GradientsAreTheRoundedOnesSummedInFp32)
{
    Communicator& comm = test::test_world();
    for (const int stage : {1, 2, 3}) {
        auto options = of_stage(stage);
        options.accumulate = DType::bf16;
        test::ToyTraining toy(comm, options);
        const auto flat_of = [&](int rank) {
            return test::toy_flat(toy.parameters, toy.layout, 100 + static_cast<std::uint32_t>(rank));
        };
        toy.reduce(flat_of(comm.rank()));
        std::vector<float> expected(toy.layout.total(), 0.0F);
        for (int rank = 0; rank < comm.size(); ++rank) {
            auto theirs = flat_of(rank);
            round_to_bf16(theirs);
            for (std::size_t i = 0; i < expected.size(); ++i)
                expected[i] += theirs[i];
        }
        for (std::size_t u = 0; u < toy.layout.units(); ++u) {
            const auto piece = toy.gradient.piece(u);
            for (std::size_t i = 0; i < piece.size(); ++i)
                ASSERT_EQ(piece[i], expected[toy.optimizer.pieces()[u].offset + i]);
        }
    }
}

TEST(ShardedAdamWMpi, SharedWeightsGiveTheSameBits)
{
    Communicator& comm = test::test_world();
    const Trained own = train(comm, of_stage(1));
    const auto node = comm.split_node("node");
    const auto pairs = comm.split_node("pairs of ranks as nodes", 2);
    const auto alone = make_single_communicator(); // as if every rank were on a node of its own
    for (Communicator* const ranks_of_node : {node.get(), pairs.get(), alone.get()})
        for (const int stage : {1, 2})
            for (const bool bf16 : {false, true}) {
                const Trained shared = train(comm, of_stage(stage, bf16), ranks_of_node);
                EXPECT_EQ(shared.weights, own.weights); // gradients do not depend on the weights here
                EXPECT_EQ(shared.norms, own.norms);
            }
}

TEST(ShardedAdamWMpi, MemoryIsCutByStage)
{
    Communicator& comm = test::test_world();
    const auto node = comm.split_node("node");
    for (const int stage : {0, 1, 2, 3})
        for (const bool bf16 : {false, true}) {
            test::ToyTraining toy(comm, of_stage(stage, bf16), stage == 0 ? nullptr : node.get());
            const auto mine = static_cast<std::int64_t>(stage == 0 ? toy.layout.total() : toy.layout.shard_elements(comm.rank(), false));
            EXPECT_EQ(toy.optimizer.bytes(), 4 * mine * (bf16 || stage == 3 ? 3 : 2));
            const auto shard = static_cast<std::int64_t>(toy.layout.shard_elements(comm.rank(), false));
            EXPECT_EQ(toy.gradient.bytes(), 4 * (shard + (stage <= 1 ? static_cast<std::int64_t>(toy.layout.total()) : 0)));
            comm.barrier("before the weights go");
        }
}

TEST(ShardedAdamWMpi, EqualsOneRankWithTheSummedGradient)
{
    Communicator& comm = test::test_world();
    const Trained many = train(comm, of_stage(2));
    const auto single = make_single_communicator();
    test::ToyTraining one(*single, of_stage(1));
    one.fill(test::toy_flat(one.parameters, one.layout, 11));
    for (std::uint32_t step = 0; step < steps; ++step) {
        std::vector<float> sum(one.layout.total(), 0.0F);
        for (int rank = 0; rank < comm.size(); ++rank) {
            const auto gradient =
                test::toy_flat(one.parameters, one.layout, 100 + 10 * step + static_cast<std::uint32_t>(rank));
            for (std::size_t i = 0; i < sum.size(); ++i)
                sum[i] += gradient[i]; // in rank order, as the reduction promises
        }
        const double norm = one.step(0.01, sum);
        EXPECT_NEAR(norm, many.norms[step], 1e-12 * norm); // only the order of the double sum differs
    }
    const auto weights = one.master();
    for (std::size_t i = 0; i < weights.size(); ++i)
        EXPECT_NEAR(weights[i], many.weights[i], 1e-7) << i;
}

TEST(CheckpointMpi, SavedOnManyRanksLoadedOnOneAndBack)
{
    Communicator& comm = test::test_world();
    const std::string directory =
        (std::filesystem::temp_directory_path() / ("selm_checkpoint_mpi_" + std::to_string(comm.size()))).string();
    if (comm.is_root())
        std::filesystem::remove_all(directory);
    comm.barrier("clean directory");
    const CheckpointBinding binding{{"recipe", "abc"}};

    test::ToyTraining toy(comm, {.optimizer = {.stage = 3}});
    CheckpointStore store(directory, 2, toy.parameters, toy.layout, comm);
    toy.fill(test::toy_flat(toy.parameters, toy.layout, 11));
    for (std::uint32_t step = 0; step < 3; ++step)
        toy.step(0.01,
                 test::toy_flat(toy.parameters, toy.layout, 100 + 10 * step + static_cast<std::uint32_t>(comm.rank())));
    store.save({.step = 3, .epoch = 0, .epoch_step = 3}, binding, toy.optimizer);
    const auto master = toy.master(), exp_avg = toy.gathered(&ShardedAdamW::exp_avg),
               exp_avg_sq = toy.gathered(&ShardedAdamW::exp_avg_sq);

    // Every rank by itself, as one rank, in stage 0 (whole state) and with other units.
    const auto single = make_single_communicator();
    test::ToyTraining alone(*single, {.optimizer = {.stage = 0}, .layout = {.bucket = 300}});
    CheckpointStore single_store(directory, 2, alone.parameters, alone.layout, *single);
    ASSERT_TRUE(single_store.load_latest(binding, alone.optimizer).has_value());
    EXPECT_EQ(alone.master(), master);
    EXPECT_EQ(alone.gathered(&ShardedAdamW::exp_avg), exp_avg);
    EXPECT_EQ(alone.gathered(&ShardedAdamW::exp_avg_sq), exp_avg_sq);
    comm.barrier("all have read");

    // One rank writes, all read, at every stage.
    if (comm.is_root())
        single_store.save({.step = 4, .epoch = 0, .epoch_step = 4}, binding, alone.optimizer);
    comm.barrier("written");
    for (const int stage : {0, 1, 2, 3}) {
        test::ToyTraining again(comm, {.optimizer = {.stage = stage}});
        CheckpointStore again_store(directory, 2, again.parameters, again.layout, comm);
        const auto state = again_store.load_latest(binding, again.optimizer);
        ASSERT_TRUE(state.has_value());
        EXPECT_EQ(state->step, 4);
        EXPECT_EQ(again.optimizer.steps_done(), 3);
        EXPECT_EQ(again.master(), master);
        EXPECT_EQ(again.gathered(&ShardedAdamW::exp_avg_sq), exp_avg_sq);
    }
    comm.barrier("done");
    if (comm.is_root())
        std::filesystem::remove_all(directory);
}

} // namespace
} // namespace selm
