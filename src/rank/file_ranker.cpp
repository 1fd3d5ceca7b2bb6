#include "selm/rank/file_ranker.hpp"

#include <cmath>
#include <fstream>
#include <limits>
#include <map>
#include <unordered_map>

#include <nlohmann/json.hpp>

#include "selm/base/error.hpp"
#include "selm/base/hash.hpp"

namespace selm {
namespace {

using Scores = std::array<double, candidates_per_row>;
constexpr std::size_t longest_line = std::size_t{1} << 20;

class FileRanker final : public Ranker {
  public:
    explicit FileRanker(const std::string& path) : path_(path), digest_(hash_file(path))
    {
        std::ifstream in(path);
        SELM_VALIDATE(in.good(), ExitCode::bad_data, path << " cannot be read (it holds the scores). Pass --ranker file:PATH");
        std::int64_t number = 0;
        for (std::string line; std::getline(in, line);) {
            ++number;
            if (line.find_first_not_of(" \t\r") != std::string::npos)
                add(line, cat(path, " line ", number));
        }
        SELM_VALIDATE(!by_id_.empty() || !by_row_.empty(), ExitCode::bad_data, path << " holds no scores (nothing can be ranked)");
    }

    std::string kind() const override { return "file"; }
    std::string description() const override { return cat("scores of ", path_); }
    std::string digest() const override { return digest_; }
    double cost(const RankRow&) const override { return 1; }

    std::vector<RowScores> score(std::span<const RankRow> rows) override
    {
        std::vector<RowScores> out;
        for (const RankRow& row : rows)
            out.push_back(look_up(row));
        return out;
    }

  private:
    static constexpr double missing = std::numeric_limits<double>::quiet_NaN();

    void add(const std::string& line, const std::string& where)
    {
        SELM_VALIDATE(line.size() <= longest_line, ExitCode::bad_data, where << " is longer than 1 MiB (it is no line of scores). Check the file");
        // Scores are a flat object: anything nested deeper than its array is malformed, and would only burden the parser.
        const auto json = nlohmann::json::parse(
            line, [](int depth, nlohmann::json::parse_event_t, nlohmann::json&) { return depth <= 2; }, false);
        SELM_VALIDATE(json.is_object(), ExitCode::bad_data, where << " is not a JSON object. Expected {\"prompt_id\": ..., \"scores\": [g, c, r]}");
        const auto scores = json.find("scores");
        SELM_VALIDATE(scores != json.end() && scores->is_array() && scores->size() == candidates_per_row, ExitCode::bad_data,
                      where << ": \"scores\" is not a list of three (generated, chosen, rejected)");
        Scores values{};
        for (std::size_t c = 0; c < candidates_per_row; ++c) {
            const auto& value = (*scores)[c];
            SELM_VALIDATE(value.is_number() || value.is_null(), ExitCode::bad_data,
                          where << ": score " << c << " is no number (null where there is no such answer)");
            values[c] = value.is_null() ? missing : value.get<double>();
            SELM_VALIDATE(value.is_null() || std::isfinite(values[c]), ExitCode::bad_data, where << ": score " << c << " is not finite");
        }
        if (const auto row = json.find("row"); row != json.end()) {
            SELM_VALIDATE(row->is_number_integer(), ExitCode::bad_data, where << ": \"row\" is no whole number");
            insert(by_row_, row->get<std::int64_t>(), values, where);
            return;
        }
        const auto id = json.find("prompt_id");
        SELM_VALIDATE(id != json.end() && id->is_string(), ExitCode::bad_data, where << ": \"prompt_id\" is missing");
        insert(by_id_, id->get<std::string>(), values, where);
    }

    template<typename Map, typename Key>
    static void insert(Map& map, const Key& key, const Scores& values, const std::string& where)
    {
        const auto [place, fresh] = map.emplace(key, values);
        if (fresh)
            return;
        for (std::size_t c = 0; c < candidates_per_row; ++c)
            SELM_VALIDATE(place->second[c] == values[c] || (std::isnan(place->second[c]) && std::isnan(values[c])), ExitCode::bad_data,
                          where << ": a second, different entry for " << key << " (which one holds is unknown). Name rows by \"row\"");
    }

    RowScores look_up(const RankRow& row) const
    {
        const Scores* found = nullptr;
        if (const auto by_row = by_row_.find(row.row); by_row != by_row_.end())
            found = &by_row->second;
        else if (const auto by_id = by_id_.find(row.id); by_id != by_id_.end())
            found = &by_id->second;
        SELM_VALIDATE(found, ExitCode::bad_data,
                      path_ << " has no scores for row " << row.row << " (prompt_id " << row.id << "). Every row needs a line");
        RowScores scores;
        for (std::size_t c = 0; c < candidates_per_row; ++c) {
            SELM_VALIDATE(!row.answers[c] || !std::isnan((*found)[c]), ExitCode::bad_data,
                          path_ << ": row " << row.row << " (prompt_id " << row.id << ") has an answer " << c
                                << " but its score is null. Give a number");
            scores.scores[c] = row.answers[c] ? (*found)[c] : missing;
        }
        return scores;
    }

    std::string path_, digest_;
    std::unordered_map<std::string, Scores> by_id_;
    std::map<std::int64_t, Scores> by_row_;
};

} // namespace

std::unique_ptr<Ranker> make_file_ranker(const std::string& path)
{
    return std::make_unique<FileRanker>(path);
}

} // namespace selm
