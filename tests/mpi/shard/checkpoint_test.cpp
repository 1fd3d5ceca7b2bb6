#include "selm/shard/checkpoint.hpp"

#include <csignal>
#include <filesystem>
#include <functional>
#include <optional>

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include "../../unit/shard/shard_test_support.hpp"
#include "mpi_test.hpp"
#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/comm/agree.hpp"

namespace selm {
namespace {

namespace fs = std::filesystem;
using test::test_world;

/// Checkpoints of all ranks, some of which rank 0 damages.
class CheckpointMpiDamage : public ::testing::Test {
  protected:
    void save_steps(int steps)
    {
        test::ToyTraining toy(test_world(), {});
        toy.fill(test::toy_flat(parameters, layout, 11));
        for (int step = 1; step <= steps; ++step)
            toy.step(0.01, test::toy_flat(parameters, layout, static_cast<std::uint32_t>(20 + step)));
        saved = toy.master();
        store.save({.step = steps, .epoch = 0, .epoch_step = steps}, binding, toy.optimizer);
    }

    /// The step that loading finds and the weights of all ranks.
    std::pair<std::int64_t, std::vector<float>> load()
    {
        test::ToyTraining toy(test_world(), {});
        const auto state = store.load_latest(binding, toy.optimizer);
        EXPECT_EQ(toy.optimizer.steps_done(), state ? state->step : 0);
        return {state ? state->step : 0, toy.master()};
    }

    void on_root(const std::function<void()>& body)
    {
        agree(test_world(), "rank 0 of the test", [&] {
            if (test_world().is_root())
                body();
        });
    }

    std::optional<Error> error_of(const std::function<void()>& body)
    {
        try {
            body();
        } catch (const Error& error) {
            return error;
        }
        return std::nullopt;
    }

    std::string file(int step, const char* end) const { return cat(directory, "/step-00000", step, end); }

    static std::string make_directory()
    {
        return root_string(test_world(), "directory", [] {
            const auto path = fs::temp_directory_path() / cat("selm_damaged_checkpoints-", ::getpid());
            fs::remove_all(path);
            return path.string();
        });
    }
    void TearDown() override
    {
        on_root([&] { fs::remove_all(directory); });
    }

    std::vector<ParameterSpec> parameters = test::toy_parameters();
    FlatLayout layout{parameters, test_world().size(), {.group_ends = test::toy_groups()}};
    std::string directory = make_directory();
    CheckpointStore store{directory, 2, parameters, layout, test_world()};
    CheckpointBinding binding{{"recipe", "abc"}};
    std::vector<float> saved;
};

TEST_F(CheckpointMpiDamage, AllRanksGoOnFromThePreviousOneAsLongAsThereIsOne)
{
    save_steps(1);
    const auto first = saved;
    save_steps(2);
    on_root([&] { fs::copy(directory, directory + "-whole"); });
    const std::vector<std::function<void()>> damages{
        [&] { fs::resize_file(file(2, ".h5"), fs::file_size(file(2, ".h5")) - 8); },
        [&] { fs::resize_file(file(2, ".json"), 100); },
        [&] { fs::remove(file(2, ".json")); },
        [&] { test::flip_bit(file(2, ".h5"), 33, 1); },
        [&] { // the last weights: the last rank reads them
            const std::string bytes = read_file(file(2, ".h5"));
            const std::size_t norm = layout.offset(layout.parameters() - 1);
            const std::size_t place = bytes.find(std::string(reinterpret_cast<const char*>(saved.data() + norm), 12 * 4));
            ASSERT_NE(place, std::string::npos);
            test::flip_bit(file(2, ".h5"), place + 47, 0);
        },
    };
    for (const auto& damage : damages) {
        on_root(damage);
        const auto [step, weights] = load();
        EXPECT_EQ(step, 1);
        EXPECT_EQ(weights, first);
        on_root([&] { fs::copy(directory + "-whole", directory,
                              fs::copy_options::overwrite_existing | fs::copy_options::recursive); });
    }
    EXPECT_EQ(load(), std::pair(std::int64_t{2}, saved));

    on_root([&] {
        fs::remove_all(directory + "-whole");
        for (const int step : {1, 2})
            fs::resize_file(file(step, ".h5"), 100);
    });
    const auto error = error_of([&] { load(); });
    ASSERT_TRUE(error.has_value());
    EXPECT_EQ(error->code(), ExitCode::bad_data);
    EXPECT_NE(std::string(error->what()).find("--resume never"), std::string::npos) << error->what();
}

TEST_F(CheckpointMpiDamage, AFullDiskKeepsTheOlderOnes)
{
    save_steps(1);
    const auto first = saved;
    std::signal(SIGXFSZ, SIG_IGN);
    rlimit before{};
    ::getrlimit(RLIMIT_FSIZE, &before);
    rlimit limit = before;
    limit.rlim_cur = 8192;
    ::setrlimit(RLIMIT_FSIZE, &limit);
    const auto error = error_of([&] { save_steps(2); });
    ::setrlimit(RLIMIT_FSIZE, &before);
    ASSERT_TRUE(error.has_value());
    EXPECT_EQ(error->code(), ExitCode::io);
    EXPECT_NE(std::string(error->what()).find("step-000002.h5"), std::string::npos) << error->what();
    EXPECT_EQ(load(), std::pair(std::int64_t{1}, first));
}

} // namespace
} // namespace selm
