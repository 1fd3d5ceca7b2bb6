// Run directories in every state, made by hand: what --status says of them.

#include "selm/phases/run_status.hpp"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "preference_rows.hpp"
#include "run_status_jobs.hpp"
#include "selm/base/error.hpp"
#include "selm/data/journal.hpp"
#include "selm/h5/publish.hpp"
#include "temporary_directory.hpp"

namespace selm {
namespace {

constexpr double now = 1'700'000'000;

class RunStatusTest : public ::testing::Test {
  protected:
    std::string path(const std::string& name) const { return directory.path("run/" + name); }

    void write(const std::string& name, const std::string& content) const
    {
        std::filesystem::create_directories(std::filesystem::path(path(name)).parent_path());
        std::ofstream(path(name), std::ios::binary) << content;
    }
    /// The recipe as selm_iter keeps it.
    void write_recipe(const std::string& more = "") const
    {
        write("recipe.cfg", "rank.ranker = reward:dir\nrun.iterations = 2\nrun.train = rows.jsonl\ntrain.epochs = 3\ntrain.global-batch = 2\n" + more);
    }
    void write_prefs(std::int64_t rows)
    {
        std::filesystem::create_directories(path(""));
        write_preferences(path("prefs.h5"), test::preference_rows(rows), {.config = "c", .config_hash = "h", .source_digest = "s", .extra = {}}, *comm);
    }
    /// As much of an iteration file as tells which phases it has been through.
    void write_rows(const std::string& name, std::int64_t rows, const std::vector<std::string>& groups = {})
    {
        std::filesystem::create_directories(std::filesystem::path(path(name)).parent_path());
        h5::write_and_publish(path(name), *comm, [&](h5::File& file) {
            file.write_blocks("/prompts/row", std::vector<std::int64_t>(static_cast<std::size_t>(rows)));
            for (const std::string& group : groups)
                file.create_group(group);
        });
    }
    /// One attempt's journal. @return its file
    std::string write_journal(const std::string& output, const std::vector<std::int64_t>& rows)
    {
        std::filesystem::create_directories(std::filesystem::path(path(output)).parent_path());
        Journal journal(path(output), {{"recipe", "r"}}, *comm);
        for (const std::int64_t row : rows)
            journal.append(row, std::vector<std::byte>(10));
        return Journal::survey(path(output)).attempt_files.front();
    }
    void write_metrics(const std::string& name, const std::vector<double>& step_seconds, const std::string& more = "")
    {
        std::string text;
        for (std::size_t i = 0; i < step_seconds.size(); ++i)
            text += cat("{\"step\":", i + 1, ",\"epoch\":", static_cast<double>(i + 1) / 5, ",\"step_s\":", step_seconds[i], "}\n");
        write(name, text + more);
    }

    RunStatus read()
    {
        return read_run_status(directory.path("run"),
                               {.now = [] { return now; }, .born = [this](const std::string& file) { return time_of(born, file); },
                                .modified = [this](const std::string& file) -> std::optional<double> {
                                    if (!std::filesystem::exists(file))
                                        return std::nullopt;
                                    return time_of(modified, file).value_or(now);
                                }});
    }
    static PhaseStatus phase(const RunStatus& status, std::int64_t iteration, const std::string& name)
    {
        for (const PhaseStatus& phase : status.phases)
            if (phase.iteration == iteration && phase.phase == name)
                return phase;
        ADD_FAILURE() << "no phase " << name << " of iteration " << iteration;
        return {};
    }
    static std::string states(const RunStatus& status)
    {
        std::string text;
        for (const PhaseStatus& phase : status.phases)
            text += cat(text.empty() ? "" : " ", phase.iteration, phase.phase, phase.state == PhaseState::done ? "+" : phase.state == PhaseState::pending ? "-" : "~");
        return text;
    }
    static void expect(const std::string& text, const std::string& words) { EXPECT_NE(text.find(words), std::string::npos) << words << "\n" << text; }

    test::TemporaryDirectory directory;
    std::unique_ptr<Communicator> comm = make_single_communicator();
    std::map<std::string, double> born, modified; ///< by path

  private:
    static std::optional<double> time_of(const std::map<std::string, double>& times, const std::string& file)
    {
        const auto found = times.find(file);
        return found == times.end() ? std::nullopt : std::optional(found->second);
    }
};

TEST_F(RunStatusTest, NoRunIsAnErrorThatSaysWhatToDo)
{
    const auto refused = [&] {
        try {
            read();
        } catch (const Error& error) {
            EXPECT_EQ(error.code(), ExitCode::bad_data);
            return std::string(error.what());
        }
        return std::string();
    };
    expect(refused(), "does not exist");
    write("config.json", "{}"); // some other directory
    expect(refused(), "is no run directory");
}

TEST_F(RunStatusTest, AChainThatHasNotStarted)
{
    write("slurm/recipe.cfg", "[run]\ntrain = \"a#b.jsonl\" # rows\niterations = 1 ; one\n\n[train]\n# epochs = 7\nglobal-batch=4\n");
    write("slurm/jobs", "71 gen 1\n72 rank 1\nnonsense\n");
    const RunStatus status = read();
    EXPECT_EQ(status.iterations, 1);
    EXPECT_EQ(states(status), "0import- 1generate- 1rank- 1logprob- 1train-");
    EXPECT_FALSE(phase(status, 1, "generate").total);
    ASSERT_EQ(status.jobs.size(), 2U);
    EXPECT_EQ(status.jobs[1].id, "72");
    EXPECT_EQ(status.jobs[1].what, "rank of iteration 1");
    expect(status_table(status), "job 71        gen of iteration 1     state not known");
}

TEST_F(RunStatusTest, HalfAGenerationAtTheRateOfItsNewestAttempt)
{
    write_recipe();
    write_prefs(21); // two portions of 10
    const std::string first = write_journal("iter1/iter.h5", {0, 1, 2});
    const std::string second = write_journal("iter1/iter.h5", {3, 4, 5, 6});
    born = {{first, now - 90000}, {second, now - 100}};
    modified = {{first, now - 80000}, {second, now - 10}};
    const RunStatus status = read();
    EXPECT_EQ(states(status), "0import+ 1generate~ 1rank- 1logprob- 1train- 2generate- 2rank- 2logprob- 2train-");
    EXPECT_EQ(phase(status, 0, "import").done, 21);
    const PhaseStatus generate = phase(status, 1, "generate");
    EXPECT_EQ(generate.done, 7);
    EXPECT_EQ(generate.total, 10);
    EXPECT_EQ(generate.attempt, 2);
    EXPECT_DOUBLE_EQ(generate.rate.value(), 3 / 90.0); // the first of the four marks the beginning
    EXPECT_DOUBLE_EQ(generate.seconds_left.value(), 90.0);
    EXPECT_DOUBLE_EQ(generate.silent_s.value(), 10.0);
    EXPECT_EQ(phase(status, 1, "rank").total, 10);
    EXPECT_EQ(phase(status, 2, "train").total, 15); // 5 steps of 2 rows, 3 epochs
    expect(status_table(status), "generate       under way  7/10 rows             0.0333 rows/s");
    expect(status_table(status), "1:30 left, attempt 2");
}

TEST_F(RunStatusTest, WithoutTimesOfMakingTheJobsStartCounts)
{
    write_recipe();
    write_prefs(20);
    modified = {{write_journal("iter1/iter.h5", {0, 1, 2, 3}), now}};
    EXPECT_FALSE(phase(read(), 1, "generate").rate);
    write("slurm/provenance.txt", "--- 2023-11-14T20:00:00Z job 9 restart 0\nscript selm-iter, recipe r\n--- 2023-11-14T22:11:40Z job 9 restart 1\n");
    EXPECT_DOUBLE_EQ(phase(read(), 1, "generate").rate.value(), 4 / 100.0); // now is 22:13:20
    EXPECT_EQ(read().jobs.at(0).what, "selm-iter");
    // Starts of the run itself, by a job's script and by hand.
    write("attempts/000001", "host n job 9 restart 2 at 2023-11-14T22:12:30Z\n");
    write("attempts/000002", "host n pid 4 at 2023-11-14T22:12:31Z\n");
    write("attempts/000003", "host n pid 4 at 2023-11-14T22:12:40Z job 10 restart 0\n");
    EXPECT_DOUBLE_EQ(phase(read(), 1, "generate").rate.value(), 4 / 40.0);
    ASSERT_EQ(read().jobs.size(), 2U);
    EXPECT_DOUBLE_EQ(read().jobs[0].started.value(), now - 50);
    EXPECT_EQ(read().jobs[1].id, "10");
}

TEST_F(RunStatusTest, ADeadRunHasNoTimeLeft)
{
    write_recipe();
    write_prefs(20);
    const std::string file = write_journal("iter1/iter.h5", {0, 1, 2, 3});
    born = {{file, now - 8000}};
    modified = {{file, now - 7400}};
    EXPECT_FALSE(phase(read(), 1, "generate").seconds_left); // 12 rows a minute, silent for two hours
    expect(status_table(read()), "nothing new for 2:03:20");
    born = {{file, now - 37400}}; // a row takes hours: silence says nothing
    EXPECT_TRUE(phase(read(), 1, "generate").seconds_left);
}

TEST_F(RunStatusTest, TornAndDamagedJournals)
{
    write_recipe();
    write_prefs(20);
    const std::string file = write_journal("iter1/iter.h5", {0, 1, 2, 3});
    std::filesystem::resize_file(file, std::filesystem::file_size(file) - 5);
    EXPECT_EQ(phase(read(), 1, "generate").done, 3);
    EXPECT_TRUE(phase(read(), 1, "generate").problems.empty());
    std::ofstream(file, std::ios::app) << std::string(100, '#');
    EXPECT_EQ(phase(read(), 1, "generate").problems.size(), 1U);
    expect(status_table(read()), "problem: " + file);
}

TEST_F(RunStatusTest, RankingByTwoRankersThenLogProbs)
{
    write_recipe("run.test = held.jsonl\n");
    std::ofstream(path("recipe.cfg"), std::ios::app) << "rank.ranker = pairrm:a,reward:b\n";
    write_prefs(20);
    write_rows("test.h5", 4);
    write_rows("iter0/test.h5", 4, {"/ranking"});
    write_rows("iter1/iter.h5", 9); // a row had no room
    write_journal("iter1/iter.h5.rank-pairrm", {0, 1, 2, 3, 4, 5, 6, 7, 8});
    write_journal("iter1/iter.h5.rank-reward", {0, 1});
    RunStatus status = read();
    EXPECT_EQ(states(status), "0import+ 0test_generate+ 0test_rank+ 1generate+ 1rank~ 1logprob- 1train- 1test_generate- 1test_rank- "
                              "2generate- 2rank- 2logprob- 2train- 2test_generate- 2test_rank-");
    EXPECT_EQ(phase(status, 1, "generate").done, 9);
    EXPECT_EQ(phase(status, 1, "rank").done, 11);
    EXPECT_EQ(phase(status, 1, "rank").total, 18);
    EXPECT_EQ(phase(status, 1, "test_generate").total, 4);

    std::filesystem::remove_all(path("iter1"));
    write_rows("iter1/iter.h5", 9, {"/ranking", "/pairs"});
    write_journal("iter1/iter.h5.logprobs-reference", {0, 1, 2});
    status = read();
    EXPECT_EQ(phase(status, 1, "rank").state, PhaseState::done);
    EXPECT_EQ(phase(status, 1, "logprob").done, 3);
    EXPECT_EQ(phase(status, 1, "logprob").total, 9);
}

TEST_F(RunStatusTest, TrainingWithACheckpoint)
{
    write_recipe();
    write_prefs(20);
    write_rows("iter1/iter.h5", 10, {"/ranking", "/pairs", "/logprobs/reference"});
    const std::string metrics = path("iter1/policy/metrics.jsonl");
    // Four slow steps of a former attempt, two of this one, and a line that is being written.
    write_metrics("iter1/policy/metrics.jsonl", {50, 50, 50, 50, 4, 6}, "{\"step\":7,\"epo");
    born = {{metrics, now - 30}};
    modified = {{metrics, now - 5}, {path("iter1/policy/checkpoints/step-000004.json"), now - 60}};
    write("iter1/policy/checkpoints/step-000002.json", "{\"step\": 2}");
    write("iter1/policy/checkpoints/step-000002.h5", "x");
    write("iter1/policy/checkpoints/step-000004.json", "{\"step\": 4}");
    write("iter1/policy/checkpoints/step-000004.h5", "x");
    RunStatus status = read();
    const PhaseStatus train = phase(status, 1, "train");
    EXPECT_EQ(train.state, PhaseState::under_way);
    EXPECT_EQ(train.unit, "steps");
    EXPECT_EQ(train.done, 6);
    EXPECT_EQ(train.total, 15); // the file says 5 steps an epoch, the recipe 3 epochs
    EXPECT_DOUBLE_EQ(train.rate.value(), 0.2);
    EXPECT_DOUBLE_EQ(train.seconds_left.value(), 45);
    EXPECT_EQ(train.checkpoint, 4);
    EXPECT_DOUBLE_EQ(train.checkpoint_age_s.value(), 60);
    EXPECT_TRUE(train.problems.empty());
    expect(status_table(status), "train          under way  6/15 steps");
    expect(status_table(status), "0:45 left, checkpoint of step 4 (1:00 ago)");

    write("iter1/policy/checkpoints/step-000006.json", "{\"step\": 6"); // torn
    write("iter1/policy/checkpoints/step-000005.json", "{\"step\": 5}"); // its data are gone
    write_metrics("iter1/policy/metrics.jsonl", {4, 6}, "garbage\n");
    status = read();
    EXPECT_EQ(phase(status, 1, "train").checkpoint, 4);
    EXPECT_EQ(phase(status, 1, "train").done, 2);
    EXPECT_EQ(phase(status, 1, "train").problems.size(), 3U);

    // An attempt that has not made a step yet.
    write("iter1/policy/metrics.jsonl", "");
    EXPECT_EQ(phase(read(), 1, "train").done, 0);
    EXPECT_FALSE(phase(read(), 1, "train").rate);
}

TEST_F(RunStatusTest, AFinishedChainWithoutManifest)
{
    write("slurm/recipe.cfg", "[run]\niterations = 1\ntrain = x.jsonl\n");
    write_prefs(4);
    write_rows("iter1/iter.h5", 4, {"/ranking", "/pairs", "/logprobs/reference"});
    write_metrics("iter1/policy/metrics.jsonl", {1, 1});
    write("iter1/policy/config.json", "{}");
    EXPECT_EQ(phase(read(), 1, "train").state, PhaseState::under_way); // the record comes last
    write("iter1/policy/training.json", "{}");
    const RunStatus status = read();
    EXPECT_EQ(states(status), "0import+ 1generate+ 1rank+ 1logprob+ 1train+");
    EXPECT_EQ(status.iterations_done, 1);
    EXPECT_FALSE(phase(status, 1, "train").seconds_left);
}

TEST_F(RunStatusTest, AFinishedRunAndItsJson)
{
    write_recipe();
    write_prefs(20);
    write("manifest.json", R"({"iter1": {"generate": {"rows": 10, "tokens": 500, "seconds": 5.0, "resumed_rows": 5}, "rank": {"rows": 10, "seconds": 2.0},
        "logprob": {"rows": 10, "seconds": 0.0}, "train": {"rows": 10, "steps": 15, "tokens": 900, "seconds": 3.0}}})");
    write("STOP", "");
    const RunStatus status = read();
    EXPECT_EQ(states(status), "0import+ 1generate+ 1rank+ 1logprob+ 1train+ 2generate- 2rank- 2logprob- 2train-");
    EXPECT_DOUBLE_EQ(phase(status, 1, "generate").rate.value(), 1); // of the rows that these seconds made
    EXPECT_FALSE(phase(status, 1, "logprob").rate);
    EXPECT_EQ(phase(status, 1, "train").done, 15);
    expect(status_table(status), "STOP: remove it to go on");
    const auto json = nlohmann::json::parse(status_json(status));
    EXPECT_EQ(json.at("iterations_done"), 1);
    EXPECT_EQ(json.at("stop_file"), true);
    EXPECT_EQ(json.at("phases").at(4).at("phase"), "train");
    EXPECT_EQ(json.at("phases").at(4).at("done"), 15);
    EXPECT_EQ(json.at("phases").at(5).at("done"), nullptr);
    EXPECT_EQ(json.at("phases").at(5).at("state"), "pending");
}

TEST_F(RunStatusTest, DamagedFilesAreProblemsNotErrors)
{
    write_recipe();
    write("manifest.json", "{\"iter1\":");
    write("prefs.h5", "no HDF5");
    write("iter1/iter.h5", "");
    const RunStatus status = read();
    EXPECT_EQ(phase(status, 0, "import").problems.size(), 2U); // the file and the manifest
    EXPECT_EQ(phase(status, 1, "generate").problems.size(), 1U);
    expect(status_table(status), "is not JSON");
    expect(status_table(status), "is empty");
}

/// Programs named squeue and sacct before all others in PATH.
class SlurmTest : public RunStatusTest {
  protected:
    SlurmTest()
    {
        std::filesystem::create_directories(directory.path("bin"));
        ::setenv("PATH", (directory.path("bin") + ":" + path_before).c_str(), 1);
        status.jobs = {{.id = "7", .what = "gen of iteration 1", .started = {}, .state = {}, .elapsed = {}, .left = {}, .reason = {}},
                       {.id = "8", .what = "rank of iteration 1", .started = {}, .state = {}, .elapsed = {}, .left = {}, .reason = {}}};
    }
    ~SlurmTest() override { ::setenv("PATH", path_before.c_str(), 1); }
    void program(const std::string& name, const std::string& body) const
    {
        const std::string file = directory.write("bin/" + name, "#!/bin/sh\n" + body + "\n");
        std::filesystem::permissions(file, std::filesystem::perms::owner_all);
    }
    std::string path_before = std::getenv("PATH");
    RunStatus status;
};

TEST_F(SlurmTest, StatesComeFromTheQueueAndThenFromTheAccounts)
{
    program("squeue", R"([ "$3" = --jobs=7,8 ] || exit 9; echo '8|RUNNING|1:02|58:58|(None)'; echo '99|PENDING|0:00|1:00|x')");
    program("sacct", R"([ "$4" = --jobs=7 ] || exit 9; echo '7|COMPLETED|00:03:00')");
    ask_slurm(status);
    EXPECT_EQ(status.slurm, "");
    EXPECT_EQ(status.jobs[0].state, "COMPLETED");
    EXPECT_EQ(status.jobs[1].state, "RUNNING");
    expect(status_table(status), "job 8         rank of iteration 1    RUNNING, 1:02 so far, 58:58 until its limit");
}

TEST_F(SlurmTest, NoAnswerIsOneLine)
{
    program("squeue", "exec sleep 60");
    ask_slurm(status, 0.2);
    EXPECT_EQ(status.slurm, "squeue did not answer within 0.2 s");
    program("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1");
    ask_slurm(status);
    EXPECT_EQ(status.slurm, "squeue says: slurm_load_jobs error: Unable to contact slurm controller");
    program("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"); // both have left the queue
    program("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1");
    ask_slurm(status);
    EXPECT_EQ(status.slurm, "not in the queue any more: 7,8 (sacct says: Slurm accounting storage is disabled)");
    ::setenv("PATH", directory.path("empty").c_str(), 1);
    ask_slurm(status);
    EXPECT_EQ(status.slurm, "squeue is not installed here");
}

TEST(RunCommand, KillsWhatAProgramStarted)
{
    const CommandResult result = run_command({"sh", "-c", "echo out; echo err >&2; sleep 60 & echo $!; wait"}, 0.5);
    EXPECT_EQ(result.end, CommandResult::End::timed_out);
    EXPECT_TRUE(result.output.starts_with("out\n"));
    EXPECT_EQ(result.errors, "err\n");
    EXPECT_EQ(run_command({"sh", "-c", "exit 3"}, 10).exit_code, 3);
    EXPECT_EQ(run_command({"selm-no-such-program"}, 10).end, CommandResult::End::not_found);
}

} // namespace
} // namespace selm
