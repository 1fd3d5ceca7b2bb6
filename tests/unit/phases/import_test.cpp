#include "selm/phases/import.hpp"

#include <cmath>
#include <filesystem>

#include <gtest/gtest.h>

#include "selm/base/error.hpp"
#include "selm/data/preferences.hpp"
#include "temporary_directory.hpp"

namespace selm {
namespace {

class ImportTest : public ::testing::Test {
  protected:
    ImportOptions options(const std::string& lines)
    {
        ImportOptions made;
        made.input = directory.write("in.jsonl", lines);
        made.output = directory.path("out.h5");
        return made;
    }

    /// Imports, and gives back the rows.
    std::vector<PreferenceRow> rows_of(const ImportOptions& from)
    {
        std::filesystem::remove(from.output);
        report = run_import(from, *comm);
        const PreferencesReader reader(from.output);
        return reader.range(0, reader.rows());
    }

    /// The message that an import ends in; it leaves nothing.
    std::string error_of(const ImportOptions& from)
    {
        std::string message = "no error";
        try {
            run_import(from, *comm);
        } catch (const Error& error) {
            EXPECT_EQ(error.code(), ExitCode::bad_data) << error.what();
            message = error.what();
        }
        EXPECT_FALSE(std::filesystem::exists(from.output));
        return message;
    }

    test::TemporaryDirectory directory;
    std::unique_ptr<Communicator> comm = make_single_communicator();
    ImportReport report;
};

const std::string good = R"({"prompt":"Q","prompt_id":"a","chosen":[{"role":"user","content":"Q"},{"role":"assistant","content":"C"}],)"
                         R"("rejected":[{"content":"Q","role":"user"},{"content":"R","role":"assistant"}],"score_chosen":2.5,"score_rejected":null})"
                         "\n";

TEST_F(ImportTest, MessageListsAndScores)
{
    const auto rows = rows_of(options(good));
    ASSERT_EQ(rows.size(), 1U);
    EXPECT_EQ(rows[0].id, "a");
    EXPECT_EQ(rows[0].prompt, "Q");
    ASSERT_EQ(rows[0].messages.size(), 1U);
    EXPECT_EQ(rows[0].messages[0].content, "Q");
    EXPECT_EQ(rows[0].chosen, "C");
    EXPECT_EQ(rows[0].rejected, "R");
    EXPECT_EQ(rows[0].score_chosen, 2.5);
    EXPECT_TRUE(std::isnan(rows[0].score_rejected));
}

TEST_F(ImportTest, FlatTextsSystemMessagesAndTurns)
{
    const auto rows = rows_of(options(
        R"({"prompt":"flat \u00e9\n","chosen":"c","rejected":"r"})" "\r\n"
        "\n"
        R"({"prompt_id":7,"chosen":[{"role":"system","content":"S"},{"role":"user","content":"1"},{"role":"assistant","content":"2"},{"role":"user","content":"3"},{"role":"assistant","content":"C"}],"rejected":[{"role":"system","content":"S"},{"role":"user","content":"1"},{"role":"assistant","content":"2"},{"role":"user","content":"3"},{"role":"assistant","content":"R"}]})" "\n"
        R"({"prompt":[{"role":"user","content":"list"}],"chosen":[{"role":"assistant","content":"C"}],"rejected":"R"})"));
    ASSERT_EQ(rows.size(), 3U);
    EXPECT_EQ(rows[0].prompt, "flat é\n");
    EXPECT_EQ(rows[0].messages[0].content, "flat é\n");
    EXPECT_EQ(rows[0].id, "row-00000000");
    EXPECT_EQ(rows[1].row_source, 2) << "blank lines count";
    EXPECT_EQ(rows[1].id, "7");
    EXPECT_EQ(rows[1].prompt, "3") << "the last message of the user";
    ASSERT_EQ(rows[1].messages.size(), 4U);
    EXPECT_EQ(rows[1].messages[0].role, Role::system);
    EXPECT_EQ(rows[1].messages[2].role, Role::assistant);
    EXPECT_EQ(rows[1].chosen, "C");
    EXPECT_EQ(rows[2].prompt, "list");
    EXPECT_EQ(rows[2].chosen, "C");
}

TEST_F(ImportTest, BadRowsAreNamedWithFileAndLine)
{
    const std::string nested = std::string(100000, '[') + std::string(100000, ']');
    const auto messages = [](const std::string& list) { return "{\"chosen\":" + list + ",\"rejected\":" + list + "}"; };
    const std::vector<std::pair<std::string, std::string>> cases{
        {"{\"prompt\":", "not JSON"},
        {"{\"prompt\":\"a\",\"chosen\":\"c\",\"rejected\":\"r\",\"score_chosen\":1e999}", "beyond the range"},
        {nested, "nested deeper than"},
        {"{\"prompt\":\"a\",\"chosen\":\"c\",\"rejected\":\"r\",\"x\":" + std::string(5000, '{'), "nested deeper than"},
        {"[1]", "not a JSON object"},
        {"{\"prompt\":\"a\",\"chosen\":\"c\"}", "\"rejected\" is missing"},
        {"{\"chosen\":\"c\",\"rejected\":\"r\"}", "\"prompt\" is missing"},
        {"{\"prompt\":\"a\",\"chosen\":5,\"rejected\":\"r\"}", "\"chosen\" is not a text or a list of messages"},
        {"{\"prompt\":\"a\",\"chosen\":\"c\",\"rejected\":\"r\",\"score_chosen\":\"9\"}", "\"score_chosen\" is not a number"},
        {messages(R"([{"role":"user"}])"), "lacks \"role\" or \"content\""},
        {messages(R"([{"role":"user","content":"a"}])"), "does not end with a message of the assistant"},
        {messages(R"([])"), "does not end with a message of the assistant"},
        {messages(R"([{"role":"assistant","content":"a"}])"), "has no user message before the answer"},
        {messages(R"([{"role":"user","content":"a"},{"role":"user","content":"a"},{"role":"assistant","content":"a"}])"), "at message 2 another role than assistant"},
        {messages(R"([{"role":"user","content":"a"},{"role":"assistant","content":"a"},{"role":"assistant","content":"a"}])"), "does not end with the user"},
        {messages(R"([{"role":"user","content":"a"},{"role":"system","content":"a"},{"role":"user","content":"a"},{"role":"assistant","content":"a"}])"), "at message 2"},
        {messages(R"([{"role":"human","content":"a"},{"role":"assistant","content":"a"}])"), "of role \"human\""},
        {R"({"chosen":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"rejected":[{"role":"user","content":"x"},{"role":"assistant","content":"b"}]})", "differ before their last message"},
        {"{\"prompt\":\"a\",\"chosen\":\"\",\"rejected\":\"r\"}", "an answer is empty"},
        {"{\"prompt\":\"a\",\"chosen\":\"c\",\"rejected\":\" \\n\"}", "an answer is empty"},
        {"{\"prompt\":\"a\",\"chosen\":\"c\\u0000d\",\"rejected\":\"r\"}", "contains a NUL"},
        {"{\"prompt\":\"\\u0000\",\"chosen\":\"c\",\"rejected\":\"r\"}", "contains a NUL"},
        {"{\"prompt\":\"a\",\"chosen\":\"c\xff\",\"rejected\":\"r\"}", "not valid UTF-8"},
        {"{\"prompt\":\"a\",\"chosen\":\"\xc0\xaf\",\"rejected\":\"r\"}", "not valid UTF-8"},
        {"{\"prompt\":\"a\",\"chosen\":\"\\ud800\",\"rejected\":\"r\"}", "not JSON"}};
    for (const auto& [line, words] : cases) {
        const std::string message = error_of(options(good + line + "\n" + good));
        EXPECT_NE(message.find(words), std::string::npos) << message;
        EXPECT_NE(message.find("in.jsonl line 2: "), std::string::npos) << message;
        ImportOptions skipping = options(good + line + "\n" + good);
        skipping.on_bad_row = "skip";
        EXPECT_EQ(rows_of(skipping).size(), 2U) << line.substr(0, 80);
        EXPECT_EQ(report.skipped.size(), 1U);
        EXPECT_EQ(report.skipped.begin()->second, 1);
        std::filesystem::remove(skipping.output);
    }
}

TEST_F(ImportTest, EmptyAnswersStopSkipOrStay)
{
    const std::string lines = good + R"({"prompt":"q","chosen":"","rejected":"r"})" + "\n" + good;
    ImportOptions from = options(lines);
    EXPECT_NE(error_of(from).find("--on-empty-answer keep"), std::string::npos);
    from.on_empty_answer = "skip";
    EXPECT_EQ(rows_of(from).size(), 2U);
    EXPECT_EQ(report.skipped.at("empty answer"), 1);
    from.on_empty_answer = "keep";
    const auto rows = rows_of(from);
    ASSERT_EQ(rows.size(), 3U);
    EXPECT_EQ(rows[1].chosen, "");
    EXPECT_EQ(report.empty_answers, 1);
    EXPECT_NE(report.text().find("kept 1 with an empty answer"), std::string::npos);
}

TEST_F(ImportTest, RangesAndLimits)
{
    std::string lines;
    for (int i = 0; i < 10; ++i)
        lines += cat("{\"prompt\":\"p\",\"chosen\":\"", i, "\",\"rejected\":\"r\"}\n");
    ImportOptions from = options(lines);
    const auto chosen = [&](const std::string& range, std::int64_t limit) {
        from.rows = range;
        from.limit = limit;
        std::string joined;
        for (const PreferenceRow& row : rows_of(from)) {
            joined += row.chosen;
            EXPECT_EQ(row.chosen, cat(row.row_source));
        }
        return joined;
    };
    EXPECT_EQ(chosen("2:5", 0), "234");
    EXPECT_EQ(chosen("7:", 0), "789");
    EXPECT_EQ(chosen(":3", 0), "012");
    EXPECT_EQ(chosen("0:10", 0), "0123456789");
    EXPECT_EQ(chosen("", 4), "0123");
    EXPECT_EQ(chosen("8:", 1), "8");
    from.limit = 0;
    std::filesystem::remove(from.output);
    from.rows = "5:11";
    EXPECT_NE(error_of(from).find("has 10 rows (--rows 5:11 asks for more)"), std::string::npos);
    from.rows = "10:";
    EXPECT_NE(error_of(from).find("gives no row"), std::string::npos);
    for (const char* wrong : {"5", "a:b", "5:5", "7:3", "-1:4", "1:2:3", "1:2x"}) {
        from.rows = wrong;
        EXPECT_THROW(from.validate(), Error) << wrong;
    }
}

TEST_F(ImportTest, ACompleteOutputIsRecognisedAndAnotherOneIsNotOverwritten)
{
    ImportOptions from = options(good + good);
    EXPECT_EQ(rows_of(from).size(), 2U);
    const std::string digest = report.digest;
    EXPECT_FALSE(report.already_complete);
    report = run_import(from, *comm);
    EXPECT_TRUE(report.already_complete);
    EXPECT_EQ(report.rows, 2);
    EXPECT_EQ(report.digest, digest);

    const auto message_of = [&] {
        try {
            run_import(from, *comm);
        } catch (const Error& error) {
            EXPECT_EQ(error.code(), ExitCode::bad_data);
            return std::string(error.what());
        }
        return std::string("no error");
    };
    from.limit = 1;
    EXPECT_NE(message_of().find("was made with another --rows"), std::string::npos);
    from.limit = 0;
    directory.write("in.jsonl", good + good + good);
    EXPECT_NE(message_of().find("was made from another input"), std::string::npos);
    directory.write("out.h5", "something else");
    EXPECT_NE(message_of().find("is not a whole file of preference rows"), std::string::npos);
    EXPECT_EQ(std::filesystem::file_size(from.output), 14U) << "it was overwritten";
}

TEST_F(ImportTest, InputsThatAreNotThere)
{
    ImportOptions from = options(good);
    from.input = directory.path("none.jsonl");
    EXPECT_NE(error_of(from).find("does not exist"), std::string::npos);
    from.input = directory.write("broken.parquet", "PAR1 and no more");
    EXPECT_NE(error_of(from).find("cannot be read as Parquet"), std::string::npos);
    from.input = directory.write("empty.jsonl", "");
    EXPECT_NE(error_of(from).find("gives no row"), std::string::npos);
    from.input = directory.write("a.csv", "a,b");
    EXPECT_THROW(from.validate(), Error);
    from.input.clear();
    EXPECT_THROW(from.validate(), Error);
}

} // namespace
} // namespace selm
