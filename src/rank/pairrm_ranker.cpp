#include "selm/rank/pairrm_ranker.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "selm/base/error.hpp"

namespace selm {
namespace {

constexpr double bytes_per_token = 4; // of English text; only the order of hand-out depends on it

/// The inputs of a row: candidates with equal tokens are one class, and each ordered pair of classes that occurs is one
/// input.
struct RowPairs {
    std::array<int, candidates_per_row> class_of{-1, -1, -1};          ///< -1: no such candidate
    std::array<int, candidates_per_row * candidates_per_row> input_of; ///< by pair of classes; -1: not needed

    explicit RowPairs(const PairEncoder::Row& row)
    {
        input_of.fill(-1);
        for (std::size_t c = 0; c < candidates_per_row; ++c) {
            if (!row.candidates[c])
                continue;
            std::size_t same = 0;
            while (row.candidates[same] != row.candidates[c])
                ++same;
            class_of[c] = static_cast<int>(same);
        }
    }
    int& input(std::size_t left, std::size_t right)
    {
        return input_of[candidates_per_row * static_cast<std::size_t>(class_of[left]) +
                        static_cast<std::size_t>(class_of[right])];
    }
    bool exists(std::size_t c) const { return class_of[c] >= 0; }
};

class PairRmRanker final : public Ranker {
  public:
    explicit PairRmRanker(PairRmRankerParts parts)
        : parts_(std::move(parts)),
          encoder_(parts_.tokenizer, PairTokens::of(parts_.tokenizer, parts_.model.config(), parts_.directory),
                   parts_.limits, parts_.mode)
    {
    }

    std::string kind() const override { return "pairrm"; }
    std::string description() const override { return cat("pair ranker ", parts_.directory); }
    std::string digest() const override { return parts_.digest; }
    std::int64_t batch_rows() const override { return parts_.mode == PairRankMode::blender ? blender_batch_rows : 1; }
    std::int64_t computed_tokens() const override { return computed_; }

    double cost(const RankRow& row) const override
    {
        const auto tokens = [](const std::string& text) {
            return static_cast<std::int64_t>(static_cast<double>(text.size()) / bytes_per_token) + 3;
        };
        double sum = 0;
        for (std::size_t i = 0; i < candidates_per_row; ++i)
            for (std::size_t j = 0; j < candidates_per_row; ++j)
                if (i != j && row.answers[i] && row.answers[j])
                    sum +=
                        PairModel::cost(parts_.model.config(),
                                        std::min(tokens(row.prompt) + tokens(*row.answers[i]) + tokens(*row.answers[j]),
                                                 parts_.limits.total()));
        return sum;
    }

    std::vector<RowScores> score(std::span<const RankRow> rows) override
    {
        std::vector<PairEncoder::Texts> texts;
        for (const RankRow& row : rows) {
            texts.push_back({row.prompt, {}});
            for (std::size_t c = 0; c < candidates_per_row; ++c)
                if (row.answers[c])
                    texts.back().candidates[c] = *row.answers[c];
        }
        const std::vector<PairEncoder::Row> encoded = encoder_.encode(texts);
        std::vector<PairInput> inputs;
        std::vector<RowPairs> pairs;
        for (const PairEncoder::Row& row : encoded)
            pairs.push_back(add_pairs(row, inputs));
        for (const PairInput& input : inputs)
            computed_ += static_cast<std::int64_t>(input.ids.size());
        const std::vector<float> logits =
            inputs.empty() ? std::vector<float>{} : parts_.model.logits(inputs, parts_.tokens_per_batch);
        std::vector<RowScores> scores;
        for (std::size_t i = 0; i < rows.size(); ++i)
            scores.push_back(score_row(rows[i], pairs[i], logits));
        return scores;
    }

  private:
    RowPairs add_pairs(const PairEncoder::Row& row, std::vector<PairInput>& inputs) const
    {
        RowPairs pairs(row);
        for (std::size_t i = 0; i < candidates_per_row; ++i)
            for (std::size_t j = 0; j < candidates_per_row; ++j) {
                if (i == j || !pairs.exists(i) || !pairs.exists(j) || pairs.input(i, j) >= 0)
                    continue;
                pairs.input(i, j) = static_cast<int>(inputs.size());
                inputs.push_back(encoder_.pair(row.source, *row.candidates[i], *row.candidates[j]));
            }
        return pairs;
    }

    RowScores score_row(const RankRow& row, RowPairs pairs, const std::vector<float>& logits) const
    {
        PairLogits of_row;
        std::array<bool, candidates_per_row> exists{};
        for (std::size_t i = 0; i < candidates_per_row; ++i) {
            exists[i] = pairs.exists(i);
            for (std::size_t j = 0; j < candidates_per_row; ++j) {
                float& logit = of_row[candidates_per_row * i + j];
                if (!pairs.exists(i) || !pairs.exists(j)) {
                    logit = std::numeric_limits<float>::quiet_NaN();
                    continue;
                }
                logit = i == j ? 0.0F : logits[static_cast<std::size_t>(pairs.input(i, j))];
                SELM_VALIDATE(std::isfinite(logit), ExitCode::bad_data,
                              parts_.directory << " gives a non-finite logit for row " << row.row
                                               << " (its weights are damaged, or overflow). "
                                                  "Check the model");
            }
        }
        return {pair_scores(of_row, exists), of_row};
    }

    PairRmRankerParts parts_;
    PairEncoder encoder_;
    std::int64_t computed_ = 0;
};

} // namespace

std::unique_ptr<Ranker> make_pairrm_ranker(PairRmRankerParts parts)
{
    return std::make_unique<PairRmRanker>(std::move(parts));
}

} // namespace selm
