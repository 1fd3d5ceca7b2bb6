#include "selm/rank/pairrm_inputs.hpp"

#include <cmath>
#include <limits>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "error_message.hpp"
#include "selm/algo/selection.hpp"
#include "temporary_directory.hpp"

namespace selm {
namespace {

using test::message_of;
using Ids = std::vector<std::int32_t>;

constexpr std::int32_t cls = 1, sep = 2, unknown = 3, space_a = 4, space_b = 5, source = 6, candidate1 = 7,
                       candidate2 = 8, candidate = 9;

/// Words "a" and "b" are one token each.
nlohmann::json tokenizer_json(bool with_prefixes = true)
{
    nlohmann::json json = nlohmann::json::parse(R"({
        "added_tokens": [],
        "normalizer": {"type": "Sequence",
                       "normalizers": [{"type": "Strip", "strip_left": true, "strip_right": true},
                                       {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": true},
        "model": {"type": "Unigram", "unk_id": 3,
                  "vocab": [["[PAD]", 0.0], ["[CLS]", 0.0], ["[SEP]", 0.0], ["[UNK]", 0.0], ["\u2581a", -1.0], ["\u2581b", -1.0]]}
    })");
    std::vector<std::pair<std::string, std::int32_t>> added{{"[CLS]", cls}, {"[SEP]", sep}};
    if (with_prefixes)
        added.insert(added.end(), {{"<|source|>", source},
                                   {"<|candidate1|>", candidate1},
                                   {"<|candidate2|>", candidate2},
                                   {"<|candidate|>", candidate}});
    for (const auto& [content, id] : added)
        json["added_tokens"].push_back({{"id", id}, {"content", content}, {"special", true}, {"normalized", false}});
    return json;
}

class PairInputs : public ::testing::Test {
  protected:
    PairInputs() : tokenizer_(read(tokenizer_json())) {}

    UnigramTokenizer read(const nlohmann::json& json)
    {
        directory_.write("tokenizer.json", json.dump());
        return UnigramTokenizer::from_directory(directory_.path("."));
    }
    PairTokens tokens() const { return PairTokens::of(tokenizer_, config(), "DIR"); }
    static DebertaConfig config()
    {
        DebertaConfig config;
        config.vocabulary = 10;
        return config;
    }
    PairEncoder encoder(PairLimits limits, PairRankMode mode) const { return {tokenizer_, tokens(), limits, mode}; }
    static std::string words(int count)
    {
        std::string text;
        for (int i = 0; i < count; ++i)
            text += i % 2 == 0 ? "a " : "b ";
        return text;
    }

    test::TemporaryDirectory directory_;
    UnigramTokenizer tokenizer_;
};

TEST_F(PairInputs, APairIsThreePartsAndItsPrefixesArePooled)
{
    const PairEncoder encode = encoder({}, PairRankMode::per_row);
    const auto rows = encode.encode({{{.prompt = "a b", .candidates = {"b", "", std::nullopt}}}});

    const PairInput input = encode.pair(rows[0].source, *rows[0].candidates[0], *rows[0].candidates[1]);

    EXPECT_EQ(input.ids,
              (Ids{cls, source, space_a, space_b, sep, cls, candidate1, space_b, sep, cls, candidate2, sep}));
    EXPECT_EQ(input.source, 1);
    EXPECT_EQ(input.left, 6);
    EXPECT_EQ(input.right, 10);
    EXPECT_FALSE(rows[0].candidates[2]);
    const PairInput swapped = encode.pair(rows[0].source, *rows[0].candidates[1], *rows[0].candidates[0]);
    EXPECT_EQ(swapped.ids,
              (Ids{cls, source, space_a, space_b, sep, cls, candidate1, sep, cls, candidate2, space_b, sep}));
}

TEST_F(PairInputs, PerRowCutsByTheRowsOwnSource)
{
    const PairLimits limits{.source = 8, .candidate = 6}; // 20 in all
    const std::string prompt = words(50), other = "a", long_answer = words(50);
    const auto rows = encoder(limits, PairRankMode::per_row)
                          .encode({{{.prompt = prompt, .candidates = {long_answer, "a", std::nullopt}},
                                    {.prompt = other, .candidates = {long_answer, std::nullopt, std::nullopt}}}});

    EXPECT_EQ(rows[0].source, (Ids{cls, source, space_a, space_b, space_a, space_b, space_a, sep}));
    EXPECT_EQ(rows[0].candidates[0]->size(), 6U); // (20 - 8) / 2
    EXPECT_EQ(rows[0].candidates[0]->back(), sep);
    EXPECT_EQ(rows[0].candidates[1], (Ids{cls, candidate1, space_a, sep}));
    EXPECT_EQ(rows[1].candidates[0]->size(), 8U); // (20 - 4) / 2
}

TEST_F(PairInputs, BlenderCutsByTheLongestSourceOfTheBatch)
{
    const PairLimits limits{.source = 12, .candidate = 6};
    const std::string seven = words(4), long_answer = words(50); // a source of 7 tokens
    const PairEncoder encode = encoder(limits, PairRankMode::blender);

    const auto alone = encode.encode({{{.prompt = "a", .candidates = {long_answer, std::nullopt, std::nullopt}}}});
    const auto batch = encode.encode({{{.prompt = "a", .candidates = {long_answer, std::nullopt, std::nullopt}},
                                       {.prompt = seven, .candidates = {}}}});

    EXPECT_EQ(alone[0].candidates[0]->size(), 10U); // 6 + (12 - 4) / 2
    EXPECT_EQ(batch[0].candidates[0]->size(), 8U);  // 6 + (12 - 7) / 2
    EXPECT_EQ((*batch[0].candidates[0])[1], candidate1);
}

TEST_F(PairInputs, LiteralTokensInTexts)
{
    const auto text = std::string("a[SEP]b");
    const auto per_row = encoder({}, PairRankMode::per_row)
                             .encode({{{.prompt = text, .candidates = {"<|source|>", std::nullopt, std::nullopt}}}});
    const auto blender = encoder({}, PairRankMode::blender)
                             .encode({{{.prompt = text, .candidates = {"[SEP]", std::nullopt, std::nullopt}}}});

    EXPECT_EQ(per_row[0].source, (Ids{cls, source, space_a, sep, space_b, sep}));
    EXPECT_EQ(per_row[0].candidates[0], (Ids{cls, candidate1, source, sep}));
    EXPECT_EQ(blender[0].source, (Ids{cls, source, space_a, space_b, sep}));
    EXPECT_EQ(blender[0].candidates[0], (Ids{cls, candidate1, sep}));
}

TEST_F(PairInputs, AMarkThatJoinsThePrefixDoesNotHideIt)
{
    nlohmann::json json = tokenizer_json();
    for (auto& token : json["added_tokens"])
        token["normalized"] = true;
    // A normaliser that swallows the prefix's last character when a mark follows it.
    json["normalizer"]["normalizers"].push_back(
        {{"type", "Replace"}, {"pattern", {{"String", ">\u0301"}}}, {"content", "b"}});
    tokenizer_ = read(json);

    const auto rows = encoder({}, PairRankMode::per_row).encode({{{.prompt = "\u0301", .candidates = {}}}});

    EXPECT_EQ(rows[0].source[1], source);
    EXPECT_EQ(rows[0].source[2], unknown);
}

TEST_F(PairInputs, TokensThatAreMissingOrElsewhereAreNamed)
{
    const auto of = [](const UnigramTokenizer& tokenizer, const DebertaConfig& model) {
        return message_of(ExitCode::configuration, [&] { PairTokens::of(tokenizer, model, "DIR"); });
    };
    EXPECT_NE(of(read(tokenizer_json(false)), config()).find("no token \"<|source|>\""), std::string::npos);

    DebertaConfig other = config();
    other.candidate2_prefix_id = 5;
    EXPECT_NE(of(tokenizer_, other).find("config.json says 5"), std::string::npos);

    other = config();
    other.vocabulary = 9;
    EXPECT_NE(of(tokenizer_, other).find("vocabulary is 9"), std::string::npos);
}

TEST_F(PairInputs, LimitsComeFromTheRankersConfiguration)
{
    const auto limits = [&](const std::string& json) {
        directory_.write("config.json", json);
        return PairLimits::from_directory(directory_.path("."));
    };
    EXPECT_EQ(limits("{}").total(), 2048);
    EXPECT_EQ(limits(R"({"source_maxlength": 128, "candidate_maxlength": 64})").total(), 256);
    EXPECT_NE(message_of(ExitCode::configuration, [&] { limits(R"({"source_maxlength": 2})"); }).find("out of range"),
              std::string::npos);
    EXPECT_NE(message_of(ExitCode::configuration, [&] { limits(R"({"candidate_maxlength": "x"})"); })
                  .find("candidate_maxlength"),
              std::string::npos);
}

TEST(PairScores, MeanOfDifferencesOverAllCandidates)
{
    const PairLogits logits{0, 1, 4, /**/ -1, 0, 2, /**/ -2, -5, 0};

    const auto scores = pair_scores(logits, {true, true, true});

    EXPECT_FLOAT_EQ(static_cast<float>(scores[0]), (2 + 6) / 3.0F); // (1 - -1) + (4 - -2)
    EXPECT_FLOAT_EQ(static_cast<float>(scores[1]), (-2 + 7) / 3.0F);
    EXPECT_FLOAT_EQ(static_cast<float>(scores[2]), (-6 - 7) / 3.0F);
    EXPECT_EQ(ranks_of(scores), (std::array<std::int32_t, 3>{1, 2, 3}));
}

TEST(PairScores, MissingCandidatesAreLeftOut)
{
    constexpr float none = std::numeric_limits<float>::quiet_NaN();
    const auto scores = pair_scores({none, none, none, none, 0, 3, none, 1, 0}, {false, true, true});

    EXPECT_TRUE(std::isnan(scores[0]));
    EXPECT_EQ(scores[1], 1); // (3 - 1) / 2
    EXPECT_EQ(scores[2], -1);
}

TEST(PairScores, EqualCandidatesTie)
{
    const auto all = pair_scores({0, 0.7F, 0.7F, 0.7F, 0, 0.7F, 0.7F, 0.7F, 0}, {true, true, true});
    EXPECT_EQ(ranks_of(all), (std::array<std::int32_t, 3>{1, 1, 1}));
    EXPECT_EQ(choose_pair(all, UpdateRule::best_worst).best, 0);
    EXPECT_EQ(choose_pair(all, UpdateRule::best_worst).worst, 0);

    // The first is better than two equal ones, of which the first is the worst.
    const auto two = pair_scores({0, 2, 2, -1, 0, 0.3F, -1, 0.3F, 0}, {true, true, true});
    EXPECT_EQ(ranks_of(two), (std::array<std::int32_t, 3>{1, 2, 2}));
    EXPECT_EQ(choose_pair(two, UpdateRule::best_worst).worst, 1);
}

} // namespace
} // namespace selm
