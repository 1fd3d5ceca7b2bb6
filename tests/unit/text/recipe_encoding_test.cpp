#include "selm/text/recipe_encoding.hpp"

#include <numeric>

#include <gtest/gtest.h>

#include "encoding_test_support.hpp"
#include "temporary_directory.hpp"

namespace selm {
namespace {

using test::greeting;
using test::Ids;
using test::message_of;
using test::tiny_directory;

Ids numbers(std::int32_t begin, std::int32_t count)
{
    Ids ids(static_cast<std::size_t>(count));
    std::iota(ids.begin(), ids.end(), begin);
    return ids;
}

TEST(RecipeEncoding, PromptHasNoHeaderAndTheAnswerBringsItsOwn)
{
    const ChatFormat chatml = ChatFormat::by_name("chatml");
    EXPECT_EQ(render_prompt_recipe(chatml, greeting), "<|im_start|>user\nHi<|im_end|>\n");
    EXPECT_EQ(render_response_recipe(chatml, " Yo\n"), "<|im_start|>assistant\n Yo\n<|im_end|>\n");
    // What a format puts before a first message comes before an answer too.
    const std::string system =
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n";
    EXPECT_EQ(render_response_recipe(ChatFormat::by_name("chatml-smollm2"), "Yo"),
              system + "<|im_start|>assistant\nYo<|im_end|>\n");
    const ChatFormat llama3 = ChatFormat::by_name("llama3");
    EXPECT_EQ(render_prompt_recipe(llama3, greeting),
              "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>");
    EXPECT_EQ(render_response_recipe(llama3, "Yo"),
              "<|begin_of_text|><|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>");
    const ChatFormat zephyr = ChatFormat::by_name("zephyr");
    EXPECT_EQ(render_prompt_recipe(zephyr, greeting), "<|user|>\nHi</s>\n");
    EXPECT_EQ(render_response_recipe(zephyr, "Yo"), "<|assistant|>\nYo</s>\n");
}

TEST(RecipeEncoding, SplitsBehindThePrompt)
{
    EXPECT_EQ(split_at_prompt(Ids{1, 2}, Ids{1, 2, 3, 4}), (PromptAndAnswer{{1, 2}, {3, 4}}));
    EXPECT_EQ(split_at_prompt(Ids{1, 2}, Ids{1, 2}), (PromptAndAnswer{{1, 2}, {}}));
    EXPECT_EQ(split_at_prompt(Ids{}, Ids{5}), (PromptAndAnswer{{}, {5}}));
}

TEST(RecipeEncoding, SplitsOneTokenEarlierWhereTheLastOneMerged)
{
    EXPECT_EQ(split_at_prompt(Ids{1, 2}, Ids{1, 9, 4}), (PromptAndAnswer{{1}, {9, 4}}));
    EXPECT_EQ(split_at_prompt(Ids{1}, Ids{9}), (PromptAndAnswer{{}, {9}}));
    // One token earlier, wherever the difference is.
    EXPECT_EQ(split_at_prompt(Ids{1, 2, 3}, Ids{7, 2, 3, 4}), (PromptAndAnswer{{7, 2}, {3, 4}}));
}

TEST(RecipeEncoding, AJoinedTextShorterThanItsPromptIsRefused)
{
    const std::string message =
        message_of(ExitCode::bad_data, [] { split_at_prompt(Ids{1, 2, 3}, Ids{1, 9}); });
    EXPECT_NE(message.find("2 tokens, the prompt alone 3"), std::string::npos) << message;
}

TEST(RecipeEncoding, PromptsOfBestAndWorstMayDifferInOneToken)
{
    EXPECT_NO_THROW(check_same_prompt(Ids{1, 2, 3}, Ids{1, 2, 3}));
    EXPECT_NO_THROW(check_same_prompt(Ids{1, 2, 3}, Ids{1, 2}));
    EXPECT_NO_THROW(check_same_prompt(Ids{1, 2}, Ids{1, 2, 3}));
    EXPECT_NO_THROW(check_same_prompt(Ids{1, 2, 3}, Ids{1, 2, 9}));
    EXPECT_NO_THROW(check_same_prompt(Ids{1, 9, 3}, Ids{1, 2}));
    const auto refused = [](const Ids& a, const Ids& b) {
        return message_of(ExitCode::bad_data, [&] { check_same_prompt(a, b); });
    };
    EXPECT_NE(refused({1, 2, 3}, {1}).find("3 and 1 tokens, 0 of them different"), std::string::npos);
    EXPECT_NE(refused({1, 8, 9}, {1, 2, 3}).find("3 and 3 tokens, 2 of them different"), std::string::npos);
    refused({1}, {1, 2, 3});
}

TEST(RecipeEncoding, BosGoesBeforeThePromptAndEosBehindTheAnswer)
{
    PromptAndAnswer sequence{{5, 6}, {7}};
    add_special_ids(sequence, {.bos = 1, .eos = 2});
    EXPECT_EQ(sequence, (PromptAndAnswer{{1, 5, 6}, {7, 2}}));
    add_special_ids(sequence, {.bos = std::nullopt, .eos = 2}); // without looking at what is there
    EXPECT_EQ(sequence, (PromptAndAnswer{{1, 5, 6}, {7, 2, 2}}));
}

TEST(RecipeEncoding, APromptWithoutRoomForTheLongerAnswerKeepsItsEnd)
{
    const EncodingLimits limits{.max_length = 10, .max_prompt_length = 4};
    const auto cut = [&](std::int32_t prompt, std::int64_t longer) {
        PromptAndAnswer sequence{numbers(0, prompt), {50}};
        cut_prompt(sequence, longer, limits);
        EXPECT_EQ(sequence.answer, Ids{50});
        return sequence.prompt;
    };
    EXPECT_EQ(cut(6, 4), numbers(0, 6)); // exactly full
    EXPECT_EQ(cut(6, 5), numbers(2, 4));
    EXPECT_EQ(cut(9, 1), numbers(0, 9)); // longer than max_prompt_length, but nothing is too long
    EXPECT_EQ(cut(4, 7), numbers(0, 4));
    EXPECT_EQ(cut(3, 100), numbers(0, 3));
}

TEST(RecipeEncoding, AnAnswerIsCutWhereTheLongerOneStillDoesNotFit)
{
    const EncodingLimits limits{.max_length = 10, .max_prompt_length = 4};
    const auto cut = [&](std::int32_t prompt, std::int32_t answer, std::int64_t longer) {
        PromptAndAnswer sequence{numbers(0, prompt), numbers(50, answer)};
        cut_response(sequence, longer, limits);
        EXPECT_EQ(sequence.prompt, numbers(0, prompt));
        return sequence.answer;
    };
    EXPECT_EQ(cut(4, 6, 6), numbers(50, 6));
    EXPECT_EQ(cut(4, 7, 7), numbers(50, 6));
    EXPECT_EQ(cut(3, 7, 7), numbers(50, 7)); // a short prompt leaves more room than max_length - max_prompt_length
    EXPECT_EQ(cut(3, 8, 8), numbers(50, 6)); // but once it is too little the cut does not use it
    EXPECT_EQ(cut(4, 5, 7), numbers(50, 5));
    EXPECT_EQ(cut(4, 90, 6), numbers(50, 90)); // the longer of best and worst decides, not this answer
}

TEST(RecipeEncoding, LabelsLeaveThePromptOut)
{
    const LabelledSequence sequence = join({{1, 2}, {3, 4}});
    EXPECT_EQ(sequence, (LabelledSequence{{1, 2, 3, 4}, 2}));
    EXPECT_EQ(labels_of(sequence), (Ids{-100, -100, 3, 4}));
}

TEST(RecipeEncoding, ASequenceIsCappedAtItsEnd)
{
    LabelledSequence sequence{numbers(0, 6), 4};
    EXPECT_FALSE(cap_length(sequence, 6));
    EXPECT_TRUE(cap_length(sequence, 5));
    EXPECT_EQ(sequence, (LabelledSequence{numbers(0, 5), 4}));
    EXPECT_THROW(cap_length(sequence, 4), Error);
}

class RecipeRow : public ::testing::Test {
  protected:
    SequenceRow encode(std::optional<std::string_view> generated, std::string_view chosen, std::string_view rejected,
                       std::size_t best, std::size_t worst, const EncodingLimits& limits = {}) const
    {
        return encode_row_recipe(tokenizer, ChatFormat::by_name("chatml"), greeting, {generated, chosen, rejected},
                                 best, worst, {.bos = 1, .eos = 0}, limits);
    }
    Ids answer_of(const LabelledSequence& sequence) const
    {
        return {sequence.ids.begin() + sequence.label_start, sequence.ids.end()};
    }
    std::string text(const Ids& ids) const { return tokenizer.decode(ids, SpecialTokens::keep); }

    const Tokenizer tokenizer = Tokenizer::from_directory(tiny_directory);
    const std::string words = "hello hello hello hello hello hello hello hello"; // one token each
};

TEST_F(RecipeRow, IsPromptAndAnswerBetweenBosAndEos)
{
    const SequenceRow row = encode(std::nullopt, "hello", "world", 1, 2);
    EXPECT_FALSE(row[0].has_value());
    ASSERT_TRUE(row[1] && row[2]);
    EXPECT_EQ(text(row[1]->ids),
              "<|im_start|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n<|endoftext|>");
    EXPECT_EQ(text(answer_of(*row[1])), "<|im_start|>assistant\nhello<|im_end|>\n<|endoftext|>");
    EXPECT_EQ(text(answer_of(*row[2])), "<|im_start|>assistant\nworld<|im_end|>\n<|endoftext|>");
    EXPECT_EQ(row[1]->label_start, row[2]->label_start);
}

TEST_F(RecipeRow, AMiddleAnswerIsNotCutUnlessItEqualsOneOfThePair)
{
    const std::int64_t prompt = encode(std::nullopt, "a", "a", 1, 2)[1]->label_start;
    const EncodingLimits limits{.max_length = prompt + 16, .max_prompt_length = prompt};
    const SequenceRow whole = encode(words, words, "a", 1, 2, {});
    const SequenceRow middle = encode(words, "a", "b", 1, 2, limits);
    EXPECT_EQ(*middle[0], *whole[0]);
    EXPECT_GT(static_cast<std::int64_t>(middle[0]->ids.size()), limits.max_length);
    const SequenceRow equal = encode(words, words, "b", 1, 2, limits);
    EXPECT_EQ(static_cast<std::int64_t>(equal[1]->ids.size()), limits.max_length);
    EXPECT_EQ(*equal[0], *equal[1]);
    EXPECT_EQ(equal[1]->ids, Ids(whole[1]->ids.begin(), whole[1]->ids.begin() + limits.max_length)); // EOS is lost
    const SequenceRow best = encode(words, "a", "b", 0, 2, limits);
    EXPECT_EQ(*best[0], *equal[1]);
    EXPECT_EQ(best[1]->ids.size(), middle[1]->ids.size()); // the middle one now
}

TEST_F(RecipeRow, ALongPairCutsThePromptOfAll)
{
    const SequenceRow whole = encode("x", words, "b", 1, 2);
    const auto length = static_cast<std::int64_t>(whole[1]->ids.size());
    const EncodingLimits limits{.max_length = length - 1, .max_prompt_length = 3};
    const SequenceRow row = encode("x", words, "b", 1, 2, limits);
    for (std::size_t c = 0; c < row.size(); ++c) {
        EXPECT_EQ(row[c]->label_start, 3);
        const auto from = whole[c]->ids.begin() + whole[c]->label_start - 3;
        EXPECT_EQ(row[c]->ids, Ids(from, whole[c]->ids.end())); // BOS is lost, EOS is not
    }
}

TEST_F(RecipeRow, ErrorsOfTheSteps)
{
    EXPECT_THROW(encode(std::nullopt, "a", "b", 0, 2), Error);
    const EncodingLimits no_room{.max_length = 5, .max_prompt_length = 5};
    message_of(ExitCode::usage, [&] { encode(std::nullopt, "a", "b", 1, 2, no_room); });
}

TEST(RecipeIds, AreNamedOrTheTokenizersOrTheFormats)
{
    const Tokenizer tokenizer = Tokenizer::from_directory(tiny_directory);
    const ChatFormat chatml = ChatFormat::by_name("chatml");
    const auto ids = [&](const char* bos, const char* eos) {
        const RecipeIds found = recipe_ids(tokenizer, chatml, bos, eos);
        return std::pair(found.bos, found.eos);
    };
    using Pair = std::pair<std::optional<std::int32_t>, std::int32_t>;
    EXPECT_EQ(ids("", ""), Pair(1, 2)); // tokenizer_config.json of the directory
    EXPECT_EQ(ids("0", "<|endoftext|>"), Pair(0, 0));
    EXPECT_EQ(ids("none", "<note>"), Pair(std::nullopt, 274));
    for (const char* wrong : {"275", "99999999999999999999", "-1", "<s>", "none"})
        EXPECT_NE(
            message_of(ExitCode::configuration, [&] { ids("", wrong); }).find(std::string("--eos-token ") + wrong),
            std::string::npos);
    // A tokenizer.json alone says nothing: the format does, or nobody.
    const test::TemporaryDirectory bare;
    const std::string vocabulary = R"({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3})";
    bare.write("tokenizer.json", R"({"model": {"type": "BPE", "vocab": )" + vocabulary +
                                     R"(, "merges": []}, "added_tokens": [{"id": 2, "content": "</s>", "special": true,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}]})");
    const Tokenizer alone = Tokenizer::from_directory(bare.path(""));
    const RecipeIds zephyr = recipe_ids(alone, ChatFormat::by_name("zephyr"), "", "");
    EXPECT_EQ(std::pair(zephyr.bos, zephyr.eos), Pair(1, 2));
    EXPECT_NE(message_of(ExitCode::configuration, [&] { recipe_ids(alone, chatml, "", "2"); }).find("--bos-token"),
              std::string::npos);
    EXPECT_NE(message_of(ExitCode::configuration, [&] { recipe_ids(alone, chatml, "1", ""); }).find("--eos-token"),
              std::string::npos);
    EXPECT_NE(message_of(ExitCode::configuration, [&] { recipe_ids(alone, ChatFormat::by_name("llama3"), "", ""); })
                  .find("128000"),
              std::string::npos);
}

} // namespace
} // namespace selm
