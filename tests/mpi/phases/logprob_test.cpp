#include "selm/phases/logprob.hpp"

#include <filesystem>

#include "packed_rows.hpp"
#include "selm/phases/shared_model.hpp"
#include "training_fixture.hpp"

namespace selm {
namespace {

using test::test_world;

class LogProb : public test::TrainingFixture {
  protected:
    std::string digest(const std::string& file)
    {
        return root_string(test_world(), "digest", [&] { return IterationReader(file).digest(); });
    }
    void run_alone(const LogProbOptions& options)
    {
        on_root([&] {
            const auto single = make_single_communicator();
            run_logprob(options, *single);
        });
    }
    std::string copy_of_rows(const std::string& name)
    {
        on_root([&] { std::filesystem::copy_file(path("iter.h5"), path(name)); });
        return path(name);
    }
};

TEST_F(LogProb, DataDependOnNeitherRanksNorMicrobatches)
{
    for (const auto& [dtype, encoding] :
         {std::pair("fp32", "chat"), std::pair("bf16", "chat"), std::pair("fp32", "recipe")}) {
        LogProbOptions options = logprob_options_;
        options.common.dtype = dtype;
        options.encoding.encoding = encoding;
        options.tokens_per_microbatch = 1;
        options.iter = copy_of_rows(cat("alone-", dtype, encoding, ".h5"));
        run_alone(options);
        const std::string expected = digest(options.iter);
        for (const std::int64_t tokens : {1, 150, 100000}) {
            options.tokens_per_microbatch = tokens;
            options.iter = copy_of_rows(cat("together-", dtype, encoding, "-", tokens, ".h5"));
            const LogProbReport report = run_logprob(options, test_world());
            EXPECT_EQ(report.outcome, Outcome::done);
            EXPECT_EQ(report.rows, row_count);
            EXPECT_EQ(digest(options.iter), expected) << dtype << " " << encoding << " " << tokens;
        }
    }
}

TEST_F(LogProb, SumsAreThoseOfEachAnswerAloneAndOthersAreNaN)
{
    run_logprob(logprob_options_, test_world());
    const auto model = SharedModel::from_directory(path("model"), common(), test_world());
    const RowEncoder encoder(path("model"), logprob_options_.encoding, model->config());
    const IterationReader file(path("iter.h5"));
    const auto stored = file.logprobs("reference");
    const auto pairs = file.pairs();
    int absent = 0;
    for (std::int64_t i = 0; i < row_count; ++i) {
        const auto row = static_cast<std::size_t>(i);
        for (std::int32_t c = 0; c < candidates_per_row; ++c) {
            const bool exists = c != 0 || file.has_generated(i);
            const bool wanted = exists && (c == 0 || c == pairs.best[row] || c == pairs.worst[row]);
            const double sum = stored.sum[row][static_cast<std::size_t>(c)];
            const auto tokens = stored.tokens[row][static_cast<std::size_t>(c)];
            EXPECT_EQ(std::isnan(sum), !wanted) << i << " " << c;
            EXPECT_EQ(tokens == 0, !wanted) << i << " " << c;
            absent += wanted ? 0 : 1;
            if (!wanted)
                continue;
            // The plain way: prompt and this answer as one sequence without branches.
            const PackedRow packed = encoder.encode(file, i, RowPair{c, c, false});
            std::vector<std::int32_t> all = packed.trunk;
            all.insert(all.end(), packed.branches[0].tokens.begin(), packed.branches[0].tokens.end());
            PackedBatch batch;
            batch.add_scored(std::span(all).first(1),
                             std::vector<Branch>{
                                 {{all.begin() + 1, all.end()}, static_cast<std::int64_t>(packed.trunk.size()) - 1}});
            double expected = 0;
            for (const float value : model->decoder().log_probs(batch))
                expected += static_cast<double>(value);
            EXPECT_EQ(tokens, static_cast<std::int32_t>(packed.branches[0].tokens.size()));
            EXPECT_NEAR(sum, expected, 2e-5 * std::abs(expected)) << i << " " << c; // two ways through fp32 attention
        }
    }
    EXPECT_GT(absent,
              2); // the two rows without an answer, and the third answer of rows whose generated one is in the pair
}

TEST_F(LogProb, PromptsThatDifferGiveTheSumsOfEachSequenceAlone)
{
    const auto model = SharedModel::from_directory(path("model"), common(), test_world());
    // A prompt that ends otherwise before one answer; prompts with nothing in common.
    const std::vector<SequenceRow> rows{
        {LabelledSequence{{1, 40, 41, 42, 50, 51}, 4}, LabelledSequence{{1, 40, 41, 60, 61}, 3},
         LabelledSequence{{1, 40, 41, 42, 70}, 4}},
        {std::nullopt, LabelledSequence{{40, 41, 42, 50}, 3}, LabelledSequence{{41, 42, 60, 61, 62}, 2}}};
    PackedBatch batch;
    for (const SequenceRow& row : rows) {
        const PackedRow packed = pack_row(0, row, {row[0].has_value(), true, true});
        EXPECT_EQ(packed.trunk.size(), row[0] ? 3U : 0U);
        batch.add_scored(packed.trunk, packed.branches);
    }
    const std::vector<float> values = model->decoder().log_probs(batch);
    std::vector<double> sums(5, 0.0);
    for (std::size_t i = 0; i < values.size(); ++i)
        sums[static_cast<std::size_t>(batch.owner[i])] += static_cast<double>(values[i]);
    std::size_t next = 0;
    for (const SequenceRow& row : rows)
        for (const auto& sequence : row) {
            if (!sequence)
                continue;
            PackedBatch alone;
            const Branch rest{{sequence->ids.begin() + 1, sequence->ids.end()}, sequence->label_start - 1};
            alone.add_scored(std::span(sequence->ids).first(1), std::span(&rest, 1));
            double expected = 0;
            for (const float value : model->decoder().log_probs(alone))
                expected += static_cast<double>(value);
            EXPECT_NEAR(sums[next++], expected, 2e-5 * std::abs(expected));
        }
    EXPECT_EQ(next, sums.size());
}

TEST_F(LogProb, AttributesSayWhatTheyWereMadeOf)
{
    run_logprob(logprob_options_, test_world());
    const IterationReader file(path("iter.h5"));
    const LogProbAttributes a = file.logprobs("reference").attributes;
    EXPECT_EQ(a.digest, model_digest(path("model")));
    EXPECT_EQ(a.encoding, "chat");
    EXPECT_EQ(a.chat_format, "chatml");
    EXPECT_EQ(a.dtype, "fp32");
    EXPECT_EQ(a.pairs_digest, file.pairs_digest());
    EXPECT_EQ(a.max_length, 96);
    EXPECT_EQ(a.max_prompt_length, 48);
}

TEST_F(LogProb, ASecondRunIsComplete)
{
    run_logprob(logprob_options_, test_world());
    const std::string before = digest(path("iter.h5"));
    EXPECT_EQ(run_logprob(logprob_options_, test_world()).outcome, Outcome::already_complete);
    EXPECT_EQ(digest(path("iter.h5")), before);
    logprob_options_.encoding.max_length = 60; // other values: made anew
    EXPECT_EQ(run_logprob(logprob_options_, test_world()).outcome, Outcome::done);
    EXPECT_NE(digest(path("iter.h5")), before);
}

TEST_F(LogProb, SaysWhatWasMultiplied)
{
    logprob_options_.common.dtype = "bf16";
    run_logprob(logprob_options_, test_world());
    const auto engine = make_engine(engine_options(logprob_options_.common, DType::bf16));
    EXPECT_EQ(IterationReader(path("iter.h5")).logprobs(logprob_options_.name).attributes.engine, engine->numerics());
}

TEST_F(LogProb, StopsSavedAndGoesOnWithAnyNumberOfRanks)
{
    LogProbOptions whole = logprob_options_;
    whole.iter = copy_of_rows("whole.h5");
    run_logprob(whole, test_world());

    logprob_options_.stop_file = path("STOP");
    logprob_options_.tokens_per_microbatch = 1;
    on_root([&] { write_file_atomically(path("STOP"), ""); });
    const LogProbReport stopped = run_logprob(logprob_options_, test_world());
    EXPECT_EQ(stopped.outcome, Outcome::stopped);
    EXPECT_FALSE(IterationReader(path("iter.h5")).has_logprobs("reference"));

    logprob_options_.stop_file.clear();
    on_root([&] {
        const auto single = make_single_communicator();
        const LogProbReport rest = run_logprob(logprob_options_, *single);
        EXPECT_EQ(rest.outcome, Outcome::done);
        EXPECT_GT(rest.resumed_rows, 0);
    });
    EXPECT_EQ(digest(path("iter.h5")), digest(path("whole.h5")));
}

TEST_F(LogProb, RefusesWhatItCannotScore)
{
    LogProbOptions bad = logprob_options_;
    bad.model = path("nowhere");
    expect_error(ExitCode::configuration, {"nowhere"}, [&] { run_logprob(bad, test_world()); });
    bad = logprob_options_;
    bad.encoding.max_length = 100000;
    expect_error(ExitCode::configuration, {"--max-length 100000"}, [&] { run_logprob(bad, test_world()); });
    bad = logprob_options_;
    bad.iter = path("unranked.h5");
    make_iteration(path("prefs.h5"), bad.iter);
    expect_error(ExitCode::bad_data, {"unranked.h5", "selm_rank"}, [&] { run_logprob(bad, test_world()); });
    on_root([&] { test::make_tiny_model(path("damaged"), {.damaged = true}); });
    bad = logprob_options_;
    bad.model = path("damaged");
    expect_error(ExitCode::bad_data, {"prompt_id \"id", "not finite"}, [&] { run_logprob(bad, test_world()); });
}

} // namespace
} // namespace selm
