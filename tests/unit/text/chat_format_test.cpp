#include <gtest/gtest.h>

#include "selm/base/error.hpp"
#include "selm/text/chat_format.hpp"
#include "selm/text/tokenizer.hpp"
#include "temporary_directory.hpp"

namespace selm {
namespace {

const std::vector<Message> turns{{Role::system, "Be brief."}, {Role::user, " a\n"}, {Role::assistant, "b"}};

/// How a response is rendered alone, as the authors' training does.
std::string answer_alone(const char* format)
{
    return ChatFormat::by_name(format).render(std::vector<Message>{{Role::assistant, "Y"}}, false);
}

TEST(ChatFormat, ZephyrWritesRolesAndTheEosToken)
{
    const ChatFormat format = ChatFormat::by_name("zephyr");
    const std::string text = "<|system|>\nBe brief.</s>\n<|user|>\n a\n</s>\n<|assistant|>\nb</s>\n";
    EXPECT_EQ(format.render(turns, false), text);
    EXPECT_EQ(format.render(turns, true), text + "<|assistant|>\n");
    EXPECT_EQ(format.render({}, true), ""); // the header belongs to the last message
    EXPECT_EQ(answer_alone("zephyr"), "<|assistant|>\nY</s>\n");
    EXPECT_EQ(format.end_of_turn(), "</s>");
    EXPECT_EQ(format.beginning_of_sequence(), std::nullopt);
    EXPECT_EQ(format.default_special_ids().bos, 1);
    EXPECT_EQ(format.default_special_ids().eos, 2);
}

TEST(ChatFormat, Llama3StripsContentsAndBeginsEveryListWithItsToken)
{
    const ChatFormat format = ChatFormat::by_name("llama3");
    const std::string text = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
                             "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
                             "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>";
    const std::string header = "<|start_header_id|>assistant<|end_header_id|>\n\n";
    EXPECT_EQ(format.render(turns, false), text);
    EXPECT_EQ(format.render(turns, true), text + header);
    EXPECT_EQ(format.render({}, true), header);
    EXPECT_EQ(answer_alone("llama3"), "<|begin_of_text|>" + header + "Y<|eot_id|>");
    EXPECT_EQ(format.end_of_turn(), "<|eot_id|>");
    EXPECT_EQ(format.beginning_of_sequence(), "<|begin_of_text|>");
    EXPECT_EQ(format.default_special_ids().bos, 128000);
    EXPECT_EQ(format.default_special_ids().eos, 128009);
}

TEST(ChatFormat, Phi3EndsWithTheEosTokenWhereNoHeaderFollows)
{
    const ChatFormat format = ChatFormat::by_name("phi3");
    const std::string text = "<|system|>\nBe brief.<|end|>\n<|user|>\n a\n<|end|>\n<|assistant|>\nb<|end|>\n";
    EXPECT_EQ(format.render(turns, false), text + "<|endoftext|>");
    EXPECT_EQ(format.render(turns, true), text + "<|assistant|>\n");
    EXPECT_EQ(answer_alone("phi3"), "<|assistant|>\nY<|end|>\n<|endoftext|>");
    EXPECT_EQ(format.end_of_turn(), "<|end|>");
    EXPECT_EQ(format.default_special_ids().eos, 32000);
}

TEST(ChatFormat, Phi3sFirstRevisionPutsTheHeaderBehindTheUser)
{
    const ChatFormat format = ChatFormat::by_name("phi3-2024-04");
    const std::string text = "<s><|user|>\n a\n<|end|>\n<|assistant|>\nb<|end|>\n"; // no system messages
    EXPECT_EQ(format.render(turns, false), text);
    EXPECT_EQ(format.render(turns, true), text);
    EXPECT_EQ(answer_alone("phi3-2024-04"), "<s>Y<|end|>\n");
    EXPECT_EQ(format.beginning_of_sequence(), "<s>");
}

TEST(ChatFormat, ChatmlLeavesBosAndEosToTheTokenizer)
{
    EXPECT_EQ(ChatFormat::by_name("chatml").default_special_ids().bos, std::nullopt);
    EXPECT_EQ(ChatFormat::by_name("chatml-smollm2").default_special_ids().eos, std::nullopt);
}

/// A tokenizer with Zephyr's special tokens and a few letters.
constexpr const char* small_tokenizer = R"({
    "added_tokens": [{"id": 1, "content": "<s>", "special": true}, {"id": 2, "content": "</s>", "special": true}],
    "model": {"type": "BPE", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, "merges": []}})";
const std::string zephyr_config =
    R"({"bos_token": "<s>", "eos_token": "EOS", "chat_template": "{% for message in messages %}\n)"
    R"({% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n)"
    R"({% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n)"
    R"({% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n)"
    R"({% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"})";

TEST(ChatFormat, IsRecognisedOnlyWithTheTokensItWritesOut)
{
    const test::TemporaryDirectory directory;
    directory.write("tokenizer.json", small_tokenizer);
    const auto recognised = [&](const std::string& eos) {
        std::string config = zephyr_config;
        directory.write("tokenizer_config.json", config.replace(config.find("EOS"), 3, eos));
        return ChatFormat::recognise(directory.path(""), Tokenizer::from_directory(directory.path(""))).name();
    };
    EXPECT_EQ(recognised("</s>"), "zephyr");
    try {
        recognised("<s>");
        FAIL() << "no error";
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::configuration);
        const std::string message = error.what();
        EXPECT_NE(message.find("EOS token is <s> in place of </s>"), std::string::npos) << message;
    }
}

} // namespace
} // namespace selm
