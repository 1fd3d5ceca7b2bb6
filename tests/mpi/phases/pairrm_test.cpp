#include <array>
#include <cmath>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "phase_fixture.hpp"
#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/base/rng.hpp"
#include "selm/data/iteration.hpp"
#include "selm/data/journal.hpp"
#include "selm/data/preferences.hpp"
#include "selm/model/deberta.hpp"
#include "selm/phases/inspect.hpp"
#include "selm/phases/rank.hpp"

namespace selm {
namespace {

using test::test_world;

constexpr std::int64_t row_count = 45; // five blocks of eight and a rest
constexpr std::int64_t row_of_equals = 6, row_without_answer = 11, row_of_equal_pair = 12;

/// A tokenizer with one piece per letter, PairRM's tokens behind them.
nlohmann::json tokenizer_json()
{
    nlohmann::json vocabulary = nlohmann::json::array();
    for (const char* special : {"[PAD]", "[CLS]", "[SEP]", "[UNK]"})
        vocabulary.push_back(nlohmann::json::array({special, 0.0}));
    vocabulary.push_back(nlohmann::json::array({"\u2581", -2.0}));
    for (char letter = 'a'; letter <= 'z'; ++letter)
        vocabulary.push_back(nlohmann::json::array({std::string(1, letter), -3.0}));
    nlohmann::json added = nlohmann::json::array();
    std::int64_t id = static_cast<std::int64_t>(vocabulary.size());
    for (const char* prefix : {"<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>"})
        added.push_back({{"id", id++}, {"content", prefix}, {"special", false}, {"normalized", false}});
    return {{"added_tokens", added},
            {"normalizer", {{"type", "Strip"}, {"strip_left", true}, {"strip_right", true}}},
            {"pre_tokenizer", {{"type", "Metaspace"}, {"replacement", "\u2581"}, {"prepend_scheme", "always"}}},
            {"model", {{"type", "Unigram"}, {"unk_id", 3}, {"vocab", vocabulary}}}};
}

/// A pair ranker with random weights in PairRM-hf's layout, texts cut at 24 and 16 tokens; by one rank.
void make_tiny_ranker(const std::string& directory, std::uint64_t seed)
{
    std::filesystem::create_directories(directory);
    const nlohmann::json tokenizer = tokenizer_json();
    write_file_atomically(directory + "/tokenizer.json", tokenizer.dump());
    DebertaConfig config;
    config.vocabulary = static_cast<std::int64_t>(tokenizer["model"]["vocab"].size() + tokenizer["added_tokens"].size());
    config.hidden = config.intermediate = 32;
    config.layers = config.heads = 2;
    config.position_buckets = 8;
    config.max_relative_positions = 16;
    write_file_atomically(directory + "/config.json",
                          nlohmann::json{{"model_type", "deberta-v2"},
                                         {"vocab_size", config.vocabulary},
                                         {"hidden_size", 32},
                                         {"intermediate_size", 32},
                                         {"num_hidden_layers", 2},
                                         {"num_attention_heads", 2},
                                         {"hidden_act", "gelu"},
                                         {"layer_norm_eps", 1e-7},
                                         {"position_buckets", 8},
                                         {"max_relative_positions", 16},
                                         {"max_position_embeddings", 16},
                                         {"relative_attention", true},
                                         {"share_att_key", true},
                                         {"pos_att_type", {"p2c", "c2p"}},
                                         {"norm_rel_ebd", "layer_norm"},
                                         {"position_biased_input", false},
                                         {"type_vocab_size", 0},
                                         {"pad_token_id", 0},
                                         {"source_maxlength", 24},
                                         {"candidate_maxlength", 16}}
                              .dump());
    write_pair_weights(
        directory, config,
        [&](std::int64_t parameter, std::int64_t begin, std::span<float> out) {
            for (std::size_t i = 0; i < out.size(); ++i) {
                RandomStream random(seed, 3, static_cast<std::uint64_t>(parameter), static_cast<std::uint64_t>(begin) + i);
                out[i] = static_cast<float>(0.4 * random.next_normal());
            }
        },
        DType::f32);
}

class PairRm : public test::PhaseFixture<::testing::TestWithParam<const char*>> {
  protected:
    void SetUp() override
    {
        PhaseFixture::SetUp();
        on_root([&] {
            make_tiny_ranker(path("ranker"), 5);
            write_preferences(path("prefs.h5"), preference_rows(), {}, *make_single_communicator());
        });
        options_.common.progress = "off";
        options_.iter = path("iter.h5");
        options_.rankers = {"pairrm:" + path("ranker")};
        options_.rank_mode = GetParam();
        make_iteration(options_.iter);
    }

    static std::string letters(std::int64_t row, std::int64_t column, std::int64_t length)
    {
        std::string text;
        RandomStream random(1, 3, static_cast<std::uint64_t>(column), static_cast<std::uint64_t>(row));
        for (std::int64_t i = 0; i < length; ++i)
            text += static_cast<char>('a' + random.next_below(26));
        return text;
    }
    static std::vector<PreferenceRow> preference_rows()
    {
        std::vector<PreferenceRow> rows;
        for (std::int64_t i = 0; i < row_count; ++i) {
            PreferenceRow row;
            row.id = cat("id", i);
            row.prompt = letters(i, 0, 1 + i * 7 % 30);
            row.messages = {{Role::user, row.prompt}};
            row.chosen = i == row_of_equals ? "same" : letters(i, 1, i * 5 % 40); // some are empty
            row.rejected = i == row_of_equals ? "same" : letters(i, 2, 1 + i * 3 % 40);
            rows.push_back(row);
        }
        return rows;
    }
    static std::string answer(std::int64_t row)
    {
        if (row == row_of_equals)
            return "same";
        return row == row_of_equal_pair ? preference_rows()[row_of_equal_pair].rejected : letters(row, 3, row * 11 % 40);
    }
    void make_iteration(const std::string& file)
    {
        write_given_answers(file, path("prefs.h5"), row_count, [](std::int64_t i) {
            return i != row_without_answer ? std::optional(answer(i)) : std::nullopt;
        });
    }
    std::string digest_of_one_rank()
    {
        RankOptions alone = options_;
        alone.iter = path("alone.h5");
        make_iteration(alone.iter);
        on_root([&] { run_rank(alone, *make_single_communicator()); });
        return digest(alone.iter);
    }

    RankOptions options_;
};

TEST_P(PairRm, ScoresDependOnNeitherRanksNorMicrobatches)
{
    const std::string alone = digest_of_one_rank();
    for (const std::int64_t tokens : {1, 4096}) {
        options_.iter = path(cat("together", tokens, ".h5"));
        make_iteration(options_.iter);
        options_.tokens_per_microbatch = tokens;
        const RankReport report = run_rank(options_, test_world());
        EXPECT_EQ(report.outcome, Outcome::done);
        EXPECT_GT(report.tokens, 6 * row_count * 10);
        EXPECT_EQ(digest(options_.iter), alone) << tokens << " tokens per microbatch";
    }
    EXPECT_NO_THROW(verify_file(options_.iter));
    EXPECT_EQ(run_rank(options_, test_world()).outcome, Outcome::already_complete);
}

TEST_P(PairRm, EqualAndMissingCandidates)
{
    run_rank(options_, test_world());

    const IterationReader file(options_.iter);
    const auto scores = file.ranker_scores("pairrm");
    const auto ranks = file.ranking_ranks();
    const auto logits = file.file().read<float>("/ranking/rankers/pairrm/logits");
    ASSERT_EQ(logits.size(), 9 * row_count);
    const auto logit = [&](std::int64_t row, std::int64_t i, std::int64_t j) {
        return logits[static_cast<std::size_t>(9 * row + 3 * i + j)];
    };
    EXPECT_EQ(ranks[row_of_equals], (std::array<std::int32_t, 3>{1, 1, 1}));
    EXPECT_EQ(logit(row_of_equals, 0, 1), logit(row_of_equals, 2, 1));
    EXPECT_NE(logit(row_of_equals, 0, 1), 0); // the places differ
    EXPECT_EQ(scores[row_of_equal_pair][0], scores[row_of_equal_pair][2]);
    EXPECT_EQ(logit(row_of_equal_pair, 0, 1), logit(row_of_equal_pair, 2, 1));

    EXPECT_TRUE(std::isnan(logit(row_without_answer, 0, 1)) && std::isnan(logit(row_without_answer, 2, 0)));
    const float difference = logit(row_without_answer, 1, 2) - logit(row_without_answer, 2, 1);
    EXPECT_TRUE(std::isnan(scores[row_without_answer][0]));
    EXPECT_EQ(scores[row_without_answer][1], static_cast<double>(difference / 2));
    EXPECT_EQ(ranks[row_without_answer][0], 0);
    for (std::int64_t i = 0; i < row_count; ++i)
        EXPECT_EQ(logit(i, 1, 1), 0) << i;
}

TEST_P(PairRm, FinishedRowsSurviveAStopAndTornRecords)
{
    const std::string alone = digest_of_one_rank();
    options_.stop_file = path("STOP");
    on_root([&] { write_file_atomically(path("STOP"), ""); });
    ASSERT_EQ(run_rank(options_, test_world()).outcome, Outcome::stopped);
    const std::string journal = options_.iter + ".rank-pairrm";
    ASSERT_TRUE(Journal::exists(journal));
    on_root([&] {
        std::filesystem::remove(path("STOP"));
        for (const auto& file : std::filesystem::directory_iterator(journal + ".journal")) // as a kill while writing does
            if (file.file_size() > 200)
                std::filesystem::resize_file(file.path(), file.file_size() - 3);
    });

    const RankReport report = run_rank(options_, test_world());

    EXPECT_EQ(report.outcome, Outcome::done);
    EXPECT_EQ(digest(options_.iter), alone);
    EXPECT_FALSE(Journal::exists(journal));
}

INSTANTIATE_TEST_SUITE_P(Modes, PairRm, ::testing::Values("per-row", "blender"),
                         [](const auto& mode) { return std::string(mode.param) == "blender" ? "Blender" : "PerRow"; });

} // namespace
} // namespace selm
