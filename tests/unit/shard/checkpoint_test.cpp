#include "selm/shard/checkpoint.hpp"

#include <filesystem>
#include <fstream>

#include <gtest/gtest.h>

#include "selm/base/error.hpp"
#include "selm/h5/file.hpp"
#include "shard_test_support.hpp"

namespace selm {
namespace {

namespace fs = std::filesystem;

class Checkpoint : public ::testing::Test {
  protected:
    /// An optimizer after `steps` steps, and its checkpoint.
    void save_steps(int steps)
    {
        test::ToyTraining toy(*comm, {});
        toy.fill(test::toy_flat(parameters, layout, 11));
        for (int step = 1; step <= steps; ++step)
            toy.step(0.01, test::toy_flat(parameters, layout, static_cast<std::uint32_t>(20 + step)));
        saved = toy.master();
        store.save({.step = steps, .epoch = 1, .epoch_step = steps - 1}, binding, toy.optimizer);
    }

    std::optional<CheckpointState> load(test::ToyTraining& toy) { return store.load_latest(binding, toy.optimizer); }

    std::vector<ParameterSpec> parameters = test::toy_parameters();
    FlatLayout layout{parameters, 1, {.group_ends = test::toy_groups()}};
    std::unique_ptr<Communicator> comm = make_single_communicator();
    test::TemporaryDirectory directory{"selm_checkpoint_test"};
    CheckpointStore store{directory.path() + "/checkpoints", 2, parameters, layout, *comm};
    CheckpointBinding binding{{"recipe", "abc"}, {"policy", "def"}};
    std::vector<float> saved;

    std::string file(int step, const char* end) const
    {
        return cat(directory.path(), "/checkpoints/step-00000", step, end);
    }
};

TEST_F(Checkpoint, RoundTripIsBitEqual)
{
    save_steps(3);
    test::ToyTraining toy(*comm, {});
    const auto state = load(toy);
    ASSERT_TRUE(state.has_value());
    EXPECT_EQ(state->step, 3);
    EXPECT_EQ(state->epoch, 1);
    EXPECT_EQ(state->epoch_step, 2);
    EXPECT_EQ(toy.optimizer.steps_done(), 3);
    EXPECT_EQ(toy.master(), saved);

    // The moments too: another step of both gives the same weights.
    test::ToyTraining uninterrupted(*comm, {});
    uninterrupted.fill(test::toy_flat(parameters, layout, 11));
    for (std::uint32_t step = 1; step <= 4; ++step)
        uninterrupted.step(0.01, test::toy_flat(parameters, layout, 20 + step));
    toy.step(0.01, test::toy_flat(parameters, layout, 24));
    EXPECT_EQ(toy.master(), uninterrupted.master());
}

TEST_F(Checkpoint, HoldsWholeTensorsByHuggingFaceName)
{
    save_steps(1);
    const h5::File file_h5 = h5::File::open(file(1, ".h5"));
    const auto values = file_h5.read<float>("/parameters/model.layers.1.self_attn.k_proj.weight/fp32");
    ASSERT_EQ(values.size(), 4U * 12U);
    const std::size_t begin = layout.offset(8) + 12 * 12;
    for (std::size_t i = 0; i < values.size(); ++i)
        EXPECT_EQ(values[i], saved[begin + i]);
    EXPECT_EQ(file_h5.string_attribute("/parameters/model.layers.1.self_attn.k_proj.weight", "shape"), "[4,12]");
    EXPECT_TRUE(file_h5.exists("/parameters/model.norm.weight/exp_avg_sq"));
}

TEST_F(Checkpoint, NoneIsNothing)
{
    test::ToyTraining toy(*comm, {});
    EXPECT_FALSE(load(toy).has_value());
    EXPECT_EQ(store.newest(), "");
}

TEST_F(Checkpoint, KeepsTheNewestTwo)
{
    for (const int steps : {1, 2, 3})
        save_steps(steps);
    EXPECT_FALSE(fs::exists(file(1, ".json")));
    EXPECT_FALSE(fs::exists(file(1, ".h5")));
    EXPECT_TRUE(fs::exists(file(2, ".json")));
    EXPECT_EQ(store.newest(), file(3, ".json"));
}

TEST_F(Checkpoint, ATornFileMeansThePreviousCheckpoint)
{
    save_steps(1);
    save_steps(2);
    fs::resize_file(file(2, ".h5"), fs::file_size(file(2, ".h5")) / 2);
    test::ToyTraining toy(*comm, {});
    const auto state = load(toy);
    ASSERT_TRUE(state.has_value());
    EXPECT_EQ(state->step, 1);
    EXPECT_EQ(toy.optimizer.steps_done(), 1);
}

TEST_F(Checkpoint, AFlippedValueIsFound)
{
    save_steps(1);
    const auto first = saved;
    save_steps(2);
    std::string bytes;
    {
        std::ifstream in(file(2, ".h5"), std::ios::binary);
        bytes.assign(std::istreambuf_iterator<char>(in), {});
    }
    // The first master weights of the embedding stand in the file as they are in memory.
    const std::string needle(reinterpret_cast<const char*>(saved.data()), 64);
    const std::size_t place = bytes.find(needle);
    ASSERT_NE(place, std::string::npos);
    bytes[place + 5] = static_cast<char>(bytes[place + 5] ^ 1);
    std::ofstream(file(2, ".h5"), std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    test::ToyTraining toy(*comm, {});
    const auto state = load(toy);
    ASSERT_TRUE(state.has_value());
    EXPECT_EQ(state->step, 1);
    EXPECT_EQ(toy.master(), first);
}

TEST_F(Checkpoint, WithoutManifestItDoesNotExist)
{
    save_steps(1);
    save_steps(2);
    fs::remove(file(2, ".json"));
    test::ToyTraining toy(*comm, {});
    ASSERT_EQ(load(toy)->step, 1);
}

TEST_F(Checkpoint, ADamagedManifestMeansThePreviousCheckpoint)
{
    save_steps(1);
    save_steps(2);
    fs::resize_file(file(2, ".json"), 40);
    test::ToyTraining toy(*comm, {});
    ASSERT_EQ(load(toy)->step, 1);
}

TEST_F(Checkpoint, WhenAllAreDamagedTheStateIsZero)
{
    save_steps(1);
    fs::resize_file(file(1, ".h5"), 100);
    test::ToyTraining toy(*comm, {});
    EXPECT_FALSE(load(toy).has_value());
    EXPECT_EQ(toy.optimizer.steps_done(), 0);
    for (const float value : toy.gathered(&ShardedAdamW::exp_avg))
        EXPECT_EQ(value, 0);
}

TEST_F(Checkpoint, AnotherRunsCheckpointIsRefusedNamingTheDifference)
{
    save_steps(1);
    binding[1].second = "other";
    test::ToyTraining toy(*comm, {});
    try {
        load(toy);
        FAIL() << "no error";
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::bad_data);
        EXPECT_NE(std::string(error.what()).find("its policy is def, this run's is other"), std::string::npos)
            << error.what();
    }
}

TEST_F(Checkpoint, AnotherShapeIsNotLoaded)
{
    save_steps(1);
    auto other = parameters;
    other[0].rows = 36;
    other[0].parts[0].rows = 36;
    other[0].parts[0].shape[0] = 36;
    const FlatLayout other_layout(other, 1);
    CheckpointStore other_store(directory.path() + "/checkpoints", 2, other, other_layout, *comm);
    SharedWeights weights(other_layout, *comm, *comm);
    ShardedAdamW optimizer(other_layout, *comm, {}, &weights);
    EXPECT_FALSE(other_store.load_latest(binding, optimizer).has_value());
}

} // namespace
} // namespace selm
