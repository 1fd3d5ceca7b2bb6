#include "selm/rank/ranker.hpp"

#include <cmath>

#include "selm/base/error.hpp"

namespace selm {

std::vector<std::array<double, candidates_per_row>>
aggregate_scores(const std::vector<std::vector<std::array<double, candidates_per_row>>>& scores)
{
    SELM_EXPECT(!scores.empty());
    if (scores.size() == 1)
        return scores.front();
    const std::size_t rows = scores.front().size();
    std::vector<std::array<double, candidates_per_row>> mean(rows);
    for (const auto& of_ranker : scores) {
        SELM_EXPECT(of_ranker.size() == rows);
        double sum = 0, squares = 0;
        std::int64_t count = 0;
        for (const auto& row : of_ranker)
            for (const double score : row)
                if (!std::isnan(score)) {
                    sum += score;
                    ++count;
                }
        const double centre = count > 0 ? sum / static_cast<double>(count) : 0;
        for (const auto& row : of_ranker)
            for (const double score : row)
                if (!std::isnan(score))
                    squares += (score - centre) * (score - centre);
        const double deviation = count > 0 ? std::sqrt(squares / static_cast<double>(count)) : 0;
        for (std::size_t i = 0; i < rows; ++i)
            for (std::size_t c = 0; c < candidates_per_row; ++c) {
                const double score = of_ranker[i][c];
                // A NaN (no such candidate) stays NaN; rankers agree on which candidates exist.
                const double standard = std::isnan(score) ? score : deviation > 0 ? (score - centre) / deviation : 0.0;
                mean[i][c] += standard / static_cast<double>(scores.size());
            }
    }
    return mean;
}

RankerSpec RankerSpec::parse(const std::string& word)
{
    const auto colon = word.find(':');
    SELM_VALIDATE(colon != std::string::npos && colon + 1 < word.size(), ExitCode::usage,
                  "--ranker " << word << " is not KIND:PATH. Use pairrm:DIR, reward:DIR or file:F.jsonl");
    RankerSpec spec{word.substr(0, colon), word.substr(colon + 1)};
    SELM_VALIDATE(spec.kind == "pairrm" || spec.kind == "reward" || spec.kind == "file", ExitCode::usage,
                  "--ranker " << word << ": unknown kind '" << spec.kind << "'. Use pairrm:DIR, reward:DIR or file:F.jsonl");
    return spec;
}

std::vector<std::string> ranker_names(std::span<const RankerSpec> specs)
{
    std::vector<std::string> names;
    for (std::size_t i = 0; i < specs.size(); ++i) {
        int earlier = 0;
        for (std::size_t j = 0; j < i; ++j)
            earlier += specs[j].kind == specs[i].kind;
        names.push_back(earlier == 0 ? specs[i].kind : cat(specs[i].kind, '_', earlier + 1));
    }
    return names;
}

} // namespace selm
