#include <cmath>
#include <filesystem>

#include <gtest/gtest.h>

#include "mpi_test.hpp"
#include "preference_rows.hpp"
#include "selm/base/files.hpp"
#include "selm/base/hash.hpp"
#include "selm/comm/agree.hpp"
#include "selm/data/iteration.hpp"
#include "shared_directory.hpp"

namespace selm {
namespace {

using test::preference_rows;
using test::SharedDirectory;
using test::test_world;

constexpr std::int64_t all_rows = 23;
constexpr std::int64_t few_rows = 3; // fewer than ranks on 4

/// This rank's part of the rows, as uneven as can be: the last rank has none of them when there is more than one.
std::vector<PreferenceRow> part_of(const std::vector<PreferenceRow>& rows, Communicator& comm)
{
    const int owners = std::max(1, comm.size() - 1);
    const auto n = static_cast<std::int64_t>(rows.size());
    if (comm.rank() >= owners)
        return {};
    return {rows.begin() + n * comm.rank() / owners, rows.begin() + n * (comm.rank() + 1) / owners};
}

std::string write_all(const std::string& path, std::int64_t n, Communicator& comm)
{
    write_preferences(path, part_of(preference_rows(n), comm), {.config = "[import]\n", .config_hash = "h", .source_digest = "s", .extra = {}}, comm);
    return data_digest(path);
}

/// The same rows written by one rank alone.
std::string digest_of_one_rank(const std::string& path, std::int64_t n, Communicator& comm)
{
    return root_string(comm, "one rank", [&] {
        const auto single = make_single_communicator();
        return write_all(path, n, *single);
    });
}

GeneratedAnswer answer_of(std::int64_t row)
{
    GeneratedAnswer answer;
    answer.row = row;
    answer.finish_reason = static_cast<FinishReason>(row % 4);
    if (answer.finish_reason == FinishReason::none)
        return answer;
    answer.text = cat("answer ", row);
    if (answer.finish_reason != FinishReason::elsewhere)
        for (std::int64_t i = 0; i <= row; ++i) {
            answer.tokens.push_back(static_cast<std::int32_t>(100 * row + i));
            answer.logprobs.push_back(-0.25F * static_cast<float>(i));
        }
    return answer;
}

/// Answers dealt out from the end, so that blocks and owners differ.
std::vector<GeneratedAnswer> dealt_answers(const std::vector<std::int64_t>& rows, Communicator& comm)
{
    std::vector<GeneratedAnswer> mine;
    for (std::size_t i = 0; i < rows.size(); ++i)
        if (static_cast<int>((rows.size() - i) % static_cast<std::size_t>(comm.size())) == comm.rank())
            mine.push_back(answer_of(rows[i]));
    return mine;
}

std::string write_iter(const std::string& prefs, const std::string& path, const std::vector<std::int64_t>& rows, Communicator& comm)
{
    const PreferencesReader reader(prefs);
    IterationAttributes attributes;
    attributes.iteration = 2;
    attributes.portion = 1;
    attributes.portions = 3;
    attributes.policy = "some/policy";
    attributes.policy_digest = "abc";
    attributes.provenance = {{"engine", std::string("aten")}};
    write_iteration(path, reader, rows, dealt_answers(rows, comm), attributes, {.rows = 1, .busy_s = 2, .idle_s = 0.5}, comm);
    return data_digest(path);
}

RankedRow ranked(std::int64_t position, bool generated)
{
    RankedRow row;
    row.position = position;
    row.scores = {generated ? 1.0 * static_cast<double>(position) : std::numeric_limits<double>::quiet_NaN(), 2.0, -1.0};
    row.ranks = {1, 2, 3};
    row.best = 0;
    row.worst = 2;
    row.rankers.resize(2);
    row.rankers[0].scores = row.scores;
    row.rankers[1].scores = {0, 0, static_cast<double>(position)};
    row.rankers[1].logits = {0, 1, 2, 3, 4, 5, 6, 7, static_cast<float>(position)};
    return row;
}

void add_ranking(const std::string& path, Communicator& comm)
{
    const IterationReader reader(path);
    std::vector<RankedRow> mine;
    for (std::int64_t i = 0; i < reader.rows(); ++i)
        if ((i + 1) % comm.size() == comm.rank())
            mine.push_back(ranked(i, reader.has_generated(i)));
    const RankingInfo info{.rankers = {{.name = "reward", .pairwise = false, .attributes = {}}, {.name = "pairrm", .pairwise = true, .attributes = {{"model", std::string("m")}}}},
                           .update_rule = "best-worst", .attributes = {}};
    update_iteration(path, comm, {"/ranking", "/pairs", "/timing/rank"}, [&](h5::File& file) {
        write_ranking(file, reader.rows(), mine, info, comm);
        write_timing(file, "rank", {.rows = static_cast<std::int64_t>(mine.size()), .busy_s = 1, .idle_s = 0}, comm);
    });
}

TEST(Preferences, EqualWhoeverWroteThem)
{
    Communicator& comm = test_world();
    const SharedDirectory directory(comm);
    for (const std::int64_t n : {all_rows, few_rows, std::int64_t{1}})
        EXPECT_EQ(write_all(directory.path("all.h5"), n, comm), digest_of_one_rank(directory.path("one.h5"), n, comm)) << n;
}

TEST(Preferences, ReadBackAsWritten)
{
    Communicator& comm = test_world();
    const SharedDirectory directory(comm);
    write_all(directory.path("a.h5"), all_rows, comm);
    const PreferencesReader reader(directory.path("a.h5"));
    const auto expected = preference_rows(all_rows);
    ASSERT_EQ(reader.rows(), all_rows);
    for (std::int64_t i = 0; i < all_rows; ++i) {
        const PreferenceRow row = reader.row(i);
        const PreferenceRow& want = expected[static_cast<std::size_t>(i)];
        EXPECT_EQ(row.row, i);
        EXPECT_EQ(row.row_source, want.row_source);
        EXPECT_EQ(row.id, want.id);
        EXPECT_EQ(row.prompt, want.prompt);
        EXPECT_EQ(row.chosen, want.chosen);
        EXPECT_EQ(row.rejected, want.rejected);
        EXPECT_EQ(row.score_rejected, want.score_rejected);
        EXPECT_EQ(std::isnan(row.score_chosen), std::isnan(want.score_chosen));
        ASSERT_EQ(row.messages.size(), want.messages.size());
        std::int64_t bytes = 0;
        for (std::size_t m = 0; m < row.messages.size(); ++m) {
            EXPECT_EQ(row.messages[m].role, want.messages[m].role);
            EXPECT_EQ(row.messages[m].content, want.messages[m].content);
            bytes += static_cast<std::int64_t>(want.messages[m].content.size());
        }
        EXPECT_EQ(reader.message_bytes(i), bytes);
    }
    EXPECT_EQ(reader.ids()[7], "id-2");
    EXPECT_THROW(reader.row(all_rows), Error);
    EXPECT_THROW(reader.row(-1), Error);
}

TEST(Iteration, EqualWhoeverGeneratedAndWroteIt)
{
    Communicator& comm = test_world();
    const SharedDirectory directory(comm);
    const std::string prefs = directory.path("prefs.h5");
    write_all(prefs, all_rows, comm);
    for (const std::vector<std::int64_t>& rows : {std::vector<std::int64_t>{4, 5, 6, 7, 8, 11, 12}, std::vector<std::int64_t>{9},
                                                  std::vector<std::int64_t>{12, 3, 4, 9, 8}}) {
        const std::string all = write_iter(prefs, directory.path("all.h5"), rows, comm);
        EXPECT_EQ(all, root_string(comm, "one rank", [&] {
            const auto single = make_single_communicator();
            return write_iter(prefs, directory.path("one.h5"), rows, *single);
        }));
    }
}

TEST(Iteration, RowsRankingAndLogProbsReadBack)
{
    Communicator& comm = test_world();
    const SharedDirectory directory(comm);
    const std::string path = directory.path("iter.h5");
    write_all(directory.path("prefs.h5"), all_rows, comm);
    const std::vector<std::int64_t> keys{4, 5, 6, 7, 8, 11, 12};
    const std::string before = write_iter(directory.path("prefs.h5"), path, keys, comm);
    {
        const IterationReader reader(path);
        ASSERT_EQ(reader.rows(), 7);
        EXPECT_FALSE(reader.has_ranking());
        EXPECT_THROW(reader.pairs(), Error);
        for (std::int64_t i = 0; i < reader.rows(); ++i) {
            const GeneratedAnswer want = answer_of(keys[static_cast<std::size_t>(i)]);
            const IterationRow row = reader.row(i);
            EXPECT_EQ(row.row, want.row);
            EXPECT_EQ(row.rejected, cat("rejected ", want.row));
            EXPECT_EQ(row.generated.text, want.text);
            EXPECT_EQ(row.generated.tokens, want.tokens);
            EXPECT_EQ(row.generated.logprobs, want.logprobs);
            EXPECT_EQ(row.generated.finish_reason, want.finish_reason);
            EXPECT_EQ(reader.token_count(i), static_cast<std::int64_t>(want.tokens.size()));
        }
        const IterationAttributes attributes = reader.attributes();
        EXPECT_EQ(attributes.iteration, 2);
        EXPECT_EQ(attributes.portions, 3);
        EXPECT_EQ(attributes.policy_digest, "abc");
        EXPECT_EQ(reader.file().read<double>("/timing/generation/idle_s"), std::vector<double>(static_cast<std::size_t>(comm.size()), 0.5));
    }
    add_ranking(path, comm);
    const std::string pairs_digest = IterationReader(path).pairs_digest();
    const LogProbAttributes of{.model = "m", .digest = "d", .engine = "e", .encoding = "chat", .chat_format = "f", .dtype = "fp32",
                               .pairs_digest = pairs_digest, .max_length = 512, .max_prompt_length = 256, .extra = {{"more", 0.5}}};
    update_iteration(path, comm, {"/logprobs/reference"}, [&](h5::File& file) {
        std::vector<RowLogProbSums> mine;
        for (std::int64_t i = 6; i >= 0; --i)
            if (i % comm.size() == comm.rank())
                mine.push_back({.position = i, .sum = {-1.5, std::numeric_limits<double>::quiet_NaN(), -static_cast<double>(i)}, .tokens = {1, 0, 7}});
        write_logprobs(file, "reference", 7, mine, of, comm);
    });
    const IterationReader reader(path);
    EXPECT_NE(reader.digest(), before);
    EXPECT_EQ(reader.rankers(), (std::vector<std::string>{"pairrm", "reward"}));
    EXPECT_EQ(reader.ranking_scores()[2], (std::array<double, 3>{2, 2, -1}));
    EXPECT_TRUE(std::isnan(reader.ranking_scores()[3][0])); // key 7: no generated answer
    EXPECT_EQ(reader.ranker_scores("pairrm")[6], (std::array<double, 3>{0, 0, 6}));
    EXPECT_EQ(reader.file().read_rows<float>("/ranking/rankers/pairrm/logits", 5, 1).back(), 5);
    EXPECT_FALSE(reader.file().exists("/ranking/rankers/reward/logits"));
    EXPECT_EQ(reader.pairs().worst, std::vector<std::int32_t>(7, 2));
    EXPECT_EQ(reader.pairs().update_rule, "best-worst");
    const auto logprobs = reader.logprobs("reference");
    EXPECT_EQ(logprobs.sum[4][2], -4);
    EXPECT_TRUE(std::isnan(logprobs.sum[4][1]));
    EXPECT_EQ(logprobs.tokens[4], (std::array<std::int32_t, 3>{1, 0, 7}));
    EXPECT_EQ(logprobs.attributes.max_prompt_length, 256);
    EXPECT_EQ(logprobs.attributes.pairs_digest, pairs_digest);
    EXPECT_EQ(std::get<double>(logprobs.attributes.extra.at("more")), 0.5);
    EXPECT_EQ(reader.row(2).generated.text, "answer 6"); // copied
    EXPECT_THROW(reader.logprobs("policy"), Error);
}

TEST(Iteration, TimingIsNoPartOfTheDigestAndGroupsAreReplaced)
{
    Communicator& comm = test_world();
    const SharedDirectory directory(comm);
    const std::string path = directory.path("iter.h5");
    write_all(directory.path("prefs.h5"), all_rows, comm);
    write_iter(directory.path("prefs.h5"), path, {1, 2, 3}, comm);
    add_ranking(path, comm);
    const std::string digest = data_digest(path);
    add_ranking(path, comm);
    EXPECT_EQ(data_digest(path), digest);
    update_iteration(path, comm, {"/timing/rank"}, [&](h5::File& file) {
        write_timing(file, "rank", {.rows = 99, .busy_s = 9, .idle_s = 9}, comm);
        write_provenance(file, "more", {{"a", std::string("b")}}, comm);
    });
    EXPECT_EQ(data_digest(path), digest);
    EXPECT_EQ(h5::File::open(path).read<std::int64_t>("/timing/rank/rows").front(), 99);
}

TEST(Iteration, AFailedUpdateLeavesTheOldFile)
{
    Communicator& comm = test_world();
    const SharedDirectory directory(comm);
    const std::string path = directory.path("iter.h5");
    write_all(directory.path("prefs.h5"), all_rows, comm);
    write_iter(directory.path("prefs.h5"), path, {1, 2, 3}, comm);
    const std::string before = root_string(comm, "file", [&] { return hash_hex(read_file(path)); });
    ExitCode code = ExitCode::done;
    try {
        update_iteration(path, comm, {"/ranking"}, [&](h5::File& file) {
            file.create_group("/ranking");
            if (comm.rank() == comm.size() / 2)
                throw config_error("one rank failed");
        });
    } catch (const Error& error) {
        code = error.code();
    }
    EXPECT_EQ(code, ExitCode::configuration);
    // The typed writers find what is missing before they write: also then nothing is left.
    EXPECT_THROW(update_iteration(path, comm, {"/ranking", "/pairs"}, [&](h5::File& file) {
        std::vector<RankedRow> mine;
        if (comm.is_root())
            mine = {ranked(0, true), ranked(0, true), ranked(2, true)};
        write_ranking(file, 3, mine, {.rankers = {{}, {}}, .update_rule = "best-worst", .attributes = {}}, comm);
    }), Error);
    EXPECT_EQ(root_string(comm, "file", [&] { return hash_hex(read_file(path)); }), before);
    std::size_t files = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(directory.path("")))
        ++files;
    EXPECT_EQ(files, 2U) << "a partial file was left";
}

TEST(Iteration, EveryRowHasExactlyOneAnswer)
{
    Communicator& comm = test_world();
    const SharedDirectory directory(comm);
    write_all(directory.path("prefs.h5"), all_rows, comm);
    const PreferencesReader prefs(directory.path("prefs.h5"));
    const auto attempt = [&](std::vector<GeneratedAnswer> of_root) {
        std::string message;
        try {
            write_iteration(directory.path("iter.h5"), prefs, {0, 1}, comm.is_root() ? of_root : std::vector<GeneratedAnswer>{}, {}, {}, comm);
        } catch (const Error& error) {
            message = error.what();
        }
        return message;
    };
    EXPECT_NE(attempt({answer_of(0)}).find("position 1 has no record"), std::string::npos);
    EXPECT_NE(attempt({answer_of(0), answer_of(1), answer_of(1)}).find("recorded twice"), std::string::npos);
    EXPECT_NE(attempt({answer_of(0), answer_of(2)}).find("not of this iteration file"), std::string::npos);
    EXPECT_FALSE(std::filesystem::exists(directory.path("iter.h5")));
}

} // namespace
} // namespace selm
