// The rules of docs/FORMATS.md, checked one after the other; the readers' constructors have checked offsets and counts.

#include <cmath>
#include <set>

#include "selm/algo/selection.hpp"
#include "selm/base/error.hpp"
#include "selm/data/iteration.hpp"
#include "selm/data/preferences.hpp"
#include "selm/phases/inspect.hpp"
#include "selm/text/utf8.hpp"

namespace selm {

namespace {

class Verifier {
  public:
    explicit Verifier(std::string path) : path_(std::move(path)) {}

    void preferences() const
    {
        const PreferencesReader reader(path_);
        std::int64_t last_source = -1;
        for (std::int64_t i = 0; i < reader.rows(); ++i) {
            const PreferenceRow row = reader.row(i);
            check_row(i, row);
            if (row.row_source <= last_source)
                complain(i, cat("/prompts/row_source is ", row.row_source, " after ", last_source, " (lines of the source rise)"));
            last_source = row.row_source;
        }
    }

    void iteration() const
    {
        const IterationReader reader(path_);
        std::set<std::int64_t> keys;
        for (std::int64_t i = 0; i < reader.rows(); ++i) {
            const IterationRow row = reader.row(i);
            check_row(i, row);
            check_generated(i, row.generated);
            if (row.row < 0 || !keys.insert(row.row).second)
                complain(i, cat("/prompts/row is ", row.row, ", negative or there twice (it is the key of a row)"));
        }
        if (reader.has_pairs() != reader.has_ranking())
            complain("it has only one of /ranking and /pairs (they are written together)");
        if (reader.has_pairs())
            check_ranking(reader);
        for (const std::string& name : reader.logprob_names())
            check_logprobs(reader, name);
    }

  private:
    [[noreturn]] void complain(const std::string& problem) const
    {
        throw data_error(cat(path_, ": ", problem, ". Make the file anew"));
    }

    [[noreturn]] void complain(std::int64_t row, const std::string& problem) const
    {
        throw data_error(cat(path_, " row ", row, ": ", problem, ". Make the file anew"));
    }

    void check_text(std::int64_t row, const char* what, const std::string& text) const
    {
        if (const auto at = find_invalid_utf8(text))
            complain(row, cat(what, " is not valid UTF-8 at byte ", *at));
    }

    void check_score(std::int64_t row, const std::string& what, double score) const
    {
        if (std::isinf(score))
            complain(row, cat(what, " is infinite"));
    }

    void check_row(std::int64_t i, const PreferenceRow& row) const
    {
        check_text(i, "/prompts/text", row.prompt);
        check_text(i, "/prompts/id", row.id);
        check_text(i, "/responses/chosen/text", row.chosen);
        check_text(i, "/responses/rejected/text", row.rejected);
        check_score(i, "/scores of the chosen answer", row.score_chosen);
        check_score(i, "/scores of the rejected answer", row.score_rejected);
        const std::size_t first = !row.messages.empty() && row.messages.front().role == Role::system ? 1 : 0;
        if (row.messages.size() == first)
            complain(i, "its conversation has no message of the user");
        for (std::size_t m = 0; m < row.messages.size(); ++m) {
            check_text(i, "/prompts/messages/text", row.messages[m].content);
            if (m >= first && row.messages[m].role != ((m - first) % 2 == 0 ? Role::user : Role::assistant))
                complain(i, "its conversation is not an optional system message and then user and assistant in turn");
        }
        if (row.messages.back().role != Role::user)
            complain(i, "its conversation does not end with the user");
    }

    void check_generated(std::int64_t i, const GeneratedAnswer& answer) const
    {
        check_text(i, "/responses/generated/text", answer.text);
        const bool sampled = answer.finish_reason == FinishReason::stop || answer.finish_reason == FinishReason::length;
        if (sampled == answer.tokens.empty())
            complain(i, cat("it has ", answer.tokens.size(), " generated tokens with finish_reason ",
                            static_cast<int>(answer.finish_reason), " (sampled answers have tokens, others none)"));
        if (answer.finish_reason == FinishReason::none && !answer.text.empty())
            complain(i, "it has the text of a generated answer with finish_reason 3 (none)");
        for (const std::int32_t token : answer.tokens)
            if (token < 0)
                complain(i, cat("/responses/generated/tokens holds ", token));
        for (const float logprob : answer.logprobs)
            if (!std::isfinite(logprob) || logprob > 1e-3F) // rounding may leave a log-prob of certainty slightly above 0
                complain(i, cat("/responses/generated/logprobs holds ", logprob, " (log-probs are finite and not above 0)"));
    }

    /// Which candidates a ranker scored: NaN marks a generated answer that does not exist, or a column that nobody scored.
    void check_scores(const IterationReader& reader, const std::string& what, const std::vector<std::array<double, 3>>& scores) const
    {
        for (std::size_t c = 0; c < candidates_per_row; ++c) {
            bool any = false;
            for (const auto& row : scores)
                any = any || !std::isnan(row[c]);
            for (std::size_t i = 0; i < scores.size(); ++i) {
                const auto row = static_cast<std::int64_t>(i);
                const bool exists = c != 0 || reader.has_generated(row);
                check_score(row, what, scores[i][c]);
                if (!exists && !std::isnan(scores[i][c]))
                    complain(row, cat(what, " has a score of a generated answer that does not exist"));
                if (exists && any && std::isnan(scores[i][c]))
                    complain(row, cat(what, " has no score of candidate ", c, ", which other rows have"));
            }
        }
    }

    void check_ranking(const IterationReader& reader) const
    {
        const auto scores = reader.ranking_scores();
        const auto ranks = reader.ranking_ranks();
        check_scores(reader, "/ranking/scores", scores);
        for (const std::string& name : reader.rankers())
            check_scores(reader, "/ranking/rankers/" + name + "/scores", reader.ranker_scores(name));
        for (std::size_t i = 0; i < scores.size(); ++i)
            if (ranks[i] != ranks_of(scores[i]))
                complain(static_cast<std::int64_t>(i), "/ranking/ranks does not follow from /ranking/scores");
        const auto pairs = reader.pairs();
        if (pairs.update_rule == "none") // held-out answers are scored, not paired
            return;
        UpdateRule rule{};
        try {
            rule = parse_update_rule(pairs.update_rule);
        } catch (const Error&) {
            complain(cat("/pairs has the unknown update rule \"", pairs.update_rule, "\""));
        }
        for (std::size_t i = 0; i < scores.size(); ++i) {
            const PairChoice expected = choose_pair(scores[i], rule);
            if (pairs.best[i] != expected.best || pairs.worst[i] != expected.worst)
                complain(static_cast<std::int64_t>(i), cat("/pairs has (", pairs.best[i], ", ", pairs.worst[i], ") where the rule ",
                         pairs.update_rule, " gives (", expected.best, ", ", expected.worst, ")"));
        }
    }

    void check_logprobs(const IterationReader& reader, const std::string& name) const
    {
        const std::string group = "/logprobs/" + name;
        const auto found = reader.logprobs(name);
        if (!reader.has_pairs())
            complain(group + " is there without /pairs (it says which answers are scored)");
        if (found.attributes.pairs_digest != reader.pairs_digest())
            complain(group + " was computed of other pairs or answers (run selm_logp again)");
        const auto pairs = reader.pairs();
        for (std::size_t i = 0; i < found.sum.size(); ++i) {
            const auto row = static_cast<std::int64_t>(i);
            for (std::int32_t c = 0; c < candidates_per_row; ++c) {
                const double sum = found.sum[i][static_cast<std::size_t>(c)];
                const std::int32_t tokens = found.tokens[i][static_cast<std::size_t>(c)];
                const bool exists = c != 0 || reader.has_generated(row);
                const bool scored = exists && (c == 0 || c == pairs.best[i] || c == pairs.worst[i]);
                if (scored && (!std::isfinite(sum) || sum > 1e-3 || tokens < 1))
                    complain(row, cat(group, " has sum ", sum, " over ", tokens, " tokens for candidate ", c,
                                      " (a scored answer has a finite sum, not above 0, over at least one token)"));
                if (!scored && (!std::isnan(sum) || tokens != 0))
                    complain(row, cat(group, " has a log-prob of candidate ", c, ", which is not part of the pair (NaN and 0 tokens are expected)"));
            }
        }
    }

    std::string path_;
};

} // namespace

void verify_file(const std::string& path)
{
    const std::string format = format_of(path);
    const Verifier verifier(path);
    if (format == preferences_format)
        verifier.preferences();
    else if (format == iteration_format)
        verifier.iteration();
    else
        throw data_error(cat(path, " is ", format.empty() ? "not a file that SELM wrote" : cat("a ", format, " file"),
                             " (only ", preferences_format, " and ", iteration_format, " files can be verified). Give one of those"));
}

} // namespace selm
