// Looking into a journal that somebody else is writing.

#include <fstream>

#include <gtest/gtest.h>

#include "selm/data/journal.hpp"
#include "temporary_directory.hpp"

namespace selm {
namespace {

class JournalSurveyTest : public ::testing::Test {
  protected:
    void write_attempt(const std::vector<std::int64_t>& rows)
    {
        Journal journal(output, {{"recipe", "r"}}, *comm);
        const std::vector<std::byte> payload(100);
        for (const std::int64_t row : rows)
            journal.append(row, payload);
    }
    std::string append(const std::string& bytes) const
    {
        const std::string path = Journal::survey(output).attempt_files.front();
        std::ofstream(path, std::ios::app | std::ios::binary) << bytes;
        return path;
    }

    test::TemporaryDirectory directory;
    std::unique_ptr<Communicator> comm = make_single_communicator();
    std::string output = directory.path("iter.h5");
};

TEST_F(JournalSurveyTest, NothingThere)
{
    const JournalSurvey survey = Journal::survey(output);
    EXPECT_EQ(survey.rows, 0);
    EXPECT_EQ(survey.attempt, 0);
    EXPECT_TRUE(survey.attempt_files.empty());
}

TEST_F(JournalSurveyTest, RowsCountOnceAndTheNewestAttemptApart)
{
    write_attempt({4, 2, 9});
    write_attempt({1, 4}); // a zombie's row again
    const JournalSurvey survey = Journal::survey(output);
    EXPECT_EQ(survey.rows, 4);
    EXPECT_EQ(survey.attempt, 2);
    EXPECT_EQ(survey.attempt_rows, 2);
    ASSERT_EQ(survey.attempt_files.size(), 1U);
    EXPECT_TRUE(survey.attempt_files.front().ends_with("attempt-000002-rank-000000.log"));
    EXPECT_TRUE(survey.damaged.empty());
}

TEST_F(JournalSurveyTest, ATornEndIsNoDamage)
{
    write_attempt({1, 2, 3});
    const std::string path = Journal::survey(output).attempt_files.front();
    const auto size = std::filesystem::file_size(path);
    for (const std::uintmax_t cut : {1U, 50U, 120U}) { // in the checksum, in the payload, in the head of the last record
        std::filesystem::resize_file(path, size - cut);
        const JournalSurvey survey = Journal::survey(output);
        EXPECT_EQ(survey.rows, 2) << cut;
        EXPECT_TRUE(survey.damaged.empty()) << cut;
    }
    std::filesystem::resize_file(path, 3); // not even the file's own head
    EXPECT_EQ(Journal::survey(output).rows, 0);
    EXPECT_TRUE(Journal::survey(output).damaged.empty());
}

TEST_F(JournalSurveyTest, OtherBytesAreDamage)
{
    write_attempt({1, 2});
    const std::string path = append(std::string(64, 'x'));
    const JournalSurvey survey = Journal::survey(output);
    EXPECT_EQ(survey.rows, 2);
    EXPECT_EQ(survey.damaged, std::vector<std::string>{path});
    std::ofstream(path, std::ios::binary) << std::string(200, 'y');
    EXPECT_EQ(Journal::survey(output).rows, 0);
    EXPECT_EQ(Journal::survey(output).damaged, std::vector<std::string>{path});
}

} // namespace
} // namespace selm
