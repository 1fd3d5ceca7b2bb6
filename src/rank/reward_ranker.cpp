#include "selm/rank/reward_ranker.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "selm/base/error.hpp"
#include "selm/model/packed.hpp"

namespace selm {
namespace {

/// Tokens of a row as it is packed, and which branch each candidate is (-1: no such answer).
struct PackedRow {
    std::vector<std::int32_t> trunk;
    std::vector<Branch> branches;
    std::array<std::int32_t, candidates_per_row> branch{};
    std::int64_t tokens() const
    {
        std::int64_t count = static_cast<std::int64_t>(trunk.size());
        for (const Branch& b : branches)
            count += static_cast<std::int64_t>(b.tokens.size());
        return count;
    }
};

class RewardRanker final : public Ranker {
  public:
    explicit RewardRanker(RewardRankerParts parts) : parts_(std::move(parts))
    {
        SELM_VALIDATE(parts_.decoder.config().sequence_classifier, ExitCode::configuration,
                      parts_.directory << " is no reward model (its config.json has no ...ForSequenceClassification and no score.weight). "
                                          "Pass --ranker reward:DIR of one, or make one with selm_train --objective bradley-terry");
    }

    std::string kind() const override { return "reward"; }
    std::string description() const override { return cat("reward model ", parts_.directory); }
    std::string digest() const override { return parts_.digest; }
    std::int64_t computed_tokens() const override { return computed_; }

    double cost(const RankRow& row) const override
    {
        double bytes = 0;
        for (const Message& message : row.messages)
            bytes += static_cast<double>(message.content.size());
        for (const auto& answer : row.answers)
            bytes += answer ? static_cast<double>(answer->size()) : 0;
        return bytes;
    }

    std::vector<RowScores> score(std::span<const RankRow> rows) override
    {
        std::vector<RowScores> scores(rows.size());
        std::vector<PackedRow> packed;
        for (const RankRow& row : rows)
            packed.push_back(pack(row));
        for (std::size_t begin = 0; begin < packed.size();) {
            std::size_t end = begin;
            std::int64_t tokens = 0;
            for (; end < packed.size() && (end == begin || tokens + cost_of(packed[end]) <= parts_.tokens_per_microbatch); ++end)
                tokens += cost_of(packed[end]);
            score_microbatch(rows.subspan(begin, end - begin), std::span(packed).subspan(begin, end - begin),
                             std::span(scores).subspan(begin, end - begin));
            computed_ += tokens;
            begin = end;
        }
        return scores;
    }

  private:
    PackedRow pack(const RankRow& row) const
    {
        std::array<std::optional<std::string_view>, candidates_per_row> texts;
        for (std::size_t c = 0; c < candidates_per_row; ++c)
            if (row.answers[c])
                texts[c] = *row.answers[c];
        EncodedRow encoded = encode_row_chat(parts_.tokenizer, parts_.format, row.messages, texts, parts_.limits);
        PackedRow packed;
        packed.trunk = std::move(encoded.prompt);
        for (std::size_t c = 0; c < candidates_per_row; ++c) {
            packed.branch[c] = -1;
            if (!encoded.responses[c])
                continue;
            const auto same = std::find_if(packed.branches.begin(), packed.branches.end(),
                                           [&](const Branch& b) { return b.tokens == *encoded.responses[c]; });
            packed.branch[c] = static_cast<std::int32_t>(same - packed.branches.begin());
            if (same == packed.branches.end())
                packed.branches.push_back({std::move(*encoded.responses[c]), 0});
        }
        return packed;
    }

    /// Tokens to compute: none where there is no answer to score.
    static std::int64_t cost_of(const PackedRow& row) { return row.branches.empty() ? 0 : row.tokens(); }

    void score_microbatch(std::span<const RankRow> rows, std::span<const PackedRow> packed, std::span<RowScores> scores)
    {
        PackedBatch batch;
        std::size_t branches = 0;
        for (const PackedRow& row : packed) {
            if (!row.branches.empty())
                batch.add_last_token(row.trunk, row.branches);
            branches += row.branches.size();
        }
        std::vector<float> rewards(branches);
        if (branches > 0) {
            Engine& engine = parts_.decoder.engine();
            const auto pass = parts_.decoder.forward(batch, false);
            const Tensor out = engine.allocate(static_cast<std::int64_t>(branches), 1, DType::f32);
            engine.logits(pass->hidden(), parts_.weights.head(WeightUse::forward), out);
            parts_.weights.release_head();
            engine.copy_to_host(out, rewards.data());
        }
        std::size_t first = 0;
        for (std::size_t i = 0; i < packed.size(); ++i) {
            for (std::size_t c = 0; c < candidates_per_row; ++c) {
                const std::int32_t branch = packed[i].branch[c];
                scores[i].scores[c] = branch < 0 ? std::numeric_limits<double>::quiet_NaN()
                                                 : static_cast<double>(rewards[first + static_cast<std::size_t>(branch)]);
                SELM_VALIDATE(branch < 0 || std::isfinite(scores[i].scores[c]), ExitCode::bad_data,
                              parts_.directory << " gives a non-finite reward for row " << rows[i].row << " (its weights are damaged, or "
                                                  "overflow). Check the model");
            }
            first += packed[i].branches.size();
        }
    }

    RewardRankerParts parts_;
    std::int64_t computed_ = 0;
};

} // namespace

std::unique_ptr<Ranker> make_reward_ranker(RewardRankerParts parts)
{
    return std::make_unique<RewardRanker>(std::move(parts));
}

} // namespace selm
