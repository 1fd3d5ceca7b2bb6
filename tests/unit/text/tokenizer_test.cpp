#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/text/tokenizer.hpp"
#include "temporary_directory.hpp"

namespace selm {
namespace {

using Ids = std::vector<std::int32_t>;

/// Ids: 0-2 <|endoftext|> <|im_start|> <|im_end|>; 3-258 the bytes; 259-273 the merges he ll hell hello Ġw or Ġwor
/// Ġworl Ġworld lo ĠĠ ĠĠĠĠ in Ġt Ġthe (in order of their rank); 274 <note>, which takes the whitespace behind it along.
const std::string tiny_directory = std::string(SELM_SOURCE_DIR) + "/tests/data/tiny_tokenizer";

Tokenizer tiny()
{
    return Tokenizer::from_directory(tiny_directory);
}

std::int32_t byte_id(unsigned char byte)
{
    return 3 + byte;
}

/// The tiny tokenizer's file with the first @p from replaced.
std::string tiny_json_with(const std::string& from, const std::string& to)
{
    std::string json = read_file(tiny_directory + "/tokenizer.json");
    const std::size_t at = json.find(from);
    if (at == std::string::npos)
        throw std::logic_error("the tiny tokenizer does not contain " + from);
    return json.replace(at, from.size(), to);
}

std::string refusal(const std::string& json)
{
    try {
        Tokenizer::from_json(json, "some/tokenizer.json");
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::configuration);
        return error.what();
    }
    return "";
}

TEST(Tokenizer, MergesByRankAndSplitsDigits)
{
    EXPECT_EQ(tiny().encode("hello world 12"), (Ids{262, 267, byte_id(' '), byte_id('1'), byte_id('2')}));
    EXPECT_EQ(tiny().encode(""), Ids{});
}

TEST(Tokenizer, SpacesBelongToTheNextWordButTheLastOne)
{
    // "the", " hell", " ", " in", "    ", " x": rank decides inside a word, never across
    EXPECT_EQ(tiny().encode("the hell  in     x"), (Ids{byte_id('t'), 259, byte_id(' '), 261, byte_id(' '),
                                                        byte_id(' '), 271, 270, byte_id(' '), byte_id('x')}));
}

TEST(Tokenizer, TextOfSpecialTokensIsParsedOrLiteral)
{
    const Tokenizer tokenizer = tiny();
    EXPECT_EQ(tokenizer.encode("<|im_end|>hello<|im_end|>"), (Ids{2, 262, 2}));
    const Ids literal = tokenizer.encode("hello<|im_end|>", SpecialText::literal);
    EXPECT_EQ(literal.front(), 262);
    EXPECT_EQ(literal.size(), 1u + std::string("<|im_end|>").size());
    EXPECT_EQ(tokenizer.decode(literal), "hello<|im_end|>");
}

TEST(Tokenizer, AddedTokenTakesWhitespaceAlongWhereItSaysSo)
{
    EXPECT_EQ(tiny().encode("<note>  hello"), (Ids{274, 262}));
    EXPECT_EQ(tiny().encode("<note>  hello", SpecialText::literal), (Ids{274, 262})); // it is not a special token
}

TEST(Tokenizer, DecodeSkipsSpecialTokensAndUnknownIds)
{
    const Tokenizer tokenizer = tiny();
    EXPECT_EQ(tokenizer.decode(Ids{1, 262, 267, 2, -1, 99999, 274}), "hello world<note>");
    EXPECT_EQ(tokenizer.decode(Ids{1, 262, 2}, SpecialTokens::keep), "<|im_start|>hello<|im_end|>");
}

TEST(Tokenizer, BytesThatFormNoCharacterAreReplaced)
{
    const Tokenizer tokenizer = tiny();
    const Ids ids = tokenizer.encode("\u4e2d");
    ASSERT_EQ(ids, (Ids{byte_id(0xE4), byte_id(0xB8), byte_id(0xAD)}));
    EXPECT_EQ(tokenizer.decode(ids), "\u4e2d");
    EXPECT_EQ(tokenizer.decode(std::span(ids).first(2)), "\uFFFD");
    EXPECT_EQ(tokenizer.encode("a\xE4\xB8"), tokenizer.encode("a\uFFFD"));
}

TEST(Tokenizer, EveryByteGoesThereAndBack)
{
    const Tokenizer tokenizer = tiny();
    std::string text;
    for (int c = 0; c < 128; ++c)
        text.push_back(static_cast<char>(c));
    text += "\u00a0\u00ad\u0100\u0143\u20ac\U0001F600";
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
}

TEST(Tokenizer, VocabularyCanBeAsked)
{
    const Tokenizer tokenizer = tiny();
    EXPECT_EQ(tokenizer.vocabulary_size(), 275);
    EXPECT_EQ(tokenizer.token_id("<|im_end|>"), 2);
    EXPECT_EQ(tokenizer.token_id("\u0120world"), 267);
    EXPECT_EQ(tokenizer.token_id(" world"), std::nullopt);
    EXPECT_EQ(tokenizer.token_text(267), "\u0120world");
    EXPECT_EQ(tokenizer.token_text(275), std::nullopt);
    EXPECT_EQ(tokenizer.token_text(-1), std::nullopt);
    EXPECT_TRUE(tokenizer.is_special(2));
    EXPECT_FALSE(tokenizer.is_special(262));
    EXPECT_FALSE(tokenizer.is_special(274));
    EXPECT_FALSE(tokenizer.is_special(-1));
    EXPECT_FALSE(tokenizer.is_special(1000));
}

TEST(Tokenizer, SurvivesAMove)
{
    Tokenizer first = tiny();
    Tokenizer second = std::move(first);
    first = tiny();
    EXPECT_EQ(second.encode("hello"), first.encode("hello"));
}

TEST(Tokenizer, ThreadsShareOne)
{
    const Tokenizer tokenizer = tiny();
    const std::string text = "hello world, in the hell 42 <|im_end|> \u4e2d\u6587 don't";
    const Ids wanted = tokenizer.encode(text);
    std::atomic<int> wrong = 0;
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t)
        threads.emplace_back([&] {
            for (int i = 0; i < 200; ++i)
                wrong += tokenizer.encode(text) != wanted || tokenizer.decode(wanted, SpecialTokens::keep) != text;
        });
    for (std::thread& thread : threads)
        thread.join();
    EXPECT_EQ(wrong, 0);
}

TEST(Tokenizer, LongTextsNeitherOverflowNorGrowQuadratically)
{
    const Tokenizer tokenizer = tiny();
    EXPECT_EQ(tokenizer.encode(std::string(1 << 20, 'a')).size(), 1u << 20);
    EXPECT_EQ(tokenizer.encode(std::string(1 << 20, ' ')).size(), 1u << 18);
    std::string lines;
    for (int i = 0; i < 1 << 18; ++i)
        lines += "\n ";
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(lines + "x")), lines + "x");
}

TEST(Tokenizer, RefusalsNameFileAndComponent)
{
    const std::string digits = R"("type": "Digits")";
    for (const auto& [from, to, named] : std::vector<std::array<std::string, 3>>{
             {R"("normalizer": null)", R"("normalizer": {"type": "NFKC"})", "NFKC"},
             {digits, R"("type": "Whitespace")", "Whitespace"},
             {R"("type": "BPE")", R"("type": "WordPiece")", "WordPiece"},
             {R"("dropout": null)", R"("dropout": 0.5)", "dropout"},
             {R"("h e")", R"("h e l")", "h e l"},
             {R"("h e")", R"("h \u4e2d")", "\u4e2d"},
             {R"("id": 2)", R"("id": 7)", "<|im_end|>"},
             {R"("id": 274)", R"("id": 7)", "<note>"},
             {R"("ignore_merges": false)", R"("ignore_merges": 3)", "ignore_merges"}}) {
        const std::string message = refusal(tiny_json_with(from, to));
        EXPECT_NE(message.find("some/tokenizer.json"), std::string::npos) << message;
        EXPECT_NE(message.find(named), std::string::npos) << message;
    }
    EXPECT_NE(refusal("{").find("damaged"), std::string::npos);
    EXPECT_NE(refusal("[]").find("not a JSON object"), std::string::npos);
    EXPECT_NE(refusal("{}").find("model"), std::string::npos);
    EXPECT_NE(refusal(std::string(100000, '[')).find("damaged"), std::string::npos);
}

TEST(Tokenizer, EntriesOfTheTablesAreChecked)
{
    const auto model = [](const std::string& id, const std::string& merge) {
        return R"({"model": {"type": "BPE", "vocab": {"b": 1, "a": )" + id + R"(, "c": 2}, "merges": [)" + merge + "]}}";
    };
    for (const char* id : {"[0]", "[]", R"({"b": 0})", R"("0")", "1.5", "-1", "null", "true"})
        EXPECT_NE(refusal(model(id, "")).find("id of the token \"a\""), std::string::npos) << id;
    for (const char* merge : {"1", R"(["a"])", R"({"a": "b"})", "null", R"(["a", 1])", R"(["a", ["b"]])"})
        EXPECT_NE(refusal(model("0", merge)).find("two tokens are expected"), std::string::npos) << merge;
    for (const char* tables : {R"("vocab": [["a", 0]], "merges": [])", R"("vocab": {}, "merges": [])", R"("vocab": {"a": 0}, "merges": {})"})
        EXPECT_NE(refusal(R"({"model": {"type": "BPE", )" + std::string(tables) + "}}").find("model.vocab is not"), std::string::npos) << tables;
    const Tokenizer twice = Tokenizer::from_json(R"({"model": {"merges": [], "vocab": {"a": 3, "b": 0, "a": 1}}})", "twice");
    EXPECT_EQ(twice.encode("ab"), (Ids{1, 0})) << "the last of two entries counts";
}

/// A small SentencePiece-like tokenizer: ids 0-2 <unk> <s> </s>, 3 U+2581, 4 a, 5 b, 6 U+2581 a, 7 two U+2581, 8-10 the
/// bytes of U+20AC, 11 <x>.
std::string spaced_json(const std::string& rules, const std::string& more_merges = "")
{
    return R"({"added_tokens": [
        {"id": 1, "content": "<s>", "special": true}, {"id": 2, "content": "</s>", "special": true},
        {"id": 11, "content": "<x>", "special": true, "rstrip": true}],
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
        "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3, "a": 4, "b": 5, "\u2581a": 6, "\u2581\u2581": 7,
        "<0xE2>": 8, "<0x82>": 9, "<0xAC>": 10, "a\u2581": 12},
        "merges": [["\u2581", "a"], ["\u2581", "\u2581"])" +
           more_merges + "]}, " + rules + "}";
}

const std::string legacy_rules = R"("normalizer": {"type": "Sequence", "normalizers": [
    {"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
    "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
    {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
    {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1]}, "</s>": {"id": "</s>", "ids": [2]}}})";

std::string metaspace_rules(const std::string& scheme)
{
    return R"("pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "split": false, "prepend_scheme": ")" +
           scheme + "\"}";
}

TEST(SpacedTokenizer, PrefixSpaceGoesBeforeEachStretchOrTheFirst)
{
    const std::string text = "ab</s>a<x>  a";
    EXPECT_EQ(Tokenizer::from_json(spaced_json(legacy_rules), "t").encode(text), (Ids{6, 5, 2, 6, 11, 6}));
    EXPECT_EQ(Tokenizer::from_json(spaced_json(metaspace_rules("always")), "t").encode(text), (Ids{6, 5, 2, 6, 11, 6}));
    EXPECT_EQ(Tokenizer::from_json(spaced_json(metaspace_rules("first")), "t").encode(text), (Ids{6, 5, 2, 4, 11, 4}));
    EXPECT_EQ(Tokenizer::from_json(spaced_json(metaspace_rules("never")), "t").encode(text), (Ids{4, 5, 2, 4, 11, 4}));
    const Tokenizer first = Tokenizer::from_json(spaced_json(metaspace_rules("first")), "t");
    EXPECT_EQ(first.encode(" a"), Ids{6}); // has a space already
}

TEST(SpacedTokenizer, UnknownCharactersAreBytesOrOneUnknownToken)
{
    const Tokenizer tokenizer = Tokenizer::from_json(spaced_json(legacy_rules), "t");
    EXPECT_EQ(tokenizer.encode("a\u20acb"), (Ids{6, 8, 9, 10, 5}));
    EXPECT_EQ(tokenizer.encode("zq\u00e9 zz"), (Ids{3, 0, 3, 0}));
    EXPECT_EQ(tokenizer.decode(Ids{6, 8, 9, 10, 3, 8, 4}), "a\u20ac \ufffda");
    EXPECT_EQ(tokenizer.decode(Ids{1, 7, 6, 2}, SpecialTokens::keep), "<s>   a</s>");
    EXPECT_EQ(tokenizer.decode(Ids{1, 7, 6, 2}), "  a");
}

TEST(SpacedTokenizer, MergesAcrossASpaceAreFound)
{
    EXPECT_EQ(Tokenizer::from_json(spaced_json(legacy_rules), "t").encode("ba b  a"), (Ids{3, 5, 4, 3, 5, 3, 6}));
    const std::string across = spaced_json(legacy_rules, R"(, ["a", "\u2581"])");
    EXPECT_EQ(Tokenizer::from_json(across, "t").encode("ba b  a"), (Ids{3, 5, 12, 5, 3, 6}));
}

TEST(SpacedTokenizer, PostProcessorPutsItsTokensAround)
{
    const Tokenizer tokenizer = Tokenizer::from_json(spaced_json(legacy_rules), "t");
    EXPECT_EQ(tokenizer.encode_with_special_tokens("a"), (Ids{1, 6, 2}));
    EXPECT_EQ(tokenizer.encode_with_special_tokens(""), (Ids{1, 2}));
    EXPECT_EQ(tokenizer.bos_id(), std::nullopt); // no directory says so
    EXPECT_EQ(tiny().encode_with_special_tokens("hello"), Ids{262});
    EXPECT_EQ(tiny().bos_id(), 1);
    EXPECT_EQ(tiny().eos_id(), 2);
}

TEST(SpacedTokenizer, FilesOfTheDirectorySayBosAndEos)
{
    const test::TemporaryDirectory directory;
    directory.write("tokenizer.json", spaced_json(legacy_rules));
    const auto ids = [&] {
        const Tokenizer tokenizer = Tokenizer::from_directory(directory.path(""));
        return std::pair(tokenizer.bos_id(), tokenizer.eos_id());
    };
    EXPECT_EQ(ids(), std::pair(std::optional<std::int32_t>(), std::optional<std::int32_t>()));
    directory.write("config.json", R"({"bos_token_id": 4, "eos_token_id": [5, 2]})");
    EXPECT_EQ(ids(), std::pair(std::optional(4), std::optional(5)));
    directory.write("special_tokens_map.json", R"({"bos_token": {"content": "<s>"}})");
    EXPECT_EQ(ids(), std::pair(std::optional(1), std::optional(5)));
    directory.write("tokenizer_config.json", R"({"bos_token": "<x>", "eos_token": "</s>", "chat_template": ""})");
    EXPECT_EQ(ids(), std::pair(std::optional(11), std::optional(2)));
    for (const auto& [config, named] : {std::pair(R"({"bos_token": "<y>"})", "<y>"),
                                        std::pair(R"({"eos_token": 3})", "eos_token"),
                                        std::pair(R"({"added_tokens_decoder": {"7": {"content": "<x>"}}})", "<x>"),
                                        std::pair(R"({"added_tokens_decoder": {"-7": {"content": "<z>"}}})", "-7")}) {
        directory.write("tokenizer_config.json", config);
        try {
            ids();
            ADD_FAILURE() << config;
        } catch (const Error& error) {
            EXPECT_EQ(error.code(), ExitCode::configuration);
            EXPECT_NE(std::string(error.what()).find(named), std::string::npos) << error.what();
        }
    }
}

TEST(SpacedTokenizer, WhatIsNoSentencePieceModelIsRefused)
{
    const test::TemporaryDirectory directory;
    for (const std::string& content :
         {std::string("IQ== 0\nIg== 1\n"), std::string(), std::string("\x12\x02\x18\x02", 4)}) {
        directory.write("tokenizer.model", content);
        try {
            Tokenizer::from_directory(directory.path(""));
            ADD_FAILURE() << content;
        } catch (const Error& error) {
            EXPECT_EQ(error.code(), ExitCode::configuration);
            EXPECT_NE(std::string(error.what()).find("tokenizer.model"), std::string::npos) << error.what();
        }
    }
}

TEST(Tokenizer, MissingFileIsAnErrorOfTheConfiguration)
{
    const test::TemporaryDirectory directory;
    try {
        Tokenizer::from_directory(directory.path("none"));
        FAIL() << "no error";
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::configuration);
        EXPECT_NE(std::string(error.what()).find("none/tokenizer.json"), std::string::npos) << error.what();
    }
}

} // namespace
} // namespace selm
