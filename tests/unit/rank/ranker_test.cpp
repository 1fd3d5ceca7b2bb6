#include "selm/rank/ranker.hpp"

#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include "error_message.hpp"
#include "selm/rank/file_ranker.hpp"
#include "temporary_directory.hpp"

namespace selm {
namespace {

using test::message_of;
constexpr double nan = std::numeric_limits<double>::quiet_NaN();
using Scores = std::array<double, 3>;

RankRow row_with(std::int64_t row, const std::string& id, bool generated = true)
{
    RankRow out{row, id, "prompt", {{Role::user, "prompt"}}, {"g", "c", "r"}};
    if (!generated)
        out.answers[0].reset();
    return out;
}

std::string write_lines(const test::TemporaryDirectory& directory, const std::string& lines)
{
    return directory.write("scores.jsonl", lines);
}

TEST(AggregateScores, OneRankerKeepsItsRawScores)
{
    const std::vector<Scores> raw{{3, 1, 2}, {nan, 5, 4}};

    const auto mean = aggregate_scores({raw});

    EXPECT_EQ(mean[0], raw[0]);
    EXPECT_TRUE(std::isnan(mean[1][0]));
    EXPECT_EQ(mean[1][1], 5);
}

TEST(AggregateScores, TwoRankersAreStandardisedThenAveraged)
{
    // First ranker: 1, 2, 3: mean 2, deviation sqrt(2/3). Second: 30, 20, 10, the opposite order at ten times the scale.
    const auto mean = aggregate_scores({{{1, 2, 3}}, {{30, 20, 10}}});

    for (const double score : mean[0])
        EXPECT_NEAR(score, 0, 1e-12);
}

TEST(AggregateScores, MissingCandidateIsLeftOutOfTheStatistics)
{
    const auto mean = aggregate_scores({{{nan, 1, 3}}, {{nan, 2, 6}}});

    EXPECT_TRUE(std::isnan(mean[0][0]));
    EXPECT_NEAR(mean[0][1], -1, 1e-12);
    EXPECT_NEAR(mean[0][2], 1, 1e-12);
}

TEST(AggregateScores, RankerWithEqualScoresContributesNothing)
{
    const auto mean = aggregate_scores({{{7, 7, 7}}, {{1, 2, 3}}});

    EXPECT_NEAR(mean[0][2], std::sqrt(1.5) / 2, 1e-12);
}

TEST(RankerSpec, WordsAreKindAndPath)
{
    const RankerSpec spec = RankerSpec::parse("reward:/models/a:b");

    EXPECT_EQ(spec.kind, "reward");
    EXPECT_EQ(spec.path, "/models/a:b");
    EXPECT_NE(message_of(ExitCode::usage, [] { RankerSpec::parse("reward"); }).find("KIND:PATH"), std::string::npos);
    EXPECT_NE(message_of(ExitCode::usage, [] { RankerSpec::parse("oracle:x"); }).find("oracle"), std::string::npos);
    EXPECT_EQ(RankerSpec::parse("pairrm:x").kind, "pairrm");
}

TEST(RankerSpec, SecondOfAKindGetsANumber)
{
    const std::vector<RankerSpec> specs{{"reward", "a"}, {"file", "b"}, {"reward", "c"}};

    EXPECT_EQ(ranker_names(specs), (std::vector<std::string>{"reward", "file", "reward_2"}));
}

TEST(FileRanker, ScoresByIdAndByRow)
{
    test::TemporaryDirectory directory;
    const auto ranker = make_file_ranker(write_lines(directory, "{\"prompt_id\": \"a\", \"scores\": [1, 2.5, -3]}\n\n"
                                                                "{\"row\": 7, \"prompt_id\": \"b\", \"scores\": [null, 0, 1]}\n"));
    const std::vector<RankRow> rows{row_with(0, "a"), row_with(7, "b", false)};

    const auto scores = ranker->score(rows);

    EXPECT_EQ(scores[0].scores, (Scores{1, 2.5, -3}));
    EXPECT_TRUE(std::isnan(scores[1].scores[0]));
    EXPECT_EQ(scores[1].scores[2], 1);
}

TEST(FileRanker, BadLinesAreNamed)
{
    test::TemporaryDirectory directory;
    auto load = [&](const std::string& lines) {
        return message_of(ExitCode::bad_data, [&] { make_file_ranker(write_lines(directory, lines)); });
    };
    const std::string good = "{\"prompt_id\": \"a\", \"scores\": [1, 2, 3]}\n";

    EXPECT_NE(load(good + "not json\n").find("line 2"), std::string::npos);
    EXPECT_NE(load("{\"prompt_id\": \"a\", \"scores\": [1, 2]}\n").find("three"), std::string::npos);
    EXPECT_NE(load("{\"scores\": [1, 2, 3]}\n").find("prompt_id"), std::string::npos);
    EXPECT_NE(load("{\"prompt_id\": \"a\", \"scores\": [1, 2, \"x\"]}\n").find("no number"), std::string::npos);
    EXPECT_NE(load("{\"prompt_id\": \"a\", \"scores\": [1e999, 2, 3]}\n").find("line 1"), std::string::npos);
    EXPECT_NE(load(good + "{\"prompt_id\": \"a\", \"scores\": [1, 2, 4]}\n").find("second"), std::string::npos);
    EXPECT_NE(load("\n").find("no scores"), std::string::npos);
    EXPECT_NE(load(std::string(200'000, '[') + "\n").find("line 1"), std::string::npos);
}

TEST(FileRanker, RowWithoutScoresIsNamed)
{
    test::TemporaryDirectory directory;
    const auto ranker = make_file_ranker(write_lines(directory, "{\"prompt_id\": \"a\", \"scores\": [null, 2, 3]}\n"));
    const std::vector<RankRow> other{row_with(3, "z")};
    const std::vector<RankRow> with_answer{row_with(4, "a")};

    EXPECT_NE(message_of(ExitCode::bad_data, [&] { ranker->score(other); }).find("row 3"), std::string::npos);
    EXPECT_NE(message_of(ExitCode::bad_data, [&] { ranker->score(with_answer); }).find("row 4"), std::string::npos);
}

TEST(FileRanker, MissingFileIsAnError)
{
    EXPECT_NE(message_of(ExitCode::bad_data, [] { make_file_ranker("/no/such/scores.jsonl"); }).find("/no/such/scores.jsonl"), std::string::npos);
}

} // namespace
} // namespace selm
