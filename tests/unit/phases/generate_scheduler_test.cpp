#include "selm/phases/generate_scheduler.hpp"

#include <algorithm>
#include <map>
#include <set>
#include <vector>

#include <gtest/gtest.h>

#include "selm/base/error.hpp"
#include "selm/base/hash.hpp"

namespace selm {
namespace {

constexpr std::int64_t vocabulary = 40;
constexpr std::int32_t end_token = 3;

/// Logits that depend on every token so far: a token at a wrong place, or of another row, changes what follows.
std::vector<float> logits_after(const std::vector<std::int32_t>& sequence)
{
    const std::uint64_t key = hash64(sequence.data(), sequence.size() * sizeof(std::int32_t));
    RandomStream random(key, 3, 0, 0);
    std::vector<float> logits(vocabulary);
    for (float& logit : logits)
        logit = static_cast<float>(2 * random.next_normal());
    return logits;
}

/// Plays the decoder: keeps the sequence of each slot by position and checks the rules of DecodeWork.
class FakeModel {
  public:
    explicit FakeModel(std::int64_t slots) : sequences_(static_cast<std::size_t>(slots)) {}

    Tensor step(std::span<const DecodeWork> work)
    {
        logits_.clear();
        prefill_tokens = 0;
        std::set<std::int64_t> decoding;
        for (const DecodeWork& item : work) {
            auto& sequence = sequences_.at(static_cast<std::size_t>(item.slot));
            if (item.prefill) {
                if (item.prefix_slot >= 0) {
                    const auto& other = sequences_.at(static_cast<std::size_t>(item.prefix_slot));
                    EXPECT_NE(item.prefix_slot, item.slot);
                    EXPECT_EQ(item.position_begin % 2, 0);
                    EXPECT_LE(item.position_begin, static_cast<std::int64_t>(other.size()));
                    sequence.assign(other.begin(), other.begin() + item.position_begin);
                } else {
                    EXPECT_EQ(item.position_begin % prefill_tile, 0);
                    if (item.position_begin == 0)
                        sequence.clear();
                }
                EXPECT_LE(item.position_begin % prefill_tile + static_cast<std::int64_t>(item.tokens.size()), prefill_tile);
                prefill_tokens += static_cast<std::int64_t>(item.tokens.size());
            } else {
                EXPECT_EQ(item.tokens.size(), 1U);
                EXPECT_TRUE(decoding.insert(item.slot).second) << "slot twice in a step";
            }
            EXPECT_EQ(item.position_begin, static_cast<std::int64_t>(sequence.size()));
            sequence.insert(sequence.end(), item.tokens.begin(), item.tokens.end());
            if (item.wants_logits) {
                const auto logits = logits_after(sequence);
                logits_.insert(logits_.end(), logits.begin(), logits.end());
            }
        }
        all_prefill_tokens += prefill_tokens;
        most_prefill_tokens = std::max(most_prefill_tokens, prefill_tokens);
        ++steps;
        return borrow_f32(logits_.data(), static_cast<std::int64_t>(logits_.size()) / vocabulary, vocabulary);
    }

    std::int64_t prefill_tokens = 0, most_prefill_tokens = 0, all_prefill_tokens = 0, steps = 0;

  private:
    std::vector<std::vector<std::int32_t>> sequences_;
    std::vector<float> logits_;
};

struct Case {
    std::vector<std::vector<std::int32_t>> prompts;
    std::vector<std::int64_t> limits;
};

Case make_case(int rows)
{
    Case result;
    RandomStream random(99, 3, 0, 0);
    for (int row = 0; row < rows; ++row) {
        const std::int64_t lengths[] = {1, 63, 64, 65, 128, 200};
        std::vector<std::int32_t> prompt(static_cast<std::size_t>(lengths[row % 6]));
        for (auto& token : prompt)
            token = static_cast<std::int32_t>(random.next_below(vocabulary));
        result.prompts.push_back(prompt);
        result.limits.push_back(1 + static_cast<std::int64_t>(random.next_below(60)));
    }
    return result;
}

ContinuousBatch::Options batch_options(std::int64_t slots, double temperature)
{
    return {.slots = slots,
            .end_tokens = {end_token, 17},
            .sampling = {.temperature = temperature},
            .allowed_ids = vocabulary,
            .seed = 42,
            .iteration = 2};
}

/// One row after the other, without batching.
SampledAnswer expected_answer(const Case& rows, std::int64_t row, double temperature)
{
    auto sequence = rows.prompts[static_cast<std::size_t>(row)];
    Sampler sampler({.temperature = temperature}, vocabulary);
    RandomStream stream(42, 1, 2, static_cast<std::uint64_t>(row));
    SampledAnswer answer;
    answer.row = row;
    while (!answer.ended &&
           static_cast<std::int64_t>(answer.tokens.size()) < rows.limits[static_cast<std::size_t>(row)]) {
        const SampledToken token = sampler.sample(logits_after(sequence), stream);
        sequence.push_back(token.id);
        answer.tokens.push_back(token.id);
        answer.log_probs.push_back(token.log_prob);
        answer.ended = token.id == end_token || token.id == 17;
    }
    return answer;
}

std::map<std::int64_t, SampledAnswer> run(ContinuousBatch& batch, const Case& rows)
{
    std::map<std::int64_t, SampledAnswer> answers;
    std::int64_t next = 0;
    while (next < static_cast<std::int64_t>(rows.prompts.size()) || !batch.empty()) {
        while (batch.free_slots() > 0 && next < static_cast<std::int64_t>(rows.prompts.size())) {
            batch.add({.row = next,
                       .prompt = rows.prompts[static_cast<std::size_t>(next)],
                       .max_new_tokens = rows.limits[static_cast<std::size_t>(next)]});
            ++next;
        }
        for (SampledAnswer& answer : batch.step())
            EXPECT_TRUE(answers.emplace(answer.row, answer).second);
    }
    return answers;
}

TEST(ContinuousBatch, AnswersDependOnNeitherSlotsNorPrefillBudget)
{
    const Case rows = make_case(40);
    int ended = 0;
    for (const double temperature : {0.0, 1.0}) {
        for (const std::int64_t slots : {1, 3, 16, 64}) {
            for (const std::int64_t prefill : {1, 64, 256}) {
                FakeModel model(slots);
                auto options = batch_options(slots, temperature);
                options.prefill_tokens = prefill;
                ContinuousBatch batch(options, [&](std::span<const DecodeWork> work) { return model.step(work); });
                const auto answers = run(batch, rows);
                ASSERT_EQ(answers.size(), rows.prompts.size());
                for (const auto& [row, answer] : answers) {
                    const SampledAnswer expected = expected_answer(rows, row, temperature);
                    EXPECT_EQ(answer.tokens, expected.tokens) << "row " << row << " slots " << slots;
                    EXPECT_EQ(answer.log_probs, expected.log_probs);
                    EXPECT_EQ(answer.ended, expected.ended);
                    ended += answer.ended;
                }
                EXPECT_LE(model.most_prefill_tokens, std::max<std::int64_t>(prefill, prefill_tile));
            }
        }
    }
    EXPECT_GT(ended, 0);
    EXPECT_LT(ended, 2 * 4 * 3 * 40);
}

TEST(ContinuousBatch, PromptsThatBeginAlikeAreReadOnce)
{
    // A system message of 24 tokens, then prompts of their own; two are equal, one is a beginning of another, one is alone.
    Case rows = make_case(24);
    std::vector<std::int32_t> system(24);
    for (std::size_t i = 0; i < system.size(); ++i)
        system[i] = static_cast<std::int32_t>(5 + i);
    for (std::size_t row = 0; row + 1 < rows.prompts.size(); ++row)
        rows.prompts[row].insert(rows.prompts[row].begin(), system.begin(), system.end());
    rows.prompts[7] = rows.prompts[5];
    rows.prompts[9] = {rows.prompts[5].begin(), rows.prompts[5].begin() + 70};
    rows.prompts[11] = system;
    for (const std::int64_t granularity : {2, 64, 0}) {
        for (const std::int64_t slots : {1, 2, 16, 64}) {
            for (const std::int64_t prefill : {64, 256}) {
                FakeModel model(slots);
                auto options = batch_options(slots, 1);
                options.prefill_tokens = prefill;
                options.prefix_granularity = granularity;
                ContinuousBatch batch(options, [&](std::span<const DecodeWork> work) { return model.step(work); });
                const auto answers = run(batch, rows);
                ASSERT_EQ(answers.size(), rows.prompts.size());
                std::int64_t tokens = 0;
                for (const auto& [row, answer] : answers) {
                    EXPECT_EQ(answer.tokens, expected_answer(rows, row, 1).tokens) << "row " << row << " slots " << slots;
                    tokens += static_cast<std::int64_t>(rows.prompts[static_cast<std::size_t>(row)].size());
                }
                EXPECT_EQ(batch.prompt_tokens(), tokens);
                EXPECT_EQ(model.all_prefill_tokens + batch.copied_tokens(), tokens);
                if (granularity == 0 || slots == 1) {
                    EXPECT_EQ(batch.copied_tokens(), 0);
                } else if (slots == 64 && prefill == 256) { // all in flight: everything in common but last tokens
                    EXPECT_EQ(batch.copied_tokens(), granularity == 2 ? 19 * 24 + 22 + 222 + 68 : 192 + 64);
                } else if (granularity == 2) {
                    EXPECT_GT(batch.copied_tokens(), 0);
                }
            }
        }
    }
}

TEST(ContinuousBatch, CountsTokensOfPromptsAndAnswers)
{
    const Case rows = make_case(12);
    FakeModel model(4);
    ContinuousBatch batch(batch_options(4, 0), [&](std::span<const DecodeWork> work) { return model.step(work); });
    std::int64_t answer_tokens = 0, prompt_tokens = 0;
    for (const auto& [row, answer] : run(batch, rows))
        answer_tokens += static_cast<std::int64_t>(answer.tokens.size());
    for (const auto& prompt : rows.prompts)
        prompt_tokens += static_cast<std::int64_t>(prompt.size());
    EXPECT_EQ(batch.new_tokens(), answer_tokens);
    EXPECT_EQ(batch.prompt_tokens(), prompt_tokens);
}

TEST(ContinuousBatch, DecodingGoesOnWhileAPromptIsRead)
{
    const std::vector<std::int32_t> brief{1, 2}, lengthy(640, 5);
    FakeModel model(2);
    auto options = batch_options(2, 0);
    options.prefill_tokens = 64;
    options.end_tokens = {vocabulary}; // never
    ContinuousBatch batch(options, [&](std::span<const DecodeWork> work) { return model.step(work); });
    batch.add({.row = 0, .prompt = brief, .max_new_tokens = 9});
    batch.step();
    batch.add({.row = 1, .prompt = lengthy, .max_new_tokens = 1});
    std::vector<std::int64_t> order;
    for (int step = 0; step < 10; ++step) {
        for (const auto& answer : batch.step())
            order.push_back(answer.row);
    }
    EXPECT_EQ(order, (std::vector<std::int64_t>{0, 1})); // 8 further steps for row 0, 10 tiles for row 1
    EXPECT_TRUE(batch.empty());
    EXPECT_TRUE(batch.step().empty());
}

TEST(ContinuousBatch, WantsRowsForTheNextStepOnly)
{
    const std::vector<std::int32_t> brief(30, 1), lengthy(150, 5);
    FakeModel model(8);
    auto options = batch_options(8, 0);
    options.prefill_tokens = 128;
    options.end_tokens = {vocabulary}; // never
    ContinuousBatch batch(options, [&](std::span<const DecodeWork> work) { return model.step(work); });
    EXPECT_TRUE(batch.wants_row());
    batch.add({.row = 0, .prompt = lengthy, .max_new_tokens = 3}); // a step reads 128 tokens
    EXPECT_FALSE(batch.wants_row());
    batch.step();
    EXPECT_TRUE(batch.wants_row()); // one tile is left
    batch.add({.row = 1, .prompt = brief, .max_new_tokens = 1});
    EXPECT_FALSE(batch.wants_row());
    batch.step();
    EXPECT_TRUE(batch.wants_row());
    for (std::int64_t row = 2; batch.free_slots() > 0; ++row)
        batch.add({.row = row, .prompt = brief, .max_new_tokens = 9}); // seven of them
    std::int64_t steps = 0;
    for (; !batch.wants_row(); ++steps)
        batch.step();
    EXPECT_EQ(steps, 2);              // four prompts and three
    EXPECT_EQ(batch.free_slots(), 1); // row 0 has its three tokens
    batch.add({.row = 99, .prompt = brief, .max_new_tokens = 9});
    EXPECT_FALSE(batch.wants_row()); // no slot is free
    batch.step();
    EXPECT_FALSE(batch.wants_row());
}

TEST(ContinuousBatch, NamesTheRowWhoseLogitsAreNotFinite)
{
    std::vector<float> logits(vocabulary, std::numeric_limits<float>::quiet_NaN());
    ContinuousBatch batch(batch_options(1, 0),
                          [&](std::span<const DecodeWork>) { return borrow_f32(logits.data(), 1, vocabulary); });
    const std::vector<std::int32_t> prompt{1};
    batch.add({.row = 77, .prompt = prompt, .max_new_tokens = 5});
    try {
        batch.step();
        FAIL() << "no error";
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::bad_data);
        EXPECT_NE(std::string(error.what()).find("row 77"), std::string::npos) << error.what();
    }
}

} // namespace
} // namespace selm
