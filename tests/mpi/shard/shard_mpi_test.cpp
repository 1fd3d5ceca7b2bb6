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

struct Trained {
    std::vector<float> compute;
    std::vector<double> norms;
};

/// Four steps; each rank contributes another gradient.
Trained train(Communicator& comm, const std::vector<ParameterSpec>& parameters, int stage)
{
    const FlatLayout layout(parameters, comm.size());
    ShardedAdamW optimizer(layout, comm, {.stage = stage, .max_grad_norm = 0.5});
    test::fill_state(optimizer, test::toy_flat(parameters, layout, 11));
    Trained out;
    out.compute.resize(layout.total());
    for (std::uint32_t step = 0; step < 4; ++step) {
        const auto gradient =
            test::toy_flat(parameters, layout, 100 + 10 * step + static_cast<std::uint32_t>(comm.rank()));
        out.norms.push_back(optimizer.reduce(gradient));
        optimizer.apply(0.01, out.compute);
    }
    return out;
}

TEST(ShardedAdamWMpi, StageZeroAndOneGiveTheSameBits)
{
    Communicator& comm = test::test_world();
    const auto parameters = test::toy_parameters();
    const Trained zero = train(comm, parameters, 0);
    const Trained one = train(comm, parameters, 1);
    EXPECT_EQ(zero.compute, one.compute);
    EXPECT_EQ(zero.norms, one.norms);
}

/// The same steps with weights that the ranks of `node` share.
Trained train_shared(Communicator& comm, Communicator& node, const std::vector<ParameterSpec>& parameters, bool bf16)
{
    const FlatLayout layout(parameters, comm.size());
    SharedWeights weights(layout, comm, node);
    ShardedAdamW optimizer(layout, comm, {.max_grad_norm = 0.5, .round_bf16 = bf16}, &weights);
    test::fill_state(optimizer, test::toy_flat(parameters, layout, 11));
    optimizer.publish(weights.values());
    Trained out;
    for (std::uint32_t step = 0; step < 4; ++step) {
        const auto gradient =
            test::toy_flat(parameters, layout, 100 + 10 * step + static_cast<std::uint32_t>(comm.rank()));
        out.norms.push_back(optimizer.reduce(gradient));
        optimizer.apply(0.01, weights.values());
    }
    out.compute.assign(weights.values().begin(), weights.values().end());
    // Master weights of fp32 are the shared ones: only moments and the reduced gradient are the rank's own.
    const auto shard = static_cast<std::int64_t>(optimizer.state_shard().size * sizeof(float));
    EXPECT_EQ(optimizer.bytes(), (bf16 ? 4 : 3) * shard);
    EXPECT_EQ(optimizer.master().data() == weights.values().data() + optimizer.state_shard().offset, !bf16);
    std::vector<float> full(layout.total());
    optimizer.gather_master(full);
    EXPECT_EQ(full == out.compute, !bf16);
    comm.barrier("before the weights go");
    return out;
}

TEST(ShardedAdamWMpi, SharedWeightsGiveTheSameBits)
{
    Communicator& comm = test::test_world();
    const auto parameters = test::toy_parameters();
    const Trained own = train(comm, parameters, 1);
    const auto node = comm.split_node("node");
    const auto alone = make_single_communicator(); // as if every rank were on a node of its own
    for (Communicator* const ranks_of_node : {node.get(), alone.get()}) {
        const Trained shared = train_shared(comm, *ranks_of_node, parameters, false);
        EXPECT_EQ(shared.compute, own.compute);
        EXPECT_EQ(shared.norms, own.norms);
        Trained rounded = train_shared(comm, *ranks_of_node, parameters, true);
        std::vector<float> expected = own.compute;
        round_to_bf16(expected);
        EXPECT_EQ(rounded.compute, expected); // gradients do not depend on the weights here
    }
}

TEST(ShardedAdamWMpi, EqualsOneRankWithTheSummedGradient)
{
    Communicator& comm = test::test_world();
    const auto parameters = test::toy_parameters();
    const Trained many = train(comm, parameters, 1);

    const auto single = make_single_communicator();
    const FlatLayout layout(parameters, 1);
    ShardedAdamW optimizer(layout, *single, {.stage = 1, .max_grad_norm = 0.5});
    test::fill_state(optimizer, test::toy_flat(parameters, layout, 11));
    std::vector<float> compute(layout.total());
    for (std::uint32_t step = 0; step < 4; ++step) {
        std::vector<float> sum(layout.total(), 0.0F);
        for (int rank = 0; rank < comm.size(); ++rank) {
            const auto gradient =
                test::toy_flat(parameters, layout, 100 + 10 * step + static_cast<std::uint32_t>(rank));
            for (std::size_t i = 0; i < sum.size(); ++i)
                sum[i] += gradient[i]; // in rank order, as the reduction promises
        }
        const double norm = optimizer.reduce(sum);
        EXPECT_NEAR(norm, many.norms[step], 1e-12 * norm); // only the order of the double sum differs
        optimizer.apply(0.01, compute);
    }
    for (std::size_t i = 0; i < compute.size(); ++i)
        EXPECT_NEAR(compute[i], many.compute[i], 1e-7) << i;
}

TEST(CheckpointMpi, SavedOnManyRanksLoadedOnOneAndBack)
{
    Communicator& comm = test::test_world();
    const auto parameters = test::toy_parameters();
    const std::string directory =
        (std::filesystem::temp_directory_path() / ("selm_checkpoint_mpi_" + std::to_string(comm.size()))).string();
    if (comm.is_root())
        std::filesystem::remove_all(directory);
    comm.barrier("clean directory");
    const CheckpointBinding binding{{"recipe", "abc"}};

    const FlatLayout layout(parameters, comm.size());
    CheckpointStore store(directory, 2, parameters, layout, comm);
    ShardedAdamW optimizer(layout, comm, {});
    test::fill_state(optimizer, test::toy_flat(parameters, layout, 11));
    std::vector<float> compute(layout.total());
    for (std::uint32_t step = 0; step < 3; ++step) {
        optimizer.reduce(test::toy_flat(parameters, layout, 100 + 10 * step + static_cast<std::uint32_t>(comm.rank())));
        optimizer.apply(0.01, compute);
    }
    store.save({.step = 3, .epoch = 0, .epoch_step = 3}, binding, optimizer);

    // Every rank by itself, as one rank and in stage 0 (whole state).
    const auto single = make_single_communicator();
    const FlatLayout single_layout(parameters, 1);
    CheckpointStore single_store(directory, 2, parameters, single_layout, *single);
    ShardedAdamW alone(single_layout, *single, {.stage = 0});
    ASSERT_TRUE(single_store.load_latest(binding, alone).has_value());
    EXPECT_TRUE(std::equal(compute.begin(), compute.end(), alone.master().begin()));
    const std::size_t skip = optimizer.state_shard().offset;
    for (std::size_t i = 0; i < optimizer.state_shard().size; ++i) {
        ASSERT_EQ(alone.exp_avg()[skip + i], optimizer.exp_avg()[i]);
        ASSERT_EQ(alone.exp_avg_sq()[skip + i], optimizer.exp_avg_sq()[i]);
    }
    comm.barrier("all have read");

    // One rank writes, all read.
    if (comm.is_root())
        single_store.save({.step = 4, .epoch = 0, .epoch_step = 4}, binding, alone);
    comm.barrier("written");
    for (const int stage : {0, 1}) {
        ShardedAdamW again(layout, comm, {.stage = stage});
        const auto state = store.load_latest(binding, again);
        ASSERT_TRUE(state.has_value());
        EXPECT_EQ(state->step, 4);
        EXPECT_EQ(again.steps_done(), 3);
        std::vector<float> published(layout.total());
        again.publish(published);
        EXPECT_EQ(published, compute);
    }
    comm.barrier("done");
    if (comm.is_root())
        std::filesystem::remove_all(directory);
}

} // namespace
} // namespace selm
