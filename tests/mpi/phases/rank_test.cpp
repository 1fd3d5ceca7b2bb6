#include "selm/phases/rank.hpp"

#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <optional>
#include <set>
#include <sstream>

#include <gtest/gtest.h>

#include "phase_fixture.hpp"
#include "selm/base/error.hpp"
#include "selm/base/stop.hpp"
#include "selm/comm/agree.hpp"
#include "selm/data/iteration.hpp"
#include "selm/data/journal.hpp"
#include "selm/data/preferences.hpp"
#include "selm/phases/inspect.hpp"
#include "selm/phases/logprob.hpp"
#include "tiny_model.hpp"

namespace selm {
namespace {

using test::test_world;
using Scores = std::array<double, 3>;

constexpr std::int64_t row_count = 26; // more than the ranks can take before a stop request is seen
constexpr double no_score = std::numeric_limits<double>::quiet_NaN();

bool has_answer(std::int64_t row)
{
    return row != 3 && row != 8;
}

/// Scores of the test's scores file: the generated answer is best, middle or worst in turn; ties in rows 5 (best) and 6 (all).
Scores scores_of(std::int64_t row)
{
    if (row == 5)
        return {2, 2, 1};
    if (row == 6)
        return {1, 1, 1};
    return {has_answer(row) ? static_cast<double>(row % 3) : no_score, 0.5 + static_cast<double>(row % 2), 0.25};
}

bool same(const Scores& a, const Scores& b)
{
    for (std::size_t c = 0; c < a.size(); ++c)
        if (a[c] != b[c] && !(std::isnan(a[c]) && std::isnan(b[c])))
            return false;
    return true;
}

/// An iteration file with answers made elsewhere (two rows have none), scores of all rows, and a reward model.
class Rank : public test::PhaseFixture<> {
  protected:
    void SetUp() override
    {
        PhaseFixture::SetUp();
        on_root([&] { write_preferences(path("prefs.h5"), test::question_rows(row_count, 60, 50), {}, *make_single_communicator()); });
        make_iteration(path("iter.h5"));
        on_root([&] {
            std::ofstream out(path("scores.jsonl"));
            for (std::int64_t i = row_count - 1; i >= 0; --i) // the order of its lines does not matter
                out << score_line(cat(R"("prompt_id": "id)", i, '"'), scores_of(i));
        });
        options_.common.dtype = "fp32";
        options_.common.progress = "off";
        options_.encoding.max_length = 80;
        options_.encoding.max_prompt_length = 40;
        options_.iter = path("iter.h5");
        options_.rankers = {"file:" + path("scores.jsonl")};
    }

    static std::string score_line(const std::string& key, const Scores& scores)
    {
        std::ostringstream line;
        line << '{' << key << ", \"scores\": [";
        for (std::size_t c = 0; c < scores.size(); ++c) {
            line << (c == 0 ? "" : ", ");
            std::isnan(scores[c]) ? line << "null" : line << scores[c];
        }
        line << "]}\n";
        return line.str();
    }

    void make_iteration(const std::string& file, bool answered = true)
    {
        write_given_answers(file, path("prefs.h5"), row_count, [&](std::int64_t i) -> std::optional<std::string> {
            if (!answered || !has_answer(i))
                return std::nullopt;
            return i != 7 ? cat("answer ", i) : "";
        });
    }

    void use_reward_model()
    {
        on_root([&] { test::make_tiny_model(path("reward"), {.classifier = true}); });
        options_.rankers = {"reward:" + path("reward")};
    }

    void expect_pairs(const std::function<std::pair<int, int>(std::int64_t)>& expected)
    {
        const auto pairs = IterationReader(options_.iter).pairs();
        for (std::int64_t i = 0; i < row_count; ++i) {
            const auto at = static_cast<std::size_t>(i);
            EXPECT_EQ(std::make_pair(pairs.best[at], pairs.worst[at]), expected(i)) << "row " << i << " by " << options_.update_rule;
        }
        EXPECT_NO_THROW(verify_file(options_.iter));
    }

    RankOptions options_;
};

/// First argmax and argmin of three scores, written down by hand for the rows where it is easy to get wrong.
std::pair<int, int> best_worst(std::int64_t row)
{
    switch (row) {
    case 3: return {1, 2};  // no generated answer
    case 5: return {0, 2};  // generated = chosen: the first is best
    case 6: return {0, 0};  // all equal
    case 4: return {0, 2};  // 1, 0.5, 0.25
    case 9: return {1, 0};  // 0, 1.5, 0.25
    case 7: return {1, 2};  // 1, 1.5, 0.25
    default: break;
    }
    const Scores s = scores_of(row);
    std::pair<int, int> pair{std::isnan(s[0]) ? 1 : 0, std::isnan(s[0]) ? 1 : 0};
    for (int c = pair.first + 1; c < 3; ++c) {
        pair.first = s[static_cast<std::size_t>(c)] > s[static_cast<std::size_t>(pair.first)] ? c : pair.first;
        pair.second = s[static_cast<std::size_t>(c)] < s[static_cast<std::size_t>(pair.second)] ? c : pair.second;
    }
    return pair;
}

TEST_F(Rank, FileScoresAreStoredAndPairedByEachRule)
{
    const RankReport report = run_rank(options_, test_world());
    EXPECT_EQ(report.outcome, Outcome::done);
    EXPECT_EQ(report.rows, row_count);
    EXPECT_EQ(report.ties, 1);
    const IterationReader file(options_.iter);
    const auto scores = file.ranking_scores();
    const auto ranks = file.ranking_ranks();
    std::array<std::int64_t, 4> places{};
    for (std::int64_t i = 0; i < row_count; ++i) {
        const auto at = static_cast<std::size_t>(i);
        EXPECT_TRUE(same(scores[at], scores_of(i))) << i;
        ++places[static_cast<std::size_t>(ranks[at][0])];
    }
    EXPECT_EQ(ranks[3], (std::array<std::int32_t, 3>{0, 1, 2}));
    EXPECT_EQ(ranks[5], (std::array<std::int32_t, 3>{1, 1, 3}));
    EXPECT_EQ(ranks[6], (std::array<std::int32_t, 3>{1, 1, 1}));
    EXPECT_EQ(places[0], 2);
    EXPECT_EQ(places[1], report.generated_best);
    EXPECT_EQ(places[2], report.generated_middle);
    EXPECT_EQ(places[3], report.generated_worst);
    EXPECT_GT(report.generated_best * report.generated_middle * report.generated_worst, 0);
    expect_pairs(best_worst);

    options_.update_rule = "replace";
    EXPECT_EQ(run_rank(options_, test_world()).outcome, Outcome::done);
    expect_pairs([](std::int64_t row) -> std::pair<int, int> {
        const Scores s = scores_of(row);
        if (std::isnan(s[0]))
            return {1, 2};
        return s[0] > s[1] ? std::make_pair(0, 2) : std::make_pair(1, 0);
    });

    options_.update_rule = "offline";
    EXPECT_EQ(run_rank(options_, test_world()).outcome, Outcome::done);
    EXPECT_TRUE(same(IterationReader(options_.iter).ranking_scores()[0], scores_of(0)));
    expect_pairs([](std::int64_t) { return std::make_pair(1, 2); });
}

TEST_F(Rank, OfflineNeedsNoRanker)
{
    options_.rankers.clear();
    expect_error(ExitCode::usage, {"--ranker", "best-worst"}, [&] { run_rank(options_, test_world()); });
    options_.update_rule = "offline";
    EXPECT_EQ(run_rank(options_, test_world()).outcome, Outcome::done);
    const IterationReader file(options_.iter);
    EXPECT_TRUE(file.rankers().empty());
    for (const Scores& scores : file.ranking_scores())
        EXPECT_TRUE(same(scores, {no_score, no_score, no_score}));
    expect_pairs([](std::int64_t) { return std::make_pair(1, 2); });
    EXPECT_EQ(run_rank(options_, test_world()).outcome, Outcome::already_complete);
}

TEST_F(Rank, RewardsDependOnNeitherRanksNorMicrobatches)
{
    use_reward_model();
    RankOptions alone = options_;
    alone.iter = path("alone.h5");
    make_iteration(alone.iter);
    on_root([&] {
        const auto single = make_single_communicator();
        run_rank(alone, *single);
    });
    for (const std::int64_t tokens : {1, 150, 4096}) {
        options_.iter = path(cat("together", tokens, ".h5"));
        make_iteration(options_.iter);
        options_.tokens_per_microbatch = tokens;
        const RankReport report = run_rank(options_, test_world());
        EXPECT_EQ(report.outcome, Outcome::done);
        EXPECT_GT(report.tokens, row_count * 40);
        EXPECT_EQ(digest(options_.iter), digest(alone.iter)) << tokens << " tokens per microbatch";
    }
    const auto scores = IterationReader(options_.iter).ranking_scores();
    std::set<double> different;
    for (std::int64_t i = 0; i < row_count; ++i) {
        const auto& row = scores[static_cast<std::size_t>(i)];
        EXPECT_EQ(std::isnan(row[0]), !has_answer(i)) << i;
        EXPECT_TRUE(std::isfinite(row[1]) && std::isfinite(row[2])) << i;
        different.insert({row[1], row[2]});
    }
    EXPECT_EQ(scores[4][1], scores[4][2]); // equal answers
    EXPECT_EQ(different.size(), 2 * row_count - 1);
    EXPECT_NO_THROW(verify_file(options_.iter));
    EXPECT_FALSE(Journal::exists(options_.iter + ".rank-reward"));
}

TEST_F(Rank, GeneratedOnlyScoresHeldOutAnswersAndMakesNoPairs)
{
    use_reward_model();
    run_rank(options_, test_world());
    const auto all = IterationReader(options_.iter).ranking_scores();
    options_.iter = path("held_out.h5");
    make_iteration(options_.iter);
    options_.generated_only = true;
    const RankReport report = run_rank(options_, test_world());
    EXPECT_EQ(report.outcome, Outcome::done);
    EXPECT_TRUE(std::isnan(report.mean_score[1]));
    const IterationReader file(options_.iter);
    const auto scores = file.ranking_scores();
    double sum = 0;
    for (std::int64_t i = 0; i < row_count; ++i) {
        const auto at = static_cast<std::size_t>(i);
        EXPECT_TRUE(same(scores[at], {all[at][0], no_score, no_score})) << i; // the same numbers as beside the other answers
        sum += has_answer(i) ? scores[at][0] : 0;
    }
    EXPECT_NEAR(report.mean_score[0], sum / static_cast<double>(row_count - 2), 1e-12);
    EXPECT_EQ(file.pairs().update_rule, "none");
    EXPECT_NO_THROW(verify_file(options_.iter));
    EXPECT_EQ(run_rank(options_, test_world()).outcome, Outcome::already_complete);

    on_root([&] { test::make_tiny_model(path("model")); });
    LogProbOptions logprob;
    logprob.common = options_.common;
    logprob.iter = options_.iter;
    logprob.model = path("model");
    expect_error(ExitCode::bad_data, {"held_out.h5", "generated-only"}, [&] { run_logprob(logprob, test_world()); });
}

TEST_F(Rank, HeldOutRowsWithoutAnswersCostNothing)
{
    use_reward_model();
    make_iteration(options_.iter, false);
    options_.generated_only = true;
    const RankReport report = run_rank(options_, test_world());
    EXPECT_EQ(report.outcome, Outcome::done);
    EXPECT_EQ(report.tokens, 0);
    EXPECT_TRUE(std::isnan(report.mean_score[0]));
    std::ostringstream printed;
    InspectOptions inspect;
    inspect.file = options_.iter;
    run_inspect(inspect, test_world(), printed);
    EXPECT_EQ(printed.str().find("as best"), std::string::npos);
    EXPECT_NO_THROW(verify_file(options_.iter));
}

TEST_F(Rank, TwoRankersAreBothStoredAndAveraged)
{
    use_reward_model();
    options_.rankers.insert(options_.rankers.begin(), "file:" + path("scores.jsonl"));
    run_rank(options_, test_world());
    const IterationReader file(options_.iter);
    EXPECT_EQ(file.rankers(), (std::vector<std::string>{"file", "reward"}));
    const auto first = file.ranker_scores("file"), second = file.ranker_scores("reward"), mean = file.ranking_scores();
    EXPECT_TRUE(same(first[0], scores_of(0)));
    // Both are standardised: over all answers the mean of the averages is 0.
    double sum = 0;
    for (const Scores& row : mean)
        for (const double score : row)
            sum += std::isnan(score) ? 0 : score;
    EXPECT_NEAR(sum, 0, 1e-9);
    EXPECT_FALSE(same(mean[0], first[0]) || same(mean[0], second[0]));
    EXPECT_NO_THROW(verify_file(options_.iter));
}

TEST_F(Rank, StopsWhenTheStopFileIsThereAndGoesOnLater)
{
    use_reward_model();
    const std::string before = digest(options_.iter);
    options_.stop_file = path("STOP");
    on_root([&] { std::ofstream(path("STOP")) << "\n"; });
    EXPECT_EQ(run_rank(options_, test_world()).outcome, Outcome::stopped);
    EXPECT_EQ(digest(options_.iter), before);
    EXPECT_TRUE(Journal::exists(options_.iter + ".rank-reward"));
    test_world().barrier("stopped");
    on_root([&] { std::filesystem::remove(path("STOP")); });
    const RankReport rest = run_rank(options_, test_world());
    EXPECT_EQ(rest.outcome, Outcome::done);
    EXPECT_FALSE(Journal::exists(options_.iter + ".rank-reward"));

    RankOptions whole = options_;
    whole.iter = path("whole.h5");
    make_iteration(whole.iter);
    const RankReport at_once = run_rank(whole, test_world());
    EXPECT_EQ(digest(options_.iter), digest(whole.iter));
    EXPECT_LT(rest.tokens, at_once.tokens); // the journalled rows were not computed again
}

TEST_F(Rank, AMissingScoreIsTheSameErrorOnAllRanks)
{
    const std::string before = digest(options_.iter);
    on_root([&] {
        std::ofstream out(path("scores.jsonl"));
        for (std::int64_t i = 0; i < row_count; ++i)
            if (i != 17)
                out << score_line(cat(R"("prompt_id": "id)", i, '"'), scores_of(i));
    });
    expect_error(ExitCode::bad_data, {"scores.jsonl", "row 17", "id17"}, [&] { run_rank(options_, test_world()); });
    on_root([&] {
        std::ofstream out(path("scores.jsonl"));
        for (std::int64_t i = 0; i < row_count; ++i)
            out << score_line(cat(R"("row": )", i), i == 17 ? Scores{1, no_score, 0} : scores_of(i));
    });
    on_root([&] { std::filesystem::remove_all(options_.iter + ".rank-file.journal"); }); // rows done with the first file's scores
    expect_error(ExitCode::bad_data, {"scores.jsonl", "row 17", "null"}, [&] { run_rank(options_, test_world()); });
    EXPECT_EQ(digest(options_.iter), before);
}

TEST_F(Rank, ADamagedRewardModelIsTheSameErrorOnAllRanks)
{
    on_root([&] { test::make_tiny_model(path("damaged"), {.damaged = true, .classifier = true}); });
    options_.rankers = {"reward:" + path("damaged")};
    expect_error(ExitCode::bad_data, {"damaged", "row ", "finite"}, [&] { run_rank(options_, test_world()); });
    on_root([&] { test::make_tiny_model(path("policy")); });
    options_.rankers = {"reward:" + path("policy")};
    expect_error(ExitCode::configuration, {"policy", "score.weight"}, [&] { run_rank(options_, test_world()); });
}

TEST_F(Rank, AnotherRankerReplacesAndTheSameOneIsComplete)
{
    const RankReport first = run_rank(options_, test_world());
    const std::string by_file = digest(options_.iter);
    const RankReport again = run_rank(options_, test_world());
    EXPECT_EQ(again.outcome, Outcome::already_complete);
    EXPECT_EQ(again.rows, row_count);
    EXPECT_EQ(again.generated_best, first.generated_best);
    EXPECT_EQ(again.ties, first.ties);
    EXPECT_EQ(again.mean_score, first.mean_score);

    const std::string scores_file = options_.rankers.front();
    use_reward_model();
    EXPECT_EQ(run_rank(options_, test_world()).outcome, Outcome::done);
    EXPECT_EQ(IterationReader(options_.iter).rankers(), std::vector<std::string>{"reward"});
    EXPECT_NE(digest(options_.iter), by_file);
    options_.encoding.max_length = 60; // cuts answers: other scores
    EXPECT_EQ(run_rank(options_, test_world()).outcome, Outcome::done);
    options_.rankers = {scores_file};
    EXPECT_EQ(run_rank(options_, test_world()).outcome, Outcome::done);
    EXPECT_EQ(digest(options_.iter), by_file);
}

TEST_F(Rank, ALeftoverJournalOfAPublishedRankingGoesAway)
{
    run_rank(options_, test_world());
    const std::string journal = options_.iter + ".rank-file";
    {
        Journal left(journal, {{"ranker", "any"}}, test_world());
        left.append(test_world().rank(), {});
    }
    test_world().barrier("journal written");
    EXPECT_TRUE(Journal::exists(journal));
    EXPECT_EQ(run_rank(options_, test_world()).outcome, Outcome::already_complete);
    test_world().barrier("complete");
    EXPECT_FALSE(std::filesystem::exists(journal + ".journal"));
}

} // namespace
} // namespace selm
