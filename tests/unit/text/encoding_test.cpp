#include <gtest/gtest.h>

#include "encoding_test_support.hpp"
#include "selm/text/encoding.hpp"
#include "temporary_directory.hpp"

namespace selm {
namespace {

using test::greeting;
using test::Ids;
using test::message_of;
using test::tiny_directory;

TEST(ChatFormat, ChatmlRendersEveryMessageAlike)
{
    const ChatFormat format = ChatFormat::by_name("chatml");
    const std::vector<Message> messages{{Role::system, "Be brief."}, {Role::user, " a\n"}, {Role::assistant, "b"}};
    const std::string text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n a\n<|im_end|>\n"
                             "<|im_start|>assistant\nb<|im_end|>\n";
    EXPECT_EQ(format.render(messages, false), text);
    EXPECT_EQ(format.render(messages, true), text + "<|im_start|>assistant\n");
    EXPECT_EQ(format.render({}, true), "<|im_start|>assistant\n");
    EXPECT_EQ(format.end_of_turn(), "<|im_end|>");
    EXPECT_EQ(format.beginning_of_sequence(), std::nullopt);
}

TEST(ChatFormat, Smollm2AddsItsSystemTextUnlessTheFirstMessageIsOne)
{
    const ChatFormat format = ChatFormat::by_name("chatml-smollm2");
    const std::string standard =
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n";
    EXPECT_EQ(format.render(greeting, false), standard + "<|im_start|>user\nHi<|im_end|>\n");
    EXPECT_EQ(format.render(std::vector<Message>{{Role::system, ""}}, false), "<|im_start|>system\n<|im_end|>\n");
    EXPECT_EQ(format.render(std::vector<Message>{{Role::user, "a"}, {Role::system, "b"}}, false),
              standard + "<|im_start|>user\na<|im_end|>\n<|im_start|>system\nb<|im_end|>\n");
    EXPECT_EQ(format.render({}, true), "<|im_start|>assistant\n");
}

TEST(ChatFormat, UnknownNamesListTheFormats)
{
    const std::string message = message_of(ExitCode::configuration, [] { ChatFormat::by_name("alpaca"); });
    for (const std::string& name : ChatFormat::names())
        EXPECT_NE(message.find(name), std::string::npos) << message;
    for (const std::string& name : ChatFormat::names())
        EXPECT_EQ(ChatFormat::by_name(name).name(), name);
}

TEST(ChatFormat, IsRecognisedFromTheDirectory)
{
    const Tokenizer tokenizer = Tokenizer::from_directory(tiny_directory);
    EXPECT_EQ(ChatFormat::recognise(tiny_directory, tokenizer).name(), "chatml");
    const test::TemporaryDirectory other;
    const auto recognise = [&] { ChatFormat::recognise(other.path(""), tokenizer); };
    EXPECT_NE(message_of(ExitCode::configuration, recognise).find("no chat template"), std::string::npos);
    other.write("tokenizer_config.json", R"({"chat_template": "{{ messages }}"})");
    EXPECT_NE(message_of(ExitCode::configuration, recognise).find("--chat-format NAME"), std::string::npos);
    other.write("tokenizer_config.json", R"({"chat_template": 7})");
    EXPECT_NE(message_of(ExitCode::configuration, recognise).find("chat_template"), std::string::npos);
    other.write("tokenizer_config.json", "{\"chat_");
    EXPECT_NE(message_of(ExitCode::configuration, recognise).find("damaged"), std::string::npos);
}

TEST(ChatEncoding, PromptHasTheHeaderAndKeepsItsLastTokens)
{
    const Tokenizer tokenizer = Tokenizer::from_directory(tiny_directory);
    const ChatFormat format = ChatFormat::by_name("chatml");
    const Ids whole = encode_prompt_chat(tokenizer, format, greeting, 1000);
    EXPECT_EQ(tokenizer.decode(whole, SpecialTokens::keep), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    EXPECT_EQ(whole.front(), 1);
    const auto size = static_cast<std::int64_t>(whole.size());
    EXPECT_EQ(encode_prompt_chat(tokenizer, format, greeting, size), whole);
    EXPECT_EQ(encode_prompt_chat(tokenizer, format, greeting, 4), Ids(whole.end() - 4, whole.end()));
}

TEST(ChatEncoding, AnswerEndsWithOneEndTokenThatACutTakesAway)
{
    const Tokenizer tokenizer = Tokenizer::from_directory(tiny_directory);
    const ChatFormat format = ChatFormat::by_name("chatml");
    EXPECT_EQ(encode_response_chat(tokenizer, format, "hello world", 10), (Ids{262, 267, 2}));
    EXPECT_EQ(encode_response_chat(tokenizer, format, "hello world", 3), (Ids{262, 267, 2}));
    EXPECT_EQ(encode_response_chat(tokenizer, format, "hello world", 2), (Ids{262, 267}));
    EXPECT_EQ(encode_response_chat(tokenizer, format, "", 2), Ids{2});
    EXPECT_EQ(encode_response_chat(tokenizer, format, "hello<|im_end|>", 5), (Ids{262, 2, 2})); // parsed, as in prompts
}

TEST(ChatEncoding, EachAnswerOfARowIsCutAlone)
{
    const Tokenizer tokenizer = Tokenizer::from_directory(tiny_directory);
    const ChatFormat format = ChatFormat::by_name("chatml");
    const EncodedRow row =
        encode_row_chat(tokenizer, format, greeting, {std::nullopt, "hello", "hello hello world"}, {13, 10});
    EXPECT_EQ(row.prompt.size(), 10u);
    EXPECT_EQ(row.responses[0], std::nullopt);
    EXPECT_EQ(row.responses[1], (Ids{262, 2}));
    EXPECT_EQ(row.responses[2], (Ids{262, 3 + ' ', 262}));
}

TEST(ChatEncoding, LimitsWithoutRoomAreRefused)
{
    for (const EncodingLimits limits : {EncodingLimits{512, 512}, EncodingLimits{512, 0}, EncodingLimits{0, -1}})
        EXPECT_NE(message_of(ExitCode::usage, [&] { limits.validate(); }).find("max-prompt-length"), std::string::npos);
    EXPECT_NO_THROW((EncodingLimits{2, 1}.validate()));
}

TEST(ChatEncoding, TokenizerWithoutTheEndTokenIsRefused)
{
    const Tokenizer tokenizer = Tokenizer::from_json(
        R"({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": null})", "small");
    EXPECT_EQ(tokenizer.encode("aba"), (Ids{0, 0}));
    EXPECT_EQ(tokenizer.decode(Ids{0, 0}), "a a");
    EXPECT_NE(message_of(ExitCode::configuration, [&] { end_of_turn_id(tokenizer, ChatFormat::by_name("chatml")); })
                  .find("<|im_end|>"),
              std::string::npos);
    EXPECT_NE(message_of(ExitCode::configuration, [&] { ChatFormat::recognise(tiny_directory, tokenizer); })
                  .find("<|im_end|>"),
              std::string::npos);
}

} // namespace
} // namespace selm
