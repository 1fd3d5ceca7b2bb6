#include "selm/text/unigram_tokenizer.hpp"

#include <cstdint>
#include <cstring>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "error_message.hpp"
#include "selm/base/error.hpp"
#include "temporary_directory.hpp"

namespace selm {
namespace {

using test::message_of;
using Ids = std::vector<std::int32_t>;
using Json = nlohmann::json;

/// [UNK] 0, then pieces; the added tokens <s> (special) and <mark> (looked for in normalised text).
Json tokenizer_json()
{
    return Json::parse(R"({
        "added_tokens": [{"id": 8, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true},
                         {"id": 9, "content": "<mark>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": true, "special": false}],
        "normalizer": {"type": "Sequence",
                       "normalizers": [{"type": "Strip", "strip_left": true, "strip_right": true},
                                       {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": true},
        "model": {"type": "Unigram", "unk_id": 0,
                  "vocab": [["[UNK]", 0.0], ["\u2581", -2.0], ["a", -3.0], ["b", -3.0], ["ab", -6.0], ["\u2581a", -4.0],
                            ["\u2581ab", -4.5], ["ba", -6.0]]}
    })");
}

class Unigram : public ::testing::Test {
  protected:
    UnigramTokenizer read(const Json& json)
    {
        directory_.write("tokenizer.json", json.dump());
        return UnigramTokenizer::from_directory(directory_.path("."));
    }
    std::string refusal(const Json& json)
    {
        return message_of(ExitCode::configuration, [&] { read(json); });
    }
    test::TemporaryDirectory directory_;
};

TEST_F(Unigram, BestSumOfScoresWins)
{
    const UnigramTokenizer tokenizer = read(tokenizer_json());

    EXPECT_EQ(tokenizer.encode("ab"), (Ids{6}));        // -4.5 against -2-6, -4-3
    EXPECT_EQ(tokenizer.encode("aba"), (Ids{6, 2}));    // -7.5 against -4-5
    EXPECT_EQ(tokenizer.encode("bab"), (Ids{1, 3, 4})); // of cuts with the same sum the one whose last piece is longest
    EXPECT_EQ(tokenizer.encode("a  b"), (Ids{5, 1, 3})); // one space, which begins a word
    EXPECT_EQ(tokenizer.encode(""), Ids{});
    EXPECT_EQ(tokenizer.encode("   "), Ids{});
}

TEST_F(Unigram, NeighbouringUnknownCharactersAreOneToken)
{
    const UnigramTokenizer tokenizer = read(tokenizer_json());

    EXPECT_EQ(tokenizer.encode("xyz"), (Ids{1, 0}));
    EXPECT_EQ(tokenizer.encode("ax\u4e2db y"), (Ids{5, 0, 3, 1, 0}));
    EXPECT_EQ(tokenizer.encode("\xff"), (Ids{1, 0})); // no UTF-8: U+FFFD
}

TEST_F(Unigram, AddedTokensCutTheText)
{
    const UnigramTokenizer tokenizer = read(tokenizer_json());

    EXPECT_EQ(tokenizer.encode("<s>a<s>"), (Ids{8, 5, 8}));
    EXPECT_EQ(tokenizer.encode("  a  <s>"), (Ids{5, 8}));     // the stretch before it is stripped on its own
    EXPECT_EQ(tokenizer.encode("a  <mark>"), (Ids{5, 1, 9})); // found in the normalised text: a space stays before it
    EXPECT_EQ(tokenizer.token_id("<mark>"), 9);
    EXPECT_EQ(tokenizer.token_id("ab"), 4);
    EXPECT_FALSE(tokenizer.token_id("abc"));
    EXPECT_EQ(tokenizer.vocabulary_size(), 10);
}

TEST_F(Unigram, WhatIsNotSupportedIsNamed)
{
    Json json = tokenizer_json();
    json["normalizer"]["normalizers"].push_back({{"type", "Lowercase"}});
    EXPECT_NE(refusal(json).find("Lowercase"), std::string::npos);

    json = tokenizer_json();
    json["pre_tokenizer"]["prepend_scheme"] = "first";
    EXPECT_NE(refusal(json).find("prepend_scheme"), std::string::npos);

    json = tokenizer_json();
    json["pre_tokenizer"] = {{"type", "Punctuation"}};
    EXPECT_NE(refusal(json).find("Punctuation"), std::string::npos);

    json = tokenizer_json();
    json["model"]["type"] = "BPE";
    EXPECT_NE(refusal(json).find("BPE"), std::string::npos);

    json = tokenizer_json();
    json["model"]["vocab"][3] = Json::array({"b", "high"});
    EXPECT_NE(refusal(json).find("entry 3"), std::string::npos);

    json = tokenizer_json();
    json["model"]["unk_id"] = 8;
    EXPECT_NE(refusal(json).find("unknown token"), std::string::npos);
}

TEST_F(Unigram, FilesThatDisagreeAreRefused)
{
    directory_.write("added_tokens.json", R"({"<mark>": 9, "<other>": 10})");

    EXPECT_NE(refusal(tokenizer_json()).find("<other>"), std::string::npos);
}

TEST_F(Unigram, MissingAndDamagedModelsAreNamed)
{
    const auto load = [&] {
        return message_of(ExitCode::configuration, [&] { UnigramTokenizer::from_directory(directory_.path(".")); });
    };
    EXPECT_NE(load().find("neither tokenizer.json nor spm.model"), std::string::npos);

    directory_.write("spm.model", "{\"a\": 1}");
    EXPECT_NE(load().find("no SentencePiece model"), std::string::npos);

    directory_.write("spm.model", "");
    EXPECT_NE(load().find("none of its 0 pieces"), std::string::npos);

    directory_.write("spm.model", std::string("\x0a\x04\x0a\x02\xc3\x28", 6)); // a piece that is no UTF-8
    EXPECT_NE(load().find("no UTF-8"), std::string::npos);

    directory_.write("spm.model", std::string("\x0a\x03\x0a\x01"
                                              "a\x12\x02\x18\x02",
                                              9)); // piece "a"; a BPE model
    EXPECT_NE(load().find("type 2"), std::string::npos);
}

TEST_F(Unigram, SentencePieceModelsAreReadDirectly)
{
    const auto piece = [](const std::string& text, float score, char type) {
        std::string message = cat('\x0a', static_cast<char>(text.size()), text, '\x15');
        message.append(reinterpret_cast<const char*>(&score), sizeof score);
        message += cat('\x18', type);
        return cat('\x0a', static_cast<char>(message.size()), message);
    };
    directory_.write("spm.model", piece("[CLS]", 0, 3) + piece("[UNK]", 0, 2) + piece("\u2581", -2, 1) +
                                      piece("a", -3, 1) + piece("<0x41>", 0, 6) +
                                      std::string("\x12\x03\xc0\x02\x01", 5)); // unk_id = 1
    directory_.write("added_tokens.json", R"({"<mark>": 5})");
    const UnigramTokenizer tokenizer = UnigramTokenizer::from_directory(directory_.path("."));

    EXPECT_EQ(tokenizer.encode("a [CLS] A <mark>"), (Ids{2, 3, 0, 2, 1, 5})); // A is no byte piece but unknown
    EXPECT_EQ(tokenizer.vocabulary_size(), 6);
}

} // namespace
} // namespace selm
