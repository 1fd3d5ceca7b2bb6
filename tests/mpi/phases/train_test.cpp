#include "selm/phases/train.hpp"

#include <filesystem>
#include <map>
#include <numbers>
#include <sstream>

#include <nlohmann/json.hpp>

#include "selm/algo/losses.hpp"
#include "selm/model/safetensors.hpp"
#include "selm/phases/shared_model.hpp"
#include "training_fixture.hpp"

namespace selm {
namespace {

using nlohmann::json;
using test::test_world;
namespace fs = std::filesystem;

class Train : public test::TrainingFixture {
  protected:
    TrainOptions to(const std::string& output)
    {
        TrainOptions options = train_options_;
        options.output = path(output);
        return options;
    }
    TrainReport together(const TrainOptions& options) { return run_train(options, test_world()); }
    void alone(const TrainOptions& options)
    {
        on_root([&] {
            const auto single = make_single_communicator();
            run_train(options, *single);
        });
    }

    /// Digest of the weights of a directory.
    std::string weights(const std::string& name)
    {
        return root_string(test_world(), "digest of weights", [&] { return SafetensorsReader(path(name)).digest(); });
    }
    static std::map<std::string, std::vector<float>> tensors(const std::string& directory)
    {
        const SafetensorsReader reader(directory);
        std::map<std::string, std::vector<float>> all;
        for (const auto& [name, info] : reader.tensors()) {
            all[name].resize(static_cast<std::size_t>(info.elements()));
            reader.read_f32(name, info.shape, 0, all[name]);
        }
        return all;
    }
    /// Largest over tensors of ||update a - update b|| / ||update b||, updates from the start model.
    double update_difference(const std::string& a, const std::string& b)
    {
        const auto start = tensors(path("model"));
        const auto in_a = tensors(path(a));
        const auto in_b = tensors(path(b));
        double largest = 0;
        for (const auto& [name, w0] : start) {
            double difference = 0, norm = 0;
            for (std::size_t i = 0; i < w0.size(); ++i) {
                const double da = static_cast<double>(in_a.at(name)[i]) - static_cast<double>(in_b.at(name)[i]);
                const double db = static_cast<double>(in_b.at(name)[i]) - static_cast<double>(w0[i]);
                difference += da * da;
                norm += db * db;
            }
            EXPECT_GT(norm, 0) << name << " did not move";
            largest = std::max(largest, std::sqrt(difference / norm));
        }
        return largest;
    }
    std::vector<json> metrics(const std::string& output)
    {
        std::istringstream in(
            root_string(test_world(), "metrics", [&] { return read_file(path(output) + "/metrics.jsonl"); }));
        std::vector<json> lines;
        for (std::string line; std::getline(in, line);)
            lines.push_back(json::parse(line));
        return lines;
    }
};

TEST_F(Train, FirstLossIsLogTwoAndTheLossFalls)
{
    const TrainReport report = together(train_options_);
    EXPECT_EQ(report.outcome, Outcome::done);
    EXPECT_EQ(report.rows, row_count);
    EXPECT_EQ(report.steps, 3 * 2); // an incomplete last batch is dropped
    EXPECT_NEAR(report.first_loss, std::numbers::ln2, 1e-15);
    EXPECT_LT(report.last_loss, report.first_loss - 0.05);
    EXPECT_GT(report.reward_margin, 0);
    const auto lines = metrics("policy");
    ASSERT_EQ(lines.size(), 6U);
    EXPECT_EQ(lines[0]["rewards/margins"], 0.0);
    EXPECT_EQ(lines[0]["loss/optimism"], 0.0);
    for (const json& line : lines)
        for (const char* key :
             {"step", "epoch", "learning_rate", "loss", "loss/dpo", "loss/optimism", "rewards/chosen",
              "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
              "logps/generated", "grad_norm", "tokens", "tokens_per_s", "step_s", "comm_s", "peak_bytes"})
            EXPECT_TRUE(line.contains(key) && line[key].is_number()) << key;
}

TEST_F(Train, UpdatesDoNotDependOnTheNumberOfRanks)
{
    for (const std::int64_t batch : {2, 11}) { // 2: with more ranks than rows some have none
        TrainOptions options = to(cat("together-", batch));
        options.global_batch = batch;
        options.epochs = batch == 2 ? 1 : 5;
        together(options);
        options.output = path(cat("alone-", batch));
        alone(options);
        EXPECT_LE(update_difference(cat("together-", batch), cat("alone-", batch)), 1e-3) << batch;
    }
}

TEST_F(Train, SameRanksAndStageGiveTheSameBits)
{
    for (std::int64_t zero = 0; zero <= 3; ++zero) {
        TrainOptions options = to(cat("first", zero));
        options.zero = zero;
        together(options);
        options.output = path(cat("second", zero));
        options.max_steps = 3; // also when stopped in between
        together(options);
        options.max_steps = 0;
        together(options);
        EXPECT_EQ(weights(cat("first", zero)), weights(cat("second", zero))) << zero;
    }
    EXPECT_EQ(weights("first0"), weights("first1"));
}

TEST_F(Train, MicrobatchesChangeOnlyTheRounding)
{
    TrainOptions options = to("small");
    options.tokens_per_microbatch = 1;
    together(options);
    options = to("large");
    options.tokens_per_microbatch = 100000;
    together(options);
    EXPECT_LE(update_difference("small", "large"), 1e-3);
}

TEST_F(Train, ResumedEqualsUninterrupted)
{
    together(to("whole"));
    TrainOptions options = to("parts");
    options.max_steps = 2;
    EXPECT_EQ(together(options).outcome, Outcome::stopped);
    EXPECT_FALSE(fs::exists(path("parts/config.json")));
    on_root([&] {
        std::ofstream(path("parts/metrics.jsonl"), std::ios::app) << R"({"step": 3, "loss": 9})"
                                                                  << "\n{\"torn";
    });
    EXPECT_EQ(together(options).outcome, Outcome::stopped);
    options.max_steps = 0;
    const TrainReport report = together(options);
    EXPECT_EQ(report.outcome, Outcome::done);
    EXPECT_EQ(report.resumed_from_step, 4);
    EXPECT_EQ(weights("whole"), weights("parts"));
    const auto expected = metrics("whole");
    const auto found = metrics("parts");
    ASSERT_EQ(found.size(), expected.size());
    for (std::size_t i = 0; i < found.size(); ++i)
        for (const char* key :
             {"step", "epoch", "learning_rate", "loss", "grad_norm", "tokens", "rewards/margins", "logps/generated"})
            EXPECT_EQ(found[i][key], expected[i][key]) << i << " " << key;
}

TEST_F(Train, ACheckpointOfSomeRanksIsFinishedByOne)
{
    TrainOptions options = to("moved");
    options.max_steps = 3;
    together(options);
    options.max_steps = 0;
    options.zero = 0;
    alone(options);
    together(to("whole"));
    EXPECT_LE(update_difference("moved", "whole"), 1e-3);
}

TEST_F(Train, StopsWhenTheStopFileIsThere)
{
    on_root([&] { write_file_atomically(path("STOP"), ""); });
    TrainOptions options = to("stopped");
    options.stop_file = path("STOP");
    const TrainReport report = together(options);
    EXPECT_EQ(report.outcome, Outcome::stopped);
    EXPECT_EQ(report.steps, 1);
    EXPECT_TRUE(fs::exists(path("stopped/checkpoints/step-000001.json")));
}

TEST_F(Train, ATornCheckpointMeansThePreviousOne)
{
    together(to("whole"));
    TrainOptions options = to("torn");
    options.checkpoint_every = 1;
    options.max_steps = 4;
    together(options);
    on_root([&] { fs::resize_file(path("torn/checkpoints/step-000004.h5"), 1000); });
    options.max_steps = 0;
    EXPECT_EQ(together(options).resumed_from_step, 3);
    EXPECT_EQ(weights("torn"), weights("whole"));
}

TEST_F(Train, ACompleteOutputIsLeftAlone)
{
    const TrainReport first = together(train_options_);
    const TrainReport second = together(train_options_);
    EXPECT_EQ(second.outcome, Outcome::already_complete);
    EXPECT_EQ(second.loss, first.loss);
    EXPECT_EQ(second.steps, first.steps);
    train_options_.learning_rate = {1e-4};
    expect_error(ExitCode::bad_data, {"train.learning-rate", "0.0001", "0.001"}, [&] { together(train_options_); });
    train_options_.output = path("model"); // would overwrite what it reads
    expect_error(ExitCode::usage, {"--output"}, [&] { together(train_options_); });
}

TEST_F(Train, ACheckpointOfOtherOptionsIsRefused)
{
    TrainOptions options = to("changed");
    options.max_steps = 1;
    together(options);
    options.beta = {0.2};
    expect_error(ExitCode::bad_data, {"train.beta", "--resume never"}, [&] { together(options); });
    options.resume = "never";
    EXPECT_EQ(together(options).resumed_from_step, 0);
}

TEST_F(Train, RefusesLogProbsOfSomethingElse)
{
    TrainOptions bad = train_options_;
    bad.common.dtype = "bf16";
    expect_error(ExitCode::bad_data, {"another dtype", "fp32", "bf16"}, [&] { together(bad); });
    bad = train_options_;
    bad.encoding.max_length = 90;
    expect_error(ExitCode::bad_data, {"another max-length"}, [&] { together(bad); });
    bad = train_options_;
    bad.encoding.max_prompt_length = 40;
    expect_error(ExitCode::bad_data, {"another max-prompt-length"}, [&] { together(bad); });
    bad = train_options_;
    bad.reference = "nothing";
    expect_error(ExitCode::bad_data, {"nothing"}, [&] { together(bad); });
    on_root([&] { test::make_tiny_model(path("other"), {.seed = 2}); });
    bad = train_options_;
    bad.policy = path("other");
    expect_error(ExitCode::bad_data, {"another model"}, [&] { together(bad); });
    rank(path("scored.h5"), path("scores.jsonl"), "replace");
    expect_error(ExitCode::bad_data, {"another choice of pairs", "selm_logp"}, [&] { together(train_options_); });
    EXPECT_FALSE(fs::exists(train_options_.output));
}

TEST_F(Train, AllStagesGiveTheSameUpdates)
{
    train_options_.max_grad_norm = 0.5;
    train_options_.tokens_per_microbatch = 60; // several passes, not as many on every rank
    TrainOptions options = to("alone");
    options.zero = 0;
    alone(options);
    const std::vector<json> expected = metrics("alone");
    ASSERT_GT(expected[1]["grad_norm"].get<double>(), 0.5); // so that clipping has work to do
    for (std::int64_t zero = 0; zero <= 3; ++zero)
        for (const std::int64_t node_ranks : {0, 1, 2}) {
            const std::string name = cat("zero", zero, "-", node_ranks);
            options = to(name);
            options.zero = zero;
            options.node_ranks = node_ranks;
            options.bucket_bytes = zero % 2 == 0 ? 4096 : 1 << 20;
            options.prefetch = node_ranks;
            together(options);
            EXPECT_LE(update_difference(name, "alone"), 1e-3) << name;
            const auto found = metrics(name);
            ASSERT_EQ(found.size(), expected.size());
            for (std::size_t i = 0; i < found.size(); ++i)
                EXPECT_NEAR(found[i]["grad_norm"].get<double>(), expected[i]["grad_norm"].get<double>(),
                            1e-4 * expected[i]["grad_norm"].get<double>())
                    << name;
        }
}

TEST_F(Train, ParametersCutInsideNodesGiveTheSameBits)
{
    for (const char* dtype : {"fp32", "bf16"}) {
        logprob_options_.common.dtype = train_options_.common.dtype = dtype;
        logprob_options_.iter = train_options_.iter;
        run_logprob(logprob_options_, test_world());
        TrainOptions options = to(cat("world-", dtype));
        options.zero = 3;
        options.node_ranks = 2;
        together(options);
        options.output = path(cat("node-", dtype));
        options.zero3_group = "node";
        options.prefetch = 2;
        together(options);
        EXPECT_EQ(weights(cat("world-", dtype)), weights(cat("node-", dtype)));
        options.output = path(cat("stage2-", dtype));
        options.zero = 2;
        together(options);
        EXPECT_EQ(weights(cat("world-", dtype)), weights(cat("stage2-", dtype)));
    }
}

TEST_F(Train, RecomputedActivationsGiveTheSameBits)
{
    train_options_.tokens_per_microbatch = 60;
    for (const std::int64_t zero : {1, 3}) {
        TrainOptions options = to(cat("kept", zero));
        options.zero = zero;
        together(options);
        options.output = path(cat("layers", zero));
        options.recompute = "layers";
        together(options);
        EXPECT_EQ(weights(cat("kept", zero)), weights(cat("layers", zero)));
        // A budget between what keeping all and what keeping nothing takes: the two runs' peaks tell them.
        const auto peak = [&](const std::string& name) { return metrics(name).back()["peak_bytes"].get<std::int64_t>(); };
        EXPECT_LT(peak(cat("layers", zero)), peak(cat("kept", zero)));
    }
}

TEST_F(Train, ARowThatCannotFitIsNamedBeforeTraining)
{
    train_options_.recompute = "auto";
    expect_error(ExitCode::usage, {"--recompute auto", "--activation-bytes"}, [&] { together(train_options_); });
    train_options_.activation_bytes = 1000;
    expect_error(ExitCode::configuration, {"row ", "prompt_id \"id", "tokens", "--activation-bytes is 1000"},
                 [&] { together(train_options_); });
    train_options_.recompute = "none";
    expect_error(ExitCode::configuration, {"use --recompute auto"}, [&] { together(train_options_); });
    EXPECT_FALSE(fs::exists(path("policy/metrics.jsonl")));
    train_options_.activation_bytes = 100 << 20;
    train_options_.recompute = "auto";
    EXPECT_EQ(together(train_options_).outcome, Outcome::done);
    together(to("plain"));
    EXPECT_EQ(weights("policy"), weights("plain"));
}

TEST_F(Train, GradientsInBf16StayClose)
{
    TrainOptions options = to("fp32");
    options.epochs = 1;
    together(options);
    for (const std::int64_t zero : {1, 2, 3}) {
        options.output = path(cat("bf16-", zero));
        options.zero = zero;
        options.accumulate_dtype = "bf16";
        together(options);
        const double difference = update_difference(cat("bf16-", zero), "fp32");
        EXPECT_GT(difference, 1e-6); // it does round
        EXPECT_LT(difference, 0.2);  // signs of tiny gradients flip, and AdamW's first steps are signs
    }
}

TEST_F(Train, FrozenTensorsKeepTheirBits)
{
    for (const std::int64_t zero : {1, 3}) {
        TrainOptions options = to(cat("frozen", zero));
        options.zero = zero;
        options.freeze = {"model.embed_tokens.weight", "*.layers.0.mlp.*", "*input_layernorm*"};
        together(options);
        const auto start = tensors(path("model")), trained = tensors(path(cat("frozen", zero)));
        for (const auto& [name, values] : start) {
            const bool frozen = name.find("embed_tokens") != std::string::npos ||
                                name.find("layers.0.mlp") != std::string::npos ||
                                name.find("input_layernorm") != std::string::npos;
            EXPECT_EQ(trained.at(name) == values, frozen) << name;
        }
        options.output = path(cat("resumed", zero)); // frozen tensors have no moments in a checkpoint
        options.max_steps = 2;
        together(options);
        options.max_steps = 0;
        together(options);
        EXPECT_EQ(weights(cat("resumed", zero)), weights(cat("frozen", zero)));
    }
    train_options_.freeze = {"*q_proj*"};
    expect_error(ExitCode::usage, {"--freeze", "q_proj", "k_proj", "one matrix"}, [&] { together(train_options_); });
    train_options_.freeze = {"nothing*"};
    expect_error(ExitCode::usage, {"--freeze nothing*", "no tensor"}, [&] { together(train_options_); });
    train_options_.freeze = {"*"};
    expect_error(ExitCode::usage, {"--freeze", "every tensor"}, [&] { together(train_options_); });
}

/// N ranks stop, M go on at another stage, and back: with the tests of 1 to 4 ranks all pairs are covered.
TEST_F(Train, FewerRanksGoOnAtAnotherStage)
{
    together(to("whole"));
    const int ranks = test_world().size();
    for (int fewer = 1; fewer <= ranks; ++fewer) {
        const auto group = test_world().split_node("ranks that go on", fewer);
        const bool first = test_world().rank() < fewer;
        for (const bool down : {true, false}) {
            TrainOptions options = to(cat(down ? "down" : "up", fewer));
            options.max_steps = 1 + fewer;
            options.zero = (fewer + (down ? 0 : 1)) % 4;
            if (down)
                together(options);
            else if (first)
                run_train(options, *group);
            test_world().barrier("stopped");
            options.max_steps = 0;
            options.zero = (options.zero + 1) % 4;
            if (!down)
                together(options);
            else if (first)
                run_train(options, *group);
            test_world().barrier("gone on");
            EXPECT_LE(update_difference(cat(down ? "down" : "up", fewer), "whole"), 1e-3) << fewer;
        }
    }
}

TEST_F(Train, RefusesStagesThatMakeNoSense)
{
    train_options_.accumulate_dtype = "bf16";
    train_options_.zero = 0;
    expect_error(ExitCode::usage, {"--accumulate-dtype", "--zero 1"}, [&] { together(train_options_); });
    train_options_.zero = 4;
    expect_error(ExitCode::usage, {"--zero 4", "0|1|2|3"}, [&] { together(train_options_); });
}

TEST_F(Train, ANonFiniteStepNamesRowsAndTheLastCheckpoint)
{
    train_options_.learning_rate = {1e30};
    train_options_.checkpoint_every = 1;
    expect_error(ExitCode::bad_data, {"step 2", "not finite", "prompt_id \"id", "checkpoints/step-000001.json"},
                 [&] { together(train_options_); });
    EXPECT_FALSE(fs::exists(path("policy/config.json")));
}

TEST_F(Train, AlphaZeroDoesNotEvaluateTheOptimismTerm)
{
    train_options_.alpha = {0};
    together(train_options_);
    for (const json& line : metrics("policy")) {
        EXPECT_EQ(line["loss/optimism"], 0.0);
        EXPECT_EQ(line["loss"], line["loss/dpo"]);
        EXPECT_TRUE(line["logps/generated"].is_null());
    }
}

TEST_F(Train, Bf16WeightsStartAtLogTwoToo)
{
    logprob_options_.common.dtype = train_options_.common.dtype = "bf16";
    logprob_options_.iter = train_options_.iter;
    run_logprob(logprob_options_, test_world());
    train_options_.save_dtype = "bf16";
    const TrainReport report = together(train_options_);
    EXPECT_NEAR(report.first_loss, std::numbers::ln2, 1e-15);
    EXPECT_LT(report.last_loss, report.first_loss);
    EXPECT_EQ(SafetensorsReader(path("policy")).tensors().at("model.norm.weight").dtype, "BF16");
}

TEST_F(Train, ListsAreReadByIteration)
{
    // The file says iteration 1: the first value counts, whatever follows.
    together(to("one"));
    TrainOptions options = to("list");
    options.learning_rate = {1e-3, 1};
    options.alpha = {0.1, 5};
    together(options);
    EXPECT_EQ(weights("one"), weights("list"));
}

/// Bradley-Terry on the chosen and rejected answers of prefs.h5.
class TrainReward : public Train {
  protected:
    void SetUp() override
    {
        Train::SetUp();
        train_options_.objective = "bradley-terry";
        train_options_.data = path("prefs.h5");
        train_options_.iter.clear();
        train_options_.output = path("reward");
        train_options_.global_batch = row_count;
        train_options_.epochs = 10;
        train_options_.learning_rate = {0.01};
    }
    /// Mean Bradley-Terry loss of the rows by the scores that ranking gives.
    double loss_by_ranking(const std::string& model)
    {
        RankOptions options;
        options.common = common();
        options.encoding = train_options_.encoding;
        options.iter = path("iter.h5");
        options.rankers = {"reward:" + path(model)};
        run_rank(options, test_world());
        double sum = 0;
        for (const auto& scores : IterationReader(path("iter.h5")).ranking_scores())
            sum += bradley_terry_loss(scores[1], scores[2]).loss;
        return sum / row_count;
    }
};

TEST_F(TrainReward, TheWrittenModelScoresAsTrained)
{
    for (const char* trainable : {"all", "head"}) {
        train_options_.trainable = trainable;
        train_options_.output = path(trainable);
        const TrainReport report = together(train_options_);
        EXPECT_NEAR(report.first_loss, std::numbers::ln2, 1e-15) << "the head starts at zero";
        EXPECT_LT(report.last_loss, 0.6) << trainable;
        // One more step at rate zero from the written model: its loss is that of the model, which ranking must see too.
        TrainOptions again = train_options_;
        again.policy = path(trainable);
        again.output = path(cat(trainable, "-again"));
        again.learning_rate = {0};
        again.epochs = 1;
        const TrainReport check = together(again);
        EXPECT_LT(check.first_loss, report.last_loss);
        EXPECT_NEAR(check.first_loss, loss_by_ranking(trainable), 1e-5) << trainable;
    }
}

TEST_F(TrainReward, HeadAloneLeavesTheDecoderAndDoesNotDependOnRanks)
{
    train_options_.trainable = "head";
    train_options_.global_batch = 3;
    together(train_options_);
    const auto start = tensors(path("model"));
    const auto trained = tensors(path("reward"));
    for (const auto& [name, values] : start)
        EXPECT_EQ(trained.at(name), values) << name;
    train_options_.output = path("alone");
    alone(train_options_);
    const auto by_one = tensors(path("alone"));
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < by_one.at("score.weight").size(); ++i) {
        const double a = by_one.at("score.weight")[i], b = trained.at("score.weight")[i];
        difference += (a - b) * (a - b);
        norm += b * b;
    }
    EXPECT_LE(std::sqrt(difference / norm), 1e-3);
}

TEST_F(TrainReward, OutputsOfTheDecoderAreKeptWhenStopped)
{
    train_options_.trainable = "head";
    together(train_options_);
    TrainOptions options = train_options_;
    options.output = path("parts");
    options.stop_file = path("STOP");
    on_root([&] { write_file_atomically(path("STOP"), ""); });
    const TrainReport stopped = together(options);
    EXPECT_EQ(stopped.outcome, Outcome::stopped);
    EXPECT_EQ(stopped.steps, 0);
    EXPECT_TRUE(fs::exists(path("parts/outputs.journal")));
    options.stop_file.clear();
    EXPECT_EQ(together(options).outcome, Outcome::done);
    on_root([&] { EXPECT_FALSE(fs::exists(path("parts/outputs.journal"))); });
    EXPECT_EQ(weights("parts"), weights("reward"));
    EXPECT_EQ(together(options).outcome, Outcome::already_complete);
}

TEST_F(TrainReward, RowsSelectAndBadRangesAreRefused)
{
    train_options_.rows = "2:7";
    EXPECT_EQ(together(train_options_).rows, 5);
    train_options_.output = path("other");
    for (const char* rows : {"7:2", "0:12", "a:b", "3", "-1:4"}) {
        train_options_.rows = rows;
        expect_error(ExitCode::usage, {"--rows", rows}, [&] { together(train_options_); });
    }
}

} // namespace
} // namespace selm
