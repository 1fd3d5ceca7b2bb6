#include "selm/shard/checkpoint.hpp"

#include <csignal>
#include <filesystem>
#include <functional>

#include <gtest/gtest.h>
#include <sys/resource.h>

#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
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
        saved_exp_avg = toy.gathered(&ShardedAdamW::exp_avg);
        saved_exp_avg_sq = toy.gathered(&ShardedAdamW::exp_avg_sq);
        store.save({.step = steps, .epoch = 1, .epoch_step = steps - 1, .numerics = "toy"}, binding, toy.optimizer);
    }

    std::optional<CheckpointState> load(test::ToyTraining& toy) { return store.load_latest(binding, toy.optimizer); }

    std::vector<ParameterSpec> parameters = test::toy_parameters();
    FlatLayout layout{parameters, 1, {.group_ends = test::toy_groups()}};
    std::unique_ptr<Communicator> comm = make_single_communicator();
    test::TemporaryDirectory directory{"selm_checkpoint_test"};
    CheckpointStore store{directory.path() + "/checkpoints", 2, parameters, layout, *comm};
    CheckpointBinding binding{{"recipe", "abc"}, {"policy", "def"}};
    std::vector<float> saved, saved_exp_avg, saved_exp_avg_sq;

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
    EXPECT_EQ(state->numerics, "toy");
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

/// What can befall the checkpoint of step 2, and words of the warning that names it.
struct Damage {
    const char* name;
    std::function<void(const std::string& stem, const std::vector<float>& fp32, const std::vector<float>& exp_avg,
                       const std::vector<float>& exp_avg_sq)>
        apply;
    std::vector<std::string> words;
};

/// Flips one bit of the tensor that begins with these values: they stand in the file as they are in memory.
void flip_value(const std::string& path, const std::vector<float>& values)
{
    std::string bytes = read_file(path);
    const std::size_t place = bytes.find(std::string(reinterpret_cast<const char*>(values.data()), 64));
    ASSERT_NE(place, std::string::npos);
    test::flip_bit(path, place + 5, 0);
}

std::vector<Damage> damages()
{
    using Values = const std::vector<float>&;
    using Stem = const std::string&;
    return {
        {"StateFileCut",
         [](Stem stem, Values, Values, Values) { fs::resize_file(stem + ".h5", fs::file_size(stem + ".h5") / 2); },
         {"step-000002.h5 has ", "its manifest says"}},
        {"StateFileLonger",
         [](Stem stem, Values, Values, Values) { fs::resize_file(stem + ".h5", fs::file_size(stem + ".h5") + 1); },
         {"step-000002.h5 has ", "its manifest says"}},
        {"StateFileMissing", [](Stem stem, Values, Values, Values) { fs::remove(stem + ".h5"); },
         {"step-000002.h5 is missing"}},
        {"MasterWeights", [](Stem stem, Values v, Values, Values) { flip_value(stem + ".h5", v); },
         {"step-000002.h5 is damaged", "values of fp32"}},
        {"FirstMoment", [](Stem stem, Values, Values v, Values) { flip_value(stem + ".h5", v); },
         {"step-000002.h5 is damaged", "values of exp_avg do"}},
        {"SecondMoment", [](Stem stem, Values, Values, Values v) { flip_value(stem + ".h5", v); },
         {"step-000002.h5 is damaged", "values of exp_avg_sq"}},
        {"Hdf5Signature", [](Stem stem, Values, Values, Values) { test::flip_bit(stem + ".h5", 1, 3); },
         {"step-000002.h5 is damaged", "structures"}},
        {"Hdf5Superblock", [](Stem stem, Values, Values, Values) { test::flip_bit(stem + ".h5", 40, 2); },
         {"step-000002.h5 is damaged", "structures"}},
        {"ManifestCut", [](Stem stem, Values, Values, Values) { fs::resize_file(stem + ".json", 40); },
         {"step-000002.json is damaged"}},
        {"ManifestEmpty", [](Stem stem, Values, Values, Values) { fs::resize_file(stem + ".json", 0); },
         {"step-000002.json is damaged"}},
        {"ManifestOfAnotherStep",
         [](Stem stem, Values, Values, Values) {
             fs::copy_file(stem.substr(0, stem.size() - 1) + "1.json", stem + ".json", fs::copy_options::overwrite_existing);
         },
         {"step-000002.json describes step 1"}},
        {"StateFileOfAnotherStep",
         [](Stem stem, Values, Values, Values) {
             fs::copy_file(stem.substr(0, stem.size() - 1) + "1.h5", stem + ".h5", fs::copy_options::overwrite_existing);
         },
         {"step-000002.h5"}},
    };
}

TEST_F(Checkpoint, EachKindOfDamageIsNamedAndThePreviousCheckpointIsUsed)
{
    save_steps(1);
    const auto first = saved;
    for (const Damage& damage : damages()) {
        save_steps(2);
        damage.apply(file(2, ""), saved, saved_exp_avg, saved_exp_avg_sq);
        test::ToyTraining toy(*comm, {});
        testing::internal::CaptureStderr();
        const auto state = load(toy);
        const std::string warning = testing::internal::GetCapturedStderr();
        ASSERT_TRUE(state.has_value()) << damage.name;
        EXPECT_EQ(state->step, 1) << damage.name;
        EXPECT_EQ(toy.optimizer.steps_done(), 1) << damage.name;
        EXPECT_EQ(toy.master(), first) << damage.name;
        for (const std::string& word : damage.words)
            EXPECT_NE(warning.find(word), std::string::npos) << damage.name << ": " << warning;
        EXPECT_NE(warning.find("checkpoint of step 2 cannot be used"), std::string::npos) << damage.name << ": " << warning;
    }
}

TEST_F(Checkpoint, AFlippedBitAnywhereIsFound)
{
    save_steps(1);
    save_steps(2);
    testing::internal::CaptureStderr(); // a warning each
    for (const auto& [path, stride] : {std::pair{file(2, ".json"), std::size_t{61}}, std::pair{file(2, ".h5"), std::size_t{1009}}}) {
        const std::size_t bytes = fs::file_size(path);
        for (std::size_t place = 0, bit = 0; place < bytes; place += stride, ++bit) {
            test::flip_bit(path, place, bit % 8);
            test::ToyTraining toy(*comm, {});
            const auto state = load(toy);
            EXPECT_TRUE(state && state->step == 1) << path << ", bit " << bit % 8 << " of byte " << place;
            test::flip_bit(path, place, bit % 8); // back
        }
    }
    testing::internal::GetCapturedStderr();
    test::ToyTraining toy(*comm, {});
    EXPECT_EQ(load(toy)->step, 2);
}

TEST_F(Checkpoint, WhatAKilledSaveLeavesIsNoCheckpointAndGoesWithTheNextSave)
{
    const std::vector<std::string> leftovers{file(1, ".h5.partial-0123456789ab"), file(1, ".h5"), file(1, ".json.partial-77")};
    fs::create_directories(fs::path(leftovers[0]).parent_path());
    for (const std::string& path : leftovers)
        write_file_atomically(path, "torn");
    test::ToyTraining toy(*comm, {});
    EXPECT_FALSE(load(toy).has_value());
    save_steps(2);
    for (const std::string& path : leftovers)
        EXPECT_FALSE(fs::exists(path)) << path;
    write_file_atomically(file(3, ".h5"), "torn"); // killed between the state file and its manifest
    ASSERT_EQ(load(toy)->step, 2);
}

TEST_F(Checkpoint, WithoutManifestItDoesNotExist)
{
    save_steps(1);
    save_steps(2);
    fs::remove(file(2, ".json"));
    test::ToyTraining toy(*comm, {});
    ASSERT_EQ(load(toy)->step, 1);
}

TEST_F(Checkpoint, WhenAllAreDamagedTheUserDecides)
{
    save_steps(1);
    save_steps(2);
    fs::resize_file(file(1, ".h5"), 100);
    fs::resize_file(file(2, ".json"), 100);
    test::ToyTraining toy(*comm, {});
    try {
        load(toy);
        FAIL() << "no error";
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::bad_data);
        for (const char* word : {"none of the 2 checkpoint(s)", "step-000002.json is damaged", "--resume never"})
            EXPECT_NE(std::string(error.what()).find(word), std::string::npos) << error.what();
    }
    EXPECT_EQ(toy.optimizer.steps_done(), 0);
}

TEST_F(Checkpoint, DamagedOnesDoNotPushWholeOnesOut)
{
    save_steps(1);
    save_steps(3);
    fs::resize_file(file(3, ".h5"), 100);
    test::ToyTraining toy(*comm, {});
    ASSERT_EQ(load(toy)->step, 1);
    save_steps(2);
    EXPECT_TRUE(fs::exists(file(1, ".json"))) << "two whole ones are kept";
    EXPECT_TRUE(fs::exists(file(2, ".json")));
    EXPECT_FALSE(fs::exists(file(3, ".json")));
    EXPECT_FALSE(fs::exists(file(3, ".h5")));
}

TEST_F(Checkpoint, AFullDiskKeepsTheOlderOnes)
{
    save_steps(1);
    save_steps(2);
    std::signal(SIGXFSZ, SIG_IGN);
    rlimit before{};
    ::getrlimit(RLIMIT_FSIZE, &before);
    rlimit limit = before;
    limit.rlim_cur = 8192;
    ::setrlimit(RLIMIT_FSIZE, &limit);
    std::optional<Error> error;
    try {
        save_steps(3);
    } catch (const Error& caught) {
        error.emplace(caught);
    }
    ::setrlimit(RLIMIT_FSIZE, &before);
    ASSERT_TRUE(error.has_value());
    EXPECT_EQ(error->code(), ExitCode::io);
    EXPECT_NE(std::string(error->what()).find("step-000003.h5"), std::string::npos) << error->what();
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(fs::path(file(1, "")).parent_path()))
        names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    EXPECT_EQ(names, (std::vector<std::string>{"step-000001.h5", "step-000001.json", "step-000002.h5", "step-000002.json"}));
    test::ToyTraining toy(*comm, {});
    EXPECT_EQ(load(toy)->step, 2);
    save_steps(3);
    EXPECT_EQ(load(toy)->step, 3);
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
    try {
        other_store.load_latest(binding, optimizer);
        FAIL() << "no error";
    } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()).find("has another shape than the model's"), std::string::npos) << error.what();
    }
}

} // namespace
} // namespace selm
