#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "selm/data/attributes.hpp"
#include "selm/data/preferences.hpp"

namespace selm {

/// Why a generated answer ended; the values are those stored in /responses/generated/finish_reason.
enum class FinishReason : std::uint8_t {
    stop = 0,      ///< end token
    length = 1,    ///< token limit
    elsewhere = 2, ///< made elsewhere: text only, no tokens
    none = 3       ///< there is no generated answer
};

struct GeneratedAnswer {
    std::int64_t row = 0;             ///< key: index in prefs.h5
    std::string text;                 ///< decoded without special tokens, stripped (elsewhere: as given)
    std::vector<std::int32_t> tokens; ///< sampled ids, end token included
    std::vector<float> logprobs;      ///< of those ids, unscaled logits; as many as tokens
    FinishReason finish_reason = FinishReason::none;
};

/// Per-rank figures of a phase for /timing/<phase>.
struct RankTiming {
    std::int64_t rows = 0; ///< rows this rank did in this attempt
    double busy_s = 0, idle_s = 0;
};

/// Root attributes of a selm-iteration file besides FileAttributes.
struct IterationAttributes {
    FileAttributes file;
    std::int64_t iteration = 1, portion = 1, portions = 1; ///< 1-based
    std::string policy;        ///< directory of the policy, as given ("" when none generated)
    std::string policy_digest;
    h5::Attributes provenance; ///< stored on /provenance/generation: engine, dtype, device, ... (not read back)
};

/**
 * @brief Writes a selm-iteration file from rows of prefs.h5 and the answers, which may lie on any rank in any order: they
 * are sent to the rank that writes their block. As a whole or not at all. Collective.
 *
 * @param rows indices into @p prefs in file order, the same on every rank; position i of the file is rows[i].
 * @param answers exactly one per row over all ranks (finish_reason none where a row has no answer).
 * @throws Error internal: a row without or with two answers, tokens and logprobs of different length; io: disk full.
 */
void write_iteration(const std::string& path, const PreferencesReader& prefs, const std::vector<std::int64_t>& rows,
                     const std::vector<GeneratedAnswer>& answers, const IterationAttributes& attributes,
                     const RankTiming& timing, Communicator& comm);

/// One row of a selm-iteration file.
struct IterationRow : PreferenceRow {
    GeneratedAnswer generated;
};

/// Ranks and scores of one row; candidate order generated, chosen, rejected.
struct RankedRow {
    std::int64_t position = 0; ///< index in the iteration file
    std::array<double, 3> scores{};      ///< aggregate (one ranker: its raw scores); NaN: no such candidate
    std::array<std::int32_t, 3> ranks{}; ///< 1 = best, ties share the better rank; 0: no such candidate
    std::int32_t best = 0, worst = 0;    ///< candidate indices of the pair
    struct OfRanker {
        std::array<double, 3> scores{};
        std::array<float, 9> logits{}; ///< [left, right] of pairwise rankers, row-major; ignored for others
    };
    std::vector<OfRanker> rankers; ///< in the order of RankingInfo::rankers
};

struct RankingInfo {
    struct Ranker {
        std::string name;      ///< pairrm, reward, file; a second one reward_2
        bool pairwise = false; ///< has logits
        h5::Attributes attributes; ///< stored on /ranking/rankers/<name>: model, digest, ...
    };
    std::vector<Ranker> rankers; ///< may be empty (offline)
    std::string update_rule;     ///< best-worst | replace | offline
    h5::Attributes attributes;   ///< stored on /ranking: rank_mode, config, config_hash, ...
};

/// Log-probs of one row; candidate order generated, chosen, rejected.
struct RowLogProbSums {
    std::int64_t position = 0;          ///< index in the iteration file
    std::array<double, 3> sum{};        ///< over scored tokens; NaN for candidates that are not scored
    std::array<std::int32_t, 3> tokens{}; ///< scored tokens; 0 where sum is NaN
};

/// Attributes of /logprobs/<name>: what selm_train compares before it uses them.
struct LogProbAttributes {
    std::string model, digest, engine, encoding, chat_format, dtype, pairs_digest;
    std::int64_t max_length = 0, max_prompt_length = 0;
    h5::Attributes extra;
};

/**
 * @brief Adds groups to an iteration file: copies it, without the groups in @p replace, to a partial file, runs @p write_groups
 * on it, and puts it in the place of the old file once it is whole. The old file stays as it is on any error. Collective; the
 * rules of h5::write_and_publish hold for @p write_groups.
 * @param replace group paths that write_groups makes anew ("/ranking"); they need not exist.
 */
void update_iteration(const std::string& path, Communicator& comm, const std::vector<std::string>& replace,
                      const std::function<void(h5::File&)>& write_groups);

/// For use in update_iteration. Each row of the file comes from exactly one rank (any rank, any order). Collective.
/// Ranking writes /ranking and /pairs (replace both). @throws Error internal: rows missing, doubled or out of range.
void write_ranking(h5::File& file, std::int64_t rows, const std::vector<RankedRow>& mine, const RankingInfo& info,
                   Communicator& comm);
/// Writes /logprobs/<name>.
void write_logprobs(h5::File& file, const std::string& name, std::int64_t rows, const std::vector<RowLogProbSums>& mine,
                    const LogProbAttributes& attributes, Communicator& comm);
/// Writes /timing/<phase>/{rows,busy_s,idle_s} [ranks]; outside the digest. Replace "/timing/<phase>".
void write_timing(h5::File& file, const std::string& phase, const RankTiming& mine, Communicator& comm);
/// Writes /provenance/<phase> with the attributes @p what plus host names [ranks], software and build; outside the digest.
/// Replace "/provenance/<phase>".
void write_provenance(h5::File& file, const std::string& phase, const h5::Attributes& what, Communicator& comm);

/**
 * @brief Reads a selm-iteration file; any rank alone. Texts and tokens are read on demand.
 * @throws Error bad_data: not such a file, another version, datasets missing or inconsistent.
 */
class IterationReader {
  public:
    explicit IterationReader(const std::string& path);
    ~IterationReader();
    IterationReader(IterationReader&&) noexcept;
    IterationReader& operator=(IterationReader&&) noexcept;

    const std::string& path() const noexcept;
    std::int64_t rows() const noexcept;
    IterationRow row(std::int64_t position) const;
    std::int64_t row_key(std::int64_t position) const;  ///< index in prefs.h5
    std::string id(std::int64_t position) const;
    std::vector<std::string> ids() const;
    std::string prompt(std::int64_t position) const;
    std::vector<Message> messages(std::int64_t position) const;
    std::string answer(std::int64_t position, Candidate candidate) const; ///< "" for a generated answer that does not exist
    std::vector<std::int32_t> tokens(std::int64_t position) const;        ///< of the generated answer
    std::vector<float> token_logprobs(std::int64_t position) const;
    FinishReason finish_reason(std::int64_t position) const;
    bool has_generated(std::int64_t position) const { return finish_reason(position) != FinishReason::none; }
    std::int64_t message_bytes(std::int64_t position) const;                  ///< without reading text
    std::int64_t answer_bytes(std::int64_t position, Candidate candidate) const;
    std::int64_t token_count(std::int64_t position) const;

    bool has_ranking() const;
    std::vector<std::array<double, 3>> ranking_scores() const;      ///< [N]; @throws Error bad_data: not ranked
    std::vector<std::array<std::int32_t, 3>> ranking_ranks() const; ///< [N]
    std::vector<std::string> rankers() const;                       ///< names
    std::vector<std::array<double, 3>> ranker_scores(const std::string& name) const;

    bool has_pairs() const;
    struct Pairs {
        std::vector<std::int32_t> best, worst; ///< [N] candidate indices
        std::string update_rule;
    };
    Pairs pairs() const; ///< @throws Error bad_data: no pairs yet (run selm_rank)
    /// Digest over the pairs, the conversations and the answers: binds log-probs to what they were computed of.
    std::string pairs_digest() const;

    bool has_logprobs(const std::string& name) const;
    std::vector<std::string> logprob_names() const;
    struct LogProbs {
        std::vector<std::array<double, 3>> sum;
        std::vector<std::array<std::int32_t, 3>> tokens;
        LogProbAttributes attributes;
    };
    LogProbs logprobs(const std::string& name) const; ///< @throws Error bad_data: none of that name

    IterationAttributes attributes() const;
    std::string digest() const { return data_digest(file()); }
    const h5::File& file() const noexcept;

  private:
    struct Columns;
    std::unique_ptr<Columns> columns_;
};

} // namespace selm
