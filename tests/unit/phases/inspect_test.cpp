// Every rule of verify_file is broken once; what is printed names what a reader looks for.

#include "selm/phases/inspect.hpp"

#include <cmath>
#include <limits>
#include <sstream>

#include <gtest/gtest.h>

#include "preference_rows.hpp"
#include "selm/data/iteration.hpp"
#include "selm/h5/publish.hpp"
#include "temporary_directory.hpp"

namespace selm {
namespace {

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

class InspectTest : public ::testing::Test {
  protected:
    void SetUp() override
    {
        prefs_path = directory.path("prefs.h5");
        write_preferences(prefs_path, test::preference_rows(4), {.config = "[import]\nlimit = 0\n", .config_hash = "h", .source_digest = "s", .extra = {}}, *comm);
        make_iteration(directory.path("iter.h5"));
    }

    /// Rows: sampled answer ranked best; none; made elsewhere, ranked in the middle; sampled, all scores equal.
    void make_iteration(const std::string& path)
    {
        iter_path = path;
        const PreferencesReader prefs(prefs_path);
        write_iteration(path, prefs, {0, 1, 2, 3},
                        {{.row = 0, .text = "new answer", .tokens = {5, 6}, .logprobs = {-0.5F, -0.25F}, .finish_reason = FinishReason::stop},
                         {.row = 1, .text = "", .tokens = {}, .logprobs = {}, .finish_reason = FinishReason::none},
                         {.row = 2, .text = "from afar", .tokens = {}, .logprobs = {}, .finish_reason = FinishReason::elsewhere},
                         {.row = 3, .text = "x", .tokens = {7}, .logprobs = {0.0F}, .finish_reason = FinishReason::length}},
                        {}, {.rows = 4, .busy_s = 1, .idle_s = 0}, *comm);
        const std::vector<RankedRow> ranked{
            {.position = 0, .scores = {3, 2, 1}, .ranks = {1, 2, 3}, .best = 0, .worst = 2, .rankers = {{.scores = {3, 2, 1}, .logits = {}}}},
            {.position = 1, .scores = {nan, 1, 2}, .ranks = {0, 2, 1}, .best = 2, .worst = 1, .rankers = {{.scores = {nan, 1, 2}, .logits = {}}}},
            {.position = 2, .scores = {2, 3, 1}, .ranks = {2, 1, 3}, .best = 1, .worst = 2, .rankers = {{.scores = {2, 3, 1}, .logits = {}}}},
            {.position = 3, .scores = {1, 1, 1}, .ranks = {1, 1, 1}, .best = 0, .worst = 0, .rankers = {{.scores = {1, 1, 1}, .logits = {}}}}};
        update_iteration(path, *comm, {}, [&](h5::File& file) {
            write_ranking(file, 4, ranked, {.rankers = {{.name = "reward", .pairwise = false, .attributes = {}}}, .update_rule = "best-worst", .attributes = {}}, *comm);
        });
        const LogProbAttributes of{.model = "m", .digest = "d", .engine = "aten", .encoding = "chat", .chat_format = "chatml", .dtype = "fp32",
                                   .pairs_digest = IterationReader(path).pairs_digest(), .max_length = 512, .max_prompt_length = 256, .extra = {}};
        update_iteration(path, *comm, {}, [&](h5::File& file) {
            write_logprobs(file, "reference", 4,
                           {{.position = 0, .sum = {-3, nan, -4}, .tokens = {2, 0, 3}}, {.position = 1, .sum = {nan, -1, -2}, .tokens = {0, 1, 1}},
                            {.position = 2, .sum = {-5, -6, -7}, .tokens = {1, 1, 1}}, {.position = 3, .sum = {-8, nan, nan}, .tokens = {1, 0, 0}}},
                           of, *comm);
        });
    }

    /// Replaces one dataset by values of the same shape and gives the message that verifying ends in.
    template<typename T>
    std::string verify_with(const std::string& path, const std::string& dataset, const std::vector<T>& values, const std::vector<std::int64_t>& row_shape = {})
    {
        const std::string copy = directory.path("damaged.h5");
        const h5::File source = h5::File::open(path);
        h5::write_and_publish(copy, *comm, [&](h5::File& file) {
            file.copy_tree(source, "/", {dataset});
            file.write_blocks(dataset, values, row_shape);
        });
        return verify(copy);
    }

    static std::string verify(const std::string& path)
    {
        try {
            verify_file(path);
        } catch (const Error& error) {
            EXPECT_EQ(error.code(), ExitCode::bad_data);
            EXPECT_NE(std::string(error.what()).find(path), std::string::npos) << error.what();
            return error.what();
        }
        return "verified";
    }

    static void expect(const std::string& text, const std::string& words)
    {
        EXPECT_NE(text.find(words), std::string::npos) << text;
    }

    std::string printed(const InspectOptions& options)
    {
        std::ostringstream out;
        run_inspect(options, *comm, out);
        return out.str();
    }

    test::TemporaryDirectory directory;
    std::unique_ptr<Communicator> comm = make_single_communicator();
    std::string prefs_path, iter_path;
};

TEST_F(InspectTest, WholeFilesPass)
{
    EXPECT_EQ(verify(prefs_path), "verified");
    EXPECT_EQ(verify(iter_path), "verified");
}

TEST_F(InspectTest, BrokenRowsAreFound)
{
    expect(verify_with<std::int64_t>(prefs_path, "/prompts/row_source", {1, 3, 3, 9}), "row 2: /prompts/row_source is 3 after 3");
    const auto bytes = static_cast<std::size_t>(h5::File::open(prefs_path).info("/responses/rejected/text").rows());
    expect(verify_with(prefs_path, "/responses/rejected/text", std::vector<std::uint8_t>(bytes, 0xff)), "row 0: /responses/rejected/text is not valid UTF-8 at byte 0");
    expect(verify_with<double>(prefs_path, "/scores", {1, 1, 1, 1, INFINITY, 1, 1, 1}, {2}), "row 2: /scores of the chosen answer is infinite");
    const auto roles = static_cast<std::size_t>(h5::File::open(prefs_path).info("/prompts/messages/role").rows());
    expect(verify_with(prefs_path, "/prompts/messages/role", std::vector<std::uint8_t>(roles, 2)), "row 0: its conversation is not");
    expect(verify_with<std::int64_t>(prefs_path, "/prompts/text_offsets", {0, 9, 3, 4, 5}), "/prompts/text_offsets falls");
}

TEST_F(InspectTest, BrokenGeneratedAnswersAreFound)
{
    expect(verify_with<std::int64_t>(iter_path, "/prompts/row", {0, 1, 1, 3}), "row 2: /prompts/row is 1, negative or there twice");
    expect(verify_with<float>(iter_path, "/responses/generated/logprobs", {-0.5F, NAN, 0.0F}), "row 0: /responses/generated/logprobs holds nan");
    expect(verify_with<float>(iter_path, "/responses/generated/logprobs", {-0.5F, 0.5F, 0.0F}), "row 0: /responses/generated/logprobs holds 0.5");
    expect(verify_with<std::int32_t>(iter_path, "/responses/generated/tokens", {5, 6, -7}), "row 3: /responses/generated/tokens holds -7");
    expect(verify_with<std::uint8_t>(iter_path, "/responses/generated/finish_reason", {0, 3, 2, 2}), "row 3: it has 1 generated tokens with finish_reason 2");
    expect(verify_with<std::uint8_t>(iter_path, "/responses/generated/finish_reason", {0, 0, 2, 1}), "row 1: it has 0 generated tokens with finish_reason 0");
    expect(verify_with<std::uint8_t>(iter_path, "/responses/generated/finish_reason", {0, 3, 3, 1}), "row 2: it has the text of a generated answer");
    expect(verify_with<std::uint8_t>(iter_path, "/responses/generated/finish_reason", {0, 3, 2, 4}), "finish_reason holds 4");
    expect(verify_with<std::int64_t>(iter_path, "/responses/generated/token_offsets", {0, 2, 2, 2, 4}), "token_offsets does not end at");
}

TEST_F(InspectTest, BrokenRankingsAndLogProbsAreFound)
{
    expect(verify_with<double>(iter_path, "/ranking/scores", {3, 2, 1, 0, 1, 2, 2, 3, 1, 1, 1, 1}, {3}), "row 1: /ranking/scores has a score of a generated answer that does not exist");
    expect(verify_with<double>(iter_path, "/ranking/scores", {3, 2, 1, nan, 1, 2, nan, 3, 1, 1, 1, 1}, {3}), "row 2: /ranking/scores has no score of candidate 0");
    expect(verify_with<double>(iter_path, "/ranking/rankers/reward/scores", {3, 2, 1, nan, 1, 2, 2, INFINITY, 1, 1, 1, 1}, {3}), "row 2: /ranking/rankers/reward/scores is infinite");
    expect(verify_with<std::int32_t>(iter_path, "/ranking/ranks", {1, 2, 3, 0, 2, 1, 2, 1, 3, 1, 2, 3}, {3}), "row 3: /ranking/ranks does not follow");
    expect(verify_with<std::int32_t>(iter_path, "/ranking/ranks", {1, 2, 3, 0, 2, 1, 2, 1}, {2}), "/ranking/ranks is not of shape [4, 3]");
    expect(verify_with<std::int32_t>(iter_path, "/pairs/best", {0, 2, 0, 0}), "row 2: /pairs has (0, 2) where the rule best-worst gives (1, 2)");
    expect(verify_with<std::int32_t>(iter_path, "/pairs/best", {0, 2, 3, 0}), "does not hold 4 candidate indices");
    expect(verify_with<double>(iter_path, "/logprobs/reference/sum", {-3, -1, -4, nan, -1, -2, -5, -6, -7, -8, nan, nan}, {3}), "row 0: /logprobs/reference has a log-prob of candidate 1");
    expect(verify_with<double>(iter_path, "/logprobs/reference/sum", {-3, nan, -4, nan, -1, nan, -5, -6, -7, -8, nan, nan}, {3}), "row 1: /logprobs/reference has sum nan");
    expect(verify_with<std::int32_t>(iter_path, "/logprobs/reference/tokens", {2, 0, 3, 0, 1, 1, 1, 0, 1, 1, 0, 0}, {3}), "row 2: /logprobs/reference has sum -6 over 0 tokens");
    std::vector<std::uint8_t> changed = h5::File::open(iter_path).read<std::uint8_t>("/responses/generated/text");
    changed[0] = 'X';
    expect(verify_with(iter_path, "/responses/generated/text", changed), "was computed of other pairs or answers");
}

TEST_F(InspectTest, OnlyFilesWithRulesCanBeVerified)
{
    const std::string other = directory.path("other.h5");
    h5::write_and_publish(other, *comm, [](h5::File& file) { file.write_blocks("/a", std::vector<double>{1, 2}); });
    expect(verify(other), "not a file that SELM wrote");
    expect(printed({.file = other}), "/a  float64 [2]");
    expect(verify(directory.write("text.h5", "text")), "is not an HDF5 file");
}

TEST_F(InspectTest, PrintsOverviewRowAndDigest)
{
    const std::string prefs = printed({.file = prefs_path});
    expect(prefs, "selm-prefs, format version 1, 4 rows");
    expect(prefs, "limit = 0");
    const std::string overview = printed({.file = iter_path});
    expect(overview, "selm-iteration, format version 1, 4 rows");
    expect(overview, "1 ended by themselves, 1 cut at the limit, 1 made elsewhere, 1 rows without");
    expect(overview, "ranking by reward, update rule best-worst");
    expect(overview, "best and worst are the same answer in 1 rows");
    expect(overview, "log-probs \"reference\" of m (fp32, aten, encoding chat, chatml, max length 512)");
    const std::string row = printed({.file = iter_path, .row = 0});
    expect(row, "--- generated  2 tokens, ended by itself  rank 1, score 3, BEST, reference log-prob -3 over 2 tokens\nnew answer\n");
    expect(row, "rank 3, score 1, WORST, reference log-prob -4 over 3 tokens\nrejected 0\n");
    expect(row, "--- user\n");
    EXPECT_EQ(printed({.file = iter_path, .digest = true}), data_digest(iter_path) + "\n");
    expect(printed({.file = iter_path, .verify = true}), "verified");
    EXPECT_THROW(printed({.file = iter_path, .row = 4}), Error);
    EXPECT_THROW(printed({.file = ""}), Error);
    EXPECT_THROW(printed({.file = iter_path, .row = 1, .verify = true}), Error);
}

} // namespace
} // namespace selm
