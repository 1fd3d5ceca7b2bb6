#include "config_file.hpp"

#include <functional>
#include <string>

#include <gtest/gtest.h>

#include "selm/base/error.hpp"

namespace selm::apps {
namespace {

std::string message_of(const std::function<void()>& body)
{
    try {
        body();
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::configuration);
        return error.what();
    }
    return "no error";
}

TEST(ConfigFile, ReadsSectionsKeysValuesAndComments)
{
    const auto lines = parse_config("# a comment\n"
                                    "[run]   ; which\n"
                                    "seed = 42     # the answer\r\n"
                                    "\n"
                                    "train=data/a#b.jsonl\n"
                                    "  [ gen ]\n"
                                    "responses = \"a \\\"quoted\\\" # path\\\\x\\n\"   # comment\n"
                                    "chat-format =\n"
                                    "last = 1",
                                    "f.cfg");
    ASSERT_EQ(lines.size(), 5U);
    EXPECT_EQ(lines[0].section + "." + lines[0].key + "=" + lines[0].value, "run.seed=42");
    EXPECT_EQ(lines[0].line, 3);
    EXPECT_EQ(lines[1].value, "data/a#b.jsonl") << "a comment needs a blank before it";
    EXPECT_EQ(lines[2].section, "gen");
    EXPECT_EQ(lines[2].value, "a \"quoted\" # path\\x\n");
    EXPECT_EQ(lines[3].value, "");
    EXPECT_EQ(lines[4].line, 9);
}

TEST(ConfigFile, ErrorsNameFileAndLine)
{
    const auto error = [](const std::string& text) { return message_of([&] { parse_config(text, "f.cfg"); }); };
    EXPECT_EQ(error("[run]\nnonsense\n").substr(0, 9), "f.cfg:2: ");
    EXPECT_EQ(error("seed = 1\n").substr(0, 9), "f.cfg:1: ");
    EXPECT_EQ(error("[run\n").substr(0, 9), "f.cfg:1: ");
    EXPECT_EQ(error("[run]\n= 5\n").substr(0, 9), "f.cfg:2: ");
    EXPECT_EQ(error("[run]\na = \"open\n").substr(0, 9), "f.cfg:2: ");
    EXPECT_EQ(error("[run]\na = \"x\" y\n").substr(0, 9), "f.cfg:2: ");
    EXPECT_EQ(error("[run]\na = \"\\t\"\n").substr(0, 9), "f.cfg:2: ");
    const std::string twice = error("[run]\nseed = 1\n[gen]\nseed = 2\n[run]\nseed = 3\n");
    EXPECT_EQ(twice.substr(0, 9), "f.cfg:6: ");
    EXPECT_NE(twice.find("line 2"), std::string::npos) << twice;
}

TEST(ConfigFile, QuotedValuesReadBack)
{
    for (const std::string value : {"", "plain", "a b", " leading", "trailing ", "with # sign", "#start", "no#comment", "\"quoted\"",
                                    "back\\slash", "two\nlines", "\\\"", "; x", "a;b", "tab\t# x"}) {
        const auto lines = parse_config("[s]\nk = " + quote_config_value(value) + "\n", "f");
        ASSERT_EQ(lines.size(), 1U) << value;
        EXPECT_EQ(lines[0].value, value);
    }
}

TEST(NearestWord, FindsTypingErrorsOnly)
{
    const std::vector<std::string> words{"temperature", "top-p", "top-k", "slots", "max-new-tokens"};
    EXPECT_EQ(nearest_word("temprature", words), "temperature");
    EXPECT_EQ(nearest_word("maxnewtokens", words), "max-new-tokens");
    EXPECT_EQ(nearest_word("slot", words), "slots");
    EXPECT_EQ(nearest_word("beta", words), "");
}

} // namespace
} // namespace selm::apps
