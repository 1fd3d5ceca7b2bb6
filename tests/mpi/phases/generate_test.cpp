#include "selm/phases/generate.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>

#include <gtest/gtest.h>

#include "generate_journal.hpp"
#include "phase_fixture.hpp"
#include "selm/base/error.hpp"
#include "selm/comm/agree.hpp"
#include "selm/data/iteration.hpp"
#include "selm/data/preferences.hpp"
#include "selm/phases/config_text.hpp"
#include "selm/phases/shared_model.hpp"
#include "selm/text/encoding.hpp"
#include "selm/text/utf8.hpp"
#include "tiny_model.hpp"

namespace selm {
namespace {

using test::test_world;
using test::TinyModel;

constexpr std::int64_t row_count = 13;

std::vector<PreferenceRow> make_rows()
{
    std::vector<PreferenceRow> rows;
    for (std::int64_t i = 0; i < row_count; ++i) {
        PreferenceRow row;
        row.row_source = i;
        row.id = cat("id", i);
        row.prompt =
            cat("Question ", i, ": ", std::string(static_cast<std::size_t>(i * 17 % 97), 'a' + static_cast<char>(i)));
        row.messages = {{Role::user, row.prompt}};
        if (i % 3 == 0)
            row.messages.insert(row.messages.begin(), {Role::system, "Be brief."});
        row.chosen = "good";
        row.rejected = "bad";
        rows.push_back(row);
    }
    return rows;
}

/// One directory for all ranks, made and removed by rank 0, with prefs.h5 and a model.
class Generate : public test::PhaseFixture<> {
  protected:
    void SetUp() override
    {
        PhaseFixture::SetUp();
        Communicator& world = test_world();
        on_root([&] { test::make_tiny_model(path("model")); });
        write_preferences(path("prefs.h5"), world.is_root() ? make_rows() : std::vector<PreferenceRow>(), {}, world);
        options_.common.progress = "off";
        options_.common.dtype = "fp32";
        options_.data = path("prefs.h5");
        options_.policy = path("model");
        options_.output = path("iter.h5");
        options_.max_new_tokens = 24;
    }
    /// What rank 0 gets alone.
    void run_alone(const GenerateOptions& options)
    {
        on_root([&] {
            const auto single = make_single_communicator();
            run_generate(options, *single);
        });
    }
    static std::optional<Error> error_of(const GenerateOptions& options)
    {
        return PhaseFixture::error_of([&] { run_generate(options, test_world()); });
    }
    static void expect_error(const GenerateOptions& options, ExitCode code, const std::vector<std::string>& words)
    {
        PhaseFixture::expect_error(code, words, [&] { run_generate(options, test_world()); });
    }

    GenerateOptions options_;
};

/// Engines of this build and machine whose rows do not depend on their company.
std::vector<std::string> row_invariant_engines()
{
    std::vector<std::string> names;
    for (const char* name : {"aten", "xsmm"}) {
        try {
            if (make_engine({.engine = name})->row_invariant())
                names.emplace_back(name);
        } catch (const Error&) { // not on this machine
        }
    }
    return names;
}

TEST_F(Generate, DataDependOnNeitherRanksNorSlots)
{
    const auto engines = row_invariant_engines();
    if (engines.empty())
        GTEST_SKIP() << "no engine here is row invariant";
    struct Variant {
        std::string dtype;
        double temperature;
    };
    for (const std::string& engine : engines) {
        for (const Variant& variant : {Variant{"fp32", 0}, Variant{"bf16", 0.8}}) {
            const std::string name = cat(engine, "-", variant.dtype);
            GenerateOptions options = options_;
            options.common.engine = engine;
            options.common.dtype = variant.dtype;
            options.temperature = variant.temperature;
            options.output = path(cat(name, "-alone.h5"));
            options.slots = 1;
            run_alone(options);
            const std::string expected = digest(options.output);
            for (const std::int64_t slots : {1, 3, 16}) {
                options.slots = slots;
                options.prefill_tokens = slots * 40;
                options.share_prefixes = slots != 3; // prompts begin alike: system and role
                options.output = path(cat(name, "-", slots, ".h5"));
                const GenerateReport report = run_generate(options, test_world());
                EXPECT_EQ(report.outcome, Outcome::done);
                EXPECT_EQ(report.generated_rows, row_count);
                EXPECT_EQ(digest(options.output), expected) << name << " slots " << slots;
                if (engine == "xsmm") { // the other engine copies whole tiles alone
                    EXPECT_EQ(report.copied_tokens > 0, slots == 16) << name << " slots " << slots;
                }
            }
        }
    }
}

TEST_F(Generate, RecipeReadsTheTokenizersOwnTokensAndStopsAtEos)
{
    on_root([&] {
        const std::string file = path("model") + "/tokenizer.json", none = "\"post_processor\": null";
        std::string text = read_file(file);
        ASSERT_NE(text.find(none), std::string::npos);
        text.replace(text.find(none), none.size(),
                     R"("post_processor": {"type": "TemplateProcessing",
 "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
 "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
 "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}})");
        write_file_atomically(file, text);
    });
    options_.encoding.encoding = "recipe";
    options_.temperature = 1;
    run_generate(options_, test_world());
    const auto model = SharedModel::from_directory(options_.policy, options_.common, test_world());
    const IterationReader file(options_.output);
    const Tokenizer tokenizer = Tokenizer::from_directory(options_.policy);
    for (std::int64_t i = 0; i < file.rows(); ++i) {
        const GeneratedAnswer answer = file.row(i).generated;
        auto prompt = encode_prompt_chat(tokenizer, ChatFormat::by_name("chatml"), file.messages(i), 512);
        prompt.insert(prompt.begin(), 1);
        PackedBatch batch;
        const Branch branch{answer.tokens, 0};
        batch.add_scored(prompt, std::span(&branch, 1));
        const std::vector<float> expected = model->decoder().log_probs(batch);
        for (std::size_t t = 0; t < expected.size(); ++t)
            EXPECT_NEAR(answer.logprobs[t], expected[t], 2e-4) << "row " << i << " token " << t;
    }
    // The same answers up to a token that is now EOS; 2 is the eos_token_id of config.json and still ends them.
    const std::int32_t eos = file.tokens(0).at(1);
    options_.encoding.eos_token = std::to_string(eos);
    options_.output = path("other.h5");
    run_generate(options_, test_world());
    const IterationReader other(options_.output);
    std::int64_t at_eos = 0;
    for (std::int64_t i = 0; i < file.rows(); ++i) {
        std::vector<std::int32_t> expected = file.tokens(i);
        const auto end = std::find(expected.begin(), expected.end(), eos);
        at_eos += end != expected.end();
        expected.erase(end == expected.end() ? end : end + 1, expected.end());
        EXPECT_EQ(other.tokens(i), expected) << i;
        EXPECT_EQ(other.finish_reason(i) == FinishReason::stop, expected.back() == eos || expected.back() == 2) << i;
    }
    EXPECT_GT(at_eos, 0);
}

TEST_F(Generate, StoresAnswersWithTheirLogProbs)
{
    options_.temperature = 1;
    options_.iteration = 3;
    const GenerateReport report = run_generate(options_, test_world());
    const auto model = SharedModel::from_directory(options_.policy, options_.common, test_world());
    const IterationReader file(options_.output);
    const Tokenizer tokenizer = Tokenizer::from_directory(options_.policy);
    ASSERT_EQ(file.rows(), row_count);
    EXPECT_EQ(file.attributes().iteration, 3);
    EXPECT_EQ(file.attributes().policy_digest, model_digest(options_.policy));
    EXPECT_FALSE(Journal::exists(options_.output));
    std::int64_t tokens = 0, ended = 0;
    for (std::int64_t i = 0; i < file.rows(); ++i) {
        const IterationRow row = file.row(i);
        const GeneratedAnswer& answer = row.generated;
        tokens += static_cast<std::int64_t>(answer.tokens.size());
        ended += answer.finish_reason == FinishReason::stop;
        EXPECT_EQ(answer.finish_reason == FinishReason::stop, answer.tokens.back() == 2) << i;
        EXPECT_EQ(std::count(answer.tokens.begin(), answer.tokens.end(), 2),
                  answer.finish_reason == FinishReason::stop);
        EXPECT_EQ(answer.text, strip_whitespace(tokenizer.decode(answer.tokens)));
        // Independent of the sampler: the packed pass over prompt and answer.
        const auto prompt = encode_prompt_chat(tokenizer, ChatFormat::by_name("chatml"), row.messages, 512);
        PackedBatch batch;
        const Branch branch{answer.tokens, 0};
        batch.add_scored(prompt, std::span(&branch, 1));
        const std::vector<float> expected = model->decoder().log_probs(batch);
        ASSERT_EQ(expected.size(), answer.logprobs.size());
        for (std::size_t t = 0; t < expected.size(); ++t)
            EXPECT_NEAR(answer.logprobs[t], expected[t], 2e-4) << "row " << i << " token " << t;
    }
    EXPECT_EQ(report.new_tokens, tokens);
    EXPECT_EQ(report.stopped_by_end, ended);
    EXPECT_EQ(report.stopped_by_length, row_count - ended);
}

TEST_F(Generate, TakesOverJournalledRowsAndGeneratesOnlyTheOthers)
{
    Communicator& world = test_world();
    run_alone(options_);
    const IterationReader whole(options_.output);
    GenerateOptions options = options_;
    options.output = path("resumed.h5");
    {
        GenerateOptions bound = options;
        bound.iteration = bound.portion;
        const auto model = SharedModel::from_directory(options.policy, options.common, world);
        const std::string data = root_string(world, "digest", [&] { return PreferencesReader(options.data).digest(); });
        Journal journal(options.output,
                        generation_binding(config_text(bound).recipe_hash, model->digest(), data, model->engine_key()),
                        world);
        for (std::int64_t row = 0; row < 7; ++row) {
            if (row % world.size() != world.rank())
                continue;
            SampledAnswer answer{.row = row, .tokens = whole.tokens(row), .log_probs = whole.token_logprobs(row)};
            answer.ended = whole.finish_reason(row) == FinishReason::stop;
            if (row == 4) { // what the model would not say
                answer.tokens = {50, 51, 2};
                answer.log_probs = {-1, -2, -3};
                answer.ended = true;
            }
            journal.append(row, to_payload(answer));
        }
        journal.sync();
        world.barrier("journal written");
    }
    const GenerateReport report = run_generate(options, world);
    EXPECT_EQ(report.resumed_rows, 7);
    EXPECT_EQ(report.generated_rows, row_count - 7);
    const IterationReader resumed(options.output);
    EXPECT_EQ(resumed.tokens(4), (std::vector<std::int32_t>{50, 51, 2}));
    for (std::int64_t row = 0; row < row_count; ++row) {
        if (row == 4)
            continue;
        EXPECT_EQ(resumed.tokens(row), whole.tokens(row)) << row;
        EXPECT_EQ(resumed.token_logprobs(row), whole.token_logprobs(row)) << row;
        EXPECT_EQ(resumed.answer(row, Candidate::generated), whole.answer(row, Candidate::generated)) << row;
    }
    EXPECT_FALSE(Journal::exists(options.output));
}

TEST_F(Generate, RefusesAJournalOfAnotherRecipe)
{
    GenerateOptions stopped = options_;
    {
        Journal journal(options_.output, {{"recipe", "another"}, {"policy", "p"}, {"prompts", "d"}, {"engine", "e"}},
                        test_world());
        if (test_world().is_root())
            journal.append(0, to_payload({.row = 0, .tokens = {1}, .log_probs = {0}}));
        journal.sync();
        test_world().barrier("journal written");
    }
    expect_error(options_, ExitCode::bad_data, {"recipe"});
}

TEST_F(Generate, StopsWhenTheStopFileIsThereAndGoesOnLater)
{
    options_.stop_file = path("STOP");
    on_root([&] { std::ofstream(path("STOP")) << "\n"; });
    const GenerateReport stopped = run_generate(options_, test_world());
    EXPECT_EQ(stopped.outcome, Outcome::stopped);
    EXPECT_LT(stopped.generated_rows, row_count);
    EXPECT_FALSE(std::filesystem::exists(options_.output));
    test_world().barrier("stopped");
    on_root([&] { std::filesystem::remove(path("STOP")); });
    const GenerateReport rest = run_generate(options_, test_world());
    EXPECT_EQ(rest.outcome, Outcome::done);
    EXPECT_EQ(rest.resumed_rows, stopped.generated_rows);
    EXPECT_EQ(rest.generated_rows + rest.resumed_rows, row_count);
}

TEST_F(Generate, FindsACompleteOutputAndRefusesOneMadeOtherwise)
{
    const GenerateReport first = run_generate(options_, test_world());
    options_.slots = 2; // does not matter
    const GenerateReport second = run_generate(options_, test_world());
    EXPECT_EQ(second.outcome, Outcome::already_complete);
    EXPECT_EQ(second.rows, row_count);
    EXPECT_EQ(second.generated_rows, 0);
    EXPECT_EQ(second.stopped_by_end, first.stopped_by_end);
    EXPECT_EQ(second.stopped_by_length, first.stopped_by_length);

    GenerateOptions other = options_;
    other.max_new_tokens = 5;
    expect_error(other, ExitCode::bad_data, {"iter.h5", "other options"});
    other = options_;
    other.policy = path("other_model");
    on_root([&] { test::make_tiny_model(path("other_model"), {.seed = 2}); });
    expect_error(other, ExitCode::bad_data, {"iter.h5", "another policy"});
    other = options_;
    other.output = options_.data;
    expect_error(other, ExitCode::bad_data, {"prefs.h5"});
}

TEST_F(Generate, TakesOnePortion)
{
    options_.portions = 4; // of 3 rows, one row unused
    for (std::int64_t portion = 1; portion <= 4; ++portion) {
        options_.portion = portion;
        options_.output = path(cat("iter", portion, ".h5"));
        EXPECT_EQ(run_generate(options_, test_world()).rows, 3);
        const IterationReader file(options_.output);
        EXPECT_EQ(file.rows(), 3);
        EXPECT_EQ(file.row_key(0), 3 * (portion - 1));
        EXPECT_EQ(file.attributes().portion, portion);
        EXPECT_EQ(file.attributes().iteration, portion);
    }
    options_.portion = 5;
    expect_error(options_, ExitCode::usage, {"--portion 5"});
    options_.portions = 99;
    expect_error(options_, ExitCode::bad_data, {"no rows"});
}

TEST_F(Generate, APromptThatFillsTheContextStopsOrIsSkipped)
{
    const Tokenizer tokenizer = Tokenizer::from_directory(options_.policy);
    std::vector<std::int64_t> lengths;
    for (const PreferenceRow& row : make_rows())
        lengths.push_back(static_cast<std::int64_t>(
            encode_prompt_chat(tokenizer, ChatFormat::by_name("chatml"), row.messages, 1'000'000).size()));
    std::vector<std::int64_t> sorted = lengths;
    std::sort(sorted.begin(), sorted.end());
    const std::int64_t context = sorted[8]; // a prompt of this length leaves no room
    const auto first =
        std::find_if(lengths.begin(), lengths.end(), [&](std::int64_t length) { return length >= context; });
    on_root([&] { test::make_tiny_model(path("short"), {.max_positions = context}); });
    options_.policy = path("short");
    expect_error(options_, ExitCode::bad_data,
                 {cat("row ", first - lengths.begin()), cat("id", first - lengths.begin()), cat(context),
                  "--on-long-prompt skip"});
    EXPECT_FALSE(Journal::exists(options_.output));

    options_.on_long_prompt = "skip";
    options_.max_new_tokens = 1024;
    const GenerateReport report = run_generate(options_, test_world());
    EXPECT_EQ(report.outcome, Outcome::done);
    const IterationReader file(options_.output);
    std::int64_t none = 0, filled = 0;
    for (std::int64_t i = 0; i < file.rows(); ++i) {
        const std::int64_t prompt = lengths[static_cast<std::size_t>(i)];
        none += !file.has_generated(i);
        EXPECT_EQ(file.has_generated(i), prompt < context) << i;
        if (file.finish_reason(i) == FinishReason::length) {
            EXPECT_EQ(prompt + file.token_count(i), context) << i;
            ++filled;
        }
    }
    EXPECT_GE(none, 5);
    EXPECT_EQ(report.skipped_rows, none);
    EXPECT_EQ(report.generated_rows, row_count - none);
    EXPECT_GT(filled, 0);
}

TEST_F(Generate, RefusesATokenizerThatTheModelLacksRowsFor)
{
    on_root([&] { test::make_tiny_model(path("small"), {.vocabulary = 200}); });
    options_.policy = path("small");
    expect_error(options_, ExitCode::configuration, {"small", "275", "200"});
    options_.policy = path("nowhere");
    expect_error(options_, ExitCode::configuration, {"nowhere"});
    options_.policy = path("model");
    options_.encoding.chat_format = "no-such-format";
    expect_error(options_, ExitCode::configuration, {"no-such-format", "chatml"});
}

TEST_F(Generate, LogitsThatAreNotFiniteEndAllRanksWithTheRow)
{
    on_root([&] { test::make_tiny_model(path("damaged"), {.damaged = true}); });
    options_.policy = path("damaged");
    expect_error(options_, ExitCode::bad_data, {"row ", "not finite"});
    EXPECT_FALSE(std::filesystem::exists(options_.output));
}

TEST_F(Generate, TakesResponsesMadeElsewhereAsTheyAre)
{
    options_.policy.clear();
    options_.portion = 2;
    options_.portions = 4; // rows 3, 4, 5
    options_.responses = path("responses.jsonl");
    const auto write = [&](const std::string& content) {
        on_root([&] { std::ofstream(options_.responses) << content; });
    };
    const std::string four = R"({"prompt_id": "id4", "response": ""})"
                             "\n",
                      three = R"({"response": "  as it is\n", "prompt_id": "id3"})"
                              "\n",
                      five = R"({"prompt_id": "id5", "response": "five"})"
                             "\n",
                      other = R"({"prompt_id": "id0", "response": "of another portion"})"
                              "\n";
    write(four + three + five + "\n" + other);
    EXPECT_EQ(run_generate(options_, test_world()).outcome, Outcome::done);
    const IterationReader file(options_.output);
    ASSERT_EQ(file.rows(), 3);
    EXPECT_EQ(file.answer(0, Candidate::generated), "  as it is\n");
    EXPECT_EQ(file.answer(1, Candidate::generated), "");
    EXPECT_EQ(file.answer(2, Candidate::generated), "five");
    for (std::int64_t i = 0; i < 3; ++i) {
        EXPECT_EQ(file.finish_reason(i), FinishReason::elsewhere);
        EXPECT_EQ(file.token_count(i), 0);
    }
    EXPECT_EQ(run_generate(options_, test_world()).outcome, Outcome::already_complete);
    write(four + three + five);
    expect_error(options_, ExitCode::bad_data, {"other responses"});

    options_.output = path("never.h5");
    write(four + three);
    expect_error(options_, ExitCode::bad_data, {"responses.jsonl", "row 5", "id5"});
    write(four + three + five + four);
    expect_error(options_, ExitCode::bad_data, {"responses.jsonl line 4", "id4", "line 1"});
    write(four + three + five +
          R"({"prompt_id": "stranger", "response": "x"})"
          "\n");
    expect_error(options_, ExitCode::bad_data, {"responses.jsonl line 4", "stranger"});
    write(four + "{\"prompt_id\": \"id3\"}\n" + five);
    expect_error(options_, ExitCode::bad_data, {"responses.jsonl line 2", "response"});
    write(four + std::string(200'000, '[') + "\n");
    expect_error(options_, ExitCode::bad_data, {"responses.jsonl line 2"});
    write(four + "{\"prompt_id\": \"id3\", \"response\": \"\xff\"}\n");
    expect_error(options_, ExitCode::bad_data, {"responses.jsonl line 2", "UTF-8"});
    options_.responses = path("missing.jsonl");
    expect_error(options_, ExitCode::bad_data, {"missing.jsonl"});
    EXPECT_FALSE(std::filesystem::exists(options_.output));
}

TEST_F(Generate, ResponsesNoneWritesRowsWithoutAnswers)
{
    options_.policy.clear();
    options_.responses = "none";
    const GenerateReport report = run_generate(options_, test_world());
    EXPECT_EQ(report.rows, row_count);
    EXPECT_EQ(report.skipped_rows, 0);
    const IterationReader file(options_.output);
    ASSERT_EQ(file.rows(), row_count);
    for (std::int64_t i = 0; i < row_count; ++i)
        EXPECT_EQ(file.finish_reason(i), FinishReason::none);
}

TEST_F(Generate, SaysWhatIsMissingBeforeAnyWork)
{
    GenerateOptions options = options_;
    options.data = path("no.h5");
    expect_error(options, ExitCode::bad_data, {"no.h5"});
    options = options_;
    options.output = path("no/such/iter.h5");
    expect_error(options, ExitCode::usage, {"no/such"});
    options = options_;
    options.output.clear();
    expect_error(options, ExitCode::usage, {"--output"});
    options = options_;
    options.temperature = -1;
    expect_error(options, ExitCode::usage, {"--temperature"});
    options = options_;
    options.top_p = 0;
    expect_error(options, ExitCode::usage, {"--top-p"});
    options = options_;
    options.encoding.encoding = "recipe";
    options.encoding.eos_token = "<nothing>";
    expect_error(options, ExitCode::configuration, {"--eos-token", "<nothing>"});
}

} // namespace
} // namespace selm
