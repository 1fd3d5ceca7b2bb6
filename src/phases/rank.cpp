#include "selm/phases/rank.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "selm/algo/selection.hpp"
#include "selm/base/error.hpp"
#include "selm/base/hash.hpp"
#include "selm/base/log.hpp"
#include "selm/base/scope_end.hpp"
#include "selm/comm/agree.hpp"
#include "selm/comm/claim.hpp"
#include "selm/comm/stop_condition.hpp"
#include "selm/data/iteration.hpp"
#include "selm/data/journal.hpp"
#include "selm/data/work_queue.hpp"
#include "selm/phases/shared_model.hpp"
#include "selm/rank/file_ranker.hpp"
#include "selm/rank/pairrm_ranker.hpp"
#include "selm/rank/ranker.hpp"
#include "selm/rank/reward_ranker.hpp"
#include "shared_pair_model.hpp"

namespace selm {
namespace {

using Scores = std::array<double, candidates_per_row>;
constexpr double no_candidate = std::numeric_limits<double>::quiet_NaN();
constexpr std::int64_t most_rows_at_a_time = 4;
/// Text that keeps the matrix kernels busy (some 500 tokens): a ranker sees rows up to here, not more, so that ranks end together.
constexpr std::int64_t enough_bytes = 2048;
constexpr const char* rule_of_held_out = "none";

double seconds_since(std::chrono::steady_clock::time_point start)
{
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// A ranker with what it borrows.
struct LoadedRanker {
    RankerSpec spec;
    std::string name;
    std::unique_ptr<SharedModel> model;
    std::unique_ptr<SharedPairModel> pair_model;
    std::unique_ptr<Tokenizer> tokenizer;
    std::unique_ptr<Ranker> ranker;
    std::string identity; ///< digest and what else decides its scores
    bool pairwise() const { return pair_model != nullptr; }
};

/// Scores of one row as they are journalled and exchanged between ranks.
struct ScoredRow {
    std::int64_t position = 0;
    Scores scores{};
    std::array<float, 9> logits{};
};

void warn_of_variance(const Engine& engine)
{
    if (!engine.row_invariant())
        SELM_LOG(warning, "engine " << engine.name() << " is not row-invariant here: scores may differ in the last bits with the number of ranks");
}

void load_pair_ranker(LoadedRanker& loaded, const RankOptions& options, Communicator& comm)
{
    const std::string& directory = loaded.spec.path;
    loaded.pair_model = SharedPairModel::from_directory(directory, options.common, options.pairrm_dtype, comm);
    agree(comm, "pair ranker", [&] {
        const PairLimits limits = PairLimits::from_directory(directory);
        loaded.ranker = make_pairrm_ranker({.model = loaded.pair_model->model(), .tokenizer = loaded.pair_model->tokenizer(),
                                            .limits = limits, .mode = parse_pair_rank_mode(options.rank_mode),
                                            .tokens_per_batch = options.tokens_per_microbatch, .directory = directory,
                                            .digest = loaded.pair_model->digest()});
        loaded.identity = cat(loaded.pair_model->digest(), ' ', loaded.pair_model->engine_key(), ' ', options.rank_mode, ' ', limits.source, ' ',
                              limits.candidate);
    });
    warn_of_variance(loaded.pair_model->engine());
}

LoadedRanker load_ranker(const RankerSpec& spec, const std::string& name, const RankOptions& options, Communicator& comm)
{
    LoadedRanker loaded{spec, name, nullptr, nullptr, nullptr, nullptr, {}};
    if (spec.kind == "file") {
        agree(comm, "scores file", [&] { loaded.ranker = make_file_ranker(spec.path); });
        loaded.identity = loaded.ranker->digest();
        return loaded;
    }
    if (spec.kind == "pairrm") {
        load_pair_ranker(loaded, options, comm);
        return loaded;
    }
    loaded.model = SharedModel::from_directory(spec.path, options.common, comm);
    agree(comm, "reward model", [&] {
        loaded.tokenizer = std::make_unique<Tokenizer>(Tokenizer::from_directory(spec.path));
        check_vocabulary(spec.path, loaded.tokenizer->vocabulary_size(), loaded.model->config().vocabulary);
        const ChatFormat format = ChatFormat::recognise(spec.path, *loaded.tokenizer);
        const EncodingLimits limits{options.encoding.max_length, options.encoding.max_prompt_length};
        limits.validate();
        SELM_VALIDATE(limits.max_length <= loaded.model->config().max_positions, ExitCode::configuration,
                      "--max-length " << limits.max_length << " is beyond the context of " << spec.path << " ("
                                      << loaded.model->config().context() << "). Lower it");
        loaded.ranker = make_reward_ranker({.decoder = loaded.model->decoder(), .weights = loaded.model->weights(),
                                            .tokenizer = *loaded.tokenizer, .format = format, .limits = limits,
                                            .tokens_per_microbatch = options.tokens_per_microbatch, .directory = spec.path,
                                            .digest = loaded.model->digest()});
        loaded.identity = cat(loaded.model->digest(), ' ', loaded.model->engine_key(), ' ', format.name(), ' ', limits.max_length, ' ',
                              limits.max_prompt_length);
    });
    warn_of_variance(loaded.model->engine());
    return loaded;
}

RankRow read_row(const IterationReader& file, std::int64_t position, bool generated_only)
{
    IterationRow row = file.row(position);
    RankRow out{row.row, std::move(row.id), std::move(row.prompt), std::move(row.messages), {}};
    if (row.generated.finish_reason != FinishReason::none)
        out.answers[0] = std::move(row.generated.text);
    if (!generated_only) {
        out.answers[1] = std::move(row.chosen);
        out.answers[2] = std::move(row.rejected);
    }
    return out;
}

struct HandOut {
    std::vector<std::int64_t> blocks;
    std::int64_t at_a_time = 1; ///< blocks that a ranker sees together
};

/// Blocks of `block` rows in file order that have a row to score, those with most text first, so that the last ones handed
/// out are short.
HandOut hand_out(const IterationReader& file, const Journal& journal, std::int64_t block)
{
    std::vector<std::int64_t> bytes(static_cast<std::size_t>((file.rows() + block - 1) / block));
    std::vector<bool> open(bytes.size());
    for (std::int64_t i = 0; i < file.rows(); ++i) {
        const auto b = static_cast<std::size_t>(i / block);
        open[b] = open[b] || !journal.is_done(i);
        bytes[b] += file.message_bytes(i) + file.answer_bytes(i, Candidate::generated) + file.answer_bytes(i, Candidate::chosen) +
                    file.answer_bytes(i, Candidate::rejected);
    }
    HandOut out;
    std::int64_t total = 1;
    for (std::size_t b = 0; b < open.size(); ++b)
        if (open[b]) {
            out.blocks.push_back(static_cast<std::int64_t>(b));
            total += bytes[b];
        }
    std::stable_sort(out.blocks.begin(), out.blocks.end(), [&](std::int64_t a, std::int64_t b) {
        return bytes[static_cast<std::size_t>(a)] > bytes[static_cast<std::size_t>(b)];
    });
    const auto count = static_cast<std::int64_t>(out.blocks.size());
    out.at_a_time = block > 1 ? 1 : std::clamp<std::int64_t>(enough_bytes * count / total, 1, most_rows_at_a_time);
    return out;
}

std::string journal_of(const RankOptions& options, const std::string& ranker)
{
    return cat(options.iter, ".rank-", ranker);
}

/// All rows' scores by one ranker, on every rank in file order; empty when a stop was requested. Collective.
class RankerPass {
  public:
    RankerPass(const RankOptions& options, const IterationReader& file, const std::string& input_digest, LoadedRanker& loaded,
               StopCondition& stop, Communicator& comm)
        : options_(options), file_(file), loaded_(loaded), stop_(stop), comm_(comm), block_(loaded.ranker->batch_rows()),
          journal_(journal_of(options, loaded.name),
                   {{"ranker", loaded.identity}, {"rows", input_digest}, {"candidates", options.generated_only ? "generated" : "all"}}, comm)
    {
    }

    std::vector<ScoredRow> run(RankTiming& timing)
    {
        for (const Journal::Record& record : journal_.recovered())
            mine_.push_back(decode(record));
        const auto start = std::chrono::steady_clock::now();
        const HandOut order = hand_out(file_, journal_, block_);
        WorkQueue queue(comm_, order.blocks, {.tag = 1, .initial_per_rank = 1, .prefetch = order.at_a_time});
        run_queue(comm_, queue, "ranking rows",
                  [&](WorkQueue& work) { score_rows(work, static_cast<std::size_t>(order.at_a_time), start); });
        journal_.sync();
        timing.rows += scored_;
        timing.idle_s += queue.idle_s();
        timing.busy_s += seconds_since(start) - queue.idle_s();
        if (all_reduce_value(comm_, std::int64_t{queue.stopped() ? 1 : 0}, ReduceOp::max, "was ranking stopped") != 0)
            return {};
        return gather();
    }

    void remove_journal() { journal_.remove(); }

  private:
    void score_rows(WorkQueue& work, std::size_t at_a_time, std::chrono::steady_clock::time_point start)
    {
        double next_line_s = 10;
        set_between_layers([&work] { work.poll(); });
        const ScopeEnd no_more([this] { set_between_layers({}); });
        for (bool finished = false; !finished;) {
            std::vector<std::int64_t> blocks;
            while (blocks.size() < at_a_time) {
                const WorkQueue::Next next = work.try_next();
                finished = next.state == WorkQueue::State::finished;
                if (next.state != WorkQueue::State::item)
                    break;
                blocks.push_back(next.item);
            }
            if (blocks.empty() && !finished) {
                const auto one = work.next();
                finished = !one;
                if (one)
                    blocks.push_back(*one);
            }
            score(blocks);
            if (stop_.here())
                work.stop();
            if (comm_.is_root() && options_.common.progress != "off" && seconds_since(start) > next_line_s) {
                SELM_LOG(info, "ranking with " << loaded_.name << ": " << scored_ << " rows on rank 0 of " << file_.rows() << " in all, "
                                               << static_cast<std::int64_t>(seconds_since(start)) << " s");
                next_line_s += 10;
            }
        }
    }

    void set_between_layers(const std::function<void()>& work)
    {
        if (loaded_.model)
            loaded_.model->set_between_layers(work);
        if (loaded_.pair_model)
            loaded_.pair_model->model().set_between_layers(work);
    }

    /// One block, or several of one row each: what the ranker may see together.
    void score(const std::vector<std::int64_t>& blocks)
    {
        std::vector<std::int64_t> positions;
        std::vector<RankRow> rows;
        // A pairwise ranker compares the generated answer with the others even where it alone gets a score.
        const bool generated_alone = options_.generated_only && !loaded_.pairwise();
        for (const std::int64_t block : blocks)
            for (std::int64_t i = block * block_; i < std::min((block + 1) * block_, file_.rows()); ++i) {
                positions.push_back(i);
                rows.push_back(read_row(file_, i, generated_alone));
            }
        const std::vector<RowScores> scores = loaded_.ranker->score(rows);
        for (std::size_t i = 0; i < rows.size(); ++i) {
            if (journal_.is_done(positions[i])) // of a block that an earlier run left unfinished
                continue;
            ScoredRow row{positions[i], scores[i].scores, scores[i].logits.value_or(std::array<float, 9>{})};
            if (options_.generated_only)
                row.scores[1] = row.scores[2] = no_candidate;
            journal_.append(row.position, std::as_bytes(std::span<const ScoredRow>(&row, 1)));
            mine_.push_back(row);
            ++scored_;
        }
    }

    static ScoredRow decode(const Journal::Record& record)
    {
        ScoredRow row;
        SELM_VALIDATE(record.payload.size() == sizeof row, ExitCode::bad_data,
                      "a journal record of row " << record.row << " has the wrong size (another version wrote it). Remove the journal");
        std::memcpy(&row, record.payload.data(), sizeof row);
        return row;
    }

    std::vector<ScoredRow> gather()
    {
        std::vector<ScoredRow> all(static_cast<std::size_t>(file_.rows()));
        const auto parts = comm_.all_gather_ragged(std::as_bytes(std::span<const ScoredRow>(mine_)), "scores of all rows");
        std::size_t count = 0;
        for (const auto& part : parts) {
            std::vector<ScoredRow> rows(part.size() / sizeof(ScoredRow));
            if (!part.empty())
                std::memcpy(rows.data(), part.data(), part.size());
            for (const ScoredRow& row : rows)
                all[static_cast<std::size_t>(row.position)] = row;
            count += rows.size();
        }
        SELM_ENSURE(count == all.size());
        return all;
    }

    const RankOptions& options_;
    const IterationReader& file_;
    LoadedRanker& loaded_;
    StopCondition& stop_;
    Communicator& comm_;
    std::int64_t block_; ///< rows that the ranker must see together
    Journal journal_;
    std::vector<ScoredRow> mine_;
    std::int64_t scored_ = 0; ///< rows of this run
};

/// Numbers of a ranked file, from its scores alone: the same on a first run and on a rerun.
void fill_statistics(RankReport& report, const std::vector<Scores>& scores, const std::vector<std::int32_t>& best,
                     const std::vector<std::int32_t>& worst)
{
    std::array<std::int64_t, 3> counts{};
    for (std::size_t i = 0; i < scores.size(); ++i) {
        const auto ranks = ranks_of(scores[i]);
        report.generated_best += ranks[0] == 1;
        report.generated_middle += ranks[0] == 2;
        report.generated_worst += ranks[0] == 3;
        report.ties += best[i] == worst[i];
        for (std::size_t c = 0; c < candidates_per_row; ++c)
            if (!std::isnan(scores[i][c])) {
                report.mean_score[c] += scores[i][c];
                ++counts[c];
            }
    }
    for (std::size_t c = 0; c < candidates_per_row; ++c)
        report.mean_score[c] = counts[c] > 0 ? report.mean_score[c] / static_cast<double>(counts[c]) : no_candidate;
    report.rows = static_cast<std::int64_t>(scores.size());
}

/// Identity of the answers that are ranked: every dataset of the file but what ranking and later phases add.
std::string rows_digest(const IterationReader& file)
{
    Hasher hasher;
    for (const std::string& path : file.file().datasets()) {
        if (path.starts_with("/ranking/") || path.starts_with("/pairs/") || path.starts_with("/logprobs/") || path.starts_with("/timing/") ||
            path.starts_with("/provenance/"))
            continue;
        const h5::DatasetInfo info = file.file().info(path);
        hasher.update(path);
        std::vector<std::byte> bytes(static_cast<std::size_t>(info.elements()) * h5::bytes_of(info.type));
        file.file().read_into(path, info.type, 0, info.rows(), bytes.data());
        hasher.update(bytes.data(), bytes.size());
    }
    return hasher.hex();
}

struct RankPlan {
    std::vector<RankerSpec> specs;
    std::vector<std::string> names;
    std::string rows_digest;
    std::string rule;
};

void write_results(const RankOptions& options, const RankPlan& plan, const std::vector<LoadedRanker>& rankers,
                   const std::vector<std::vector<ScoredRow>>& scored, const std::vector<Scores>& aggregate, const RankingInfo& info,
                   const RankTiming& timing, RankReport& report, Communicator& comm)
{
    std::vector<RankedRow> mine;
    std::vector<std::int32_t> best, worst;
    for (std::size_t i = 0; i < aggregate.size(); ++i) {
        const PairChoice pair = options.generated_only ? PairChoice{} : choose_pair(aggregate[i], parse_update_rule(plan.rule));
        best.push_back(pair.best);
        worst.push_back(pair.worst);
        if (static_cast<int>(i % static_cast<std::size_t>(comm.size())) != comm.rank())
            continue;
        RankedRow row{static_cast<std::int64_t>(i), aggregate[i], ranks_of(aggregate[i]), pair.best, pair.worst, {}};
        for (std::size_t r = 0; r < rankers.size(); ++r)
            row.rankers.push_back({scored[r][i].scores, scored[r][i].logits});
        mine.push_back(std::move(row));
    }
    h5::Attributes provenance{{"update_rule", plan.rule}};
    for (const LoadedRanker& ranker : rankers)
        provenance[cat("ranker_", ranker.name)] = ranker.ranker->description();
    update_iteration(options.iter, comm, {"/ranking", "/pairs", "/timing/rank", "/provenance/rank"}, [&](h5::File& file) {
        write_ranking(file, static_cast<std::int64_t>(aggregate.size()), mine, info, comm);
        write_timing(file, "rank", timing, comm);
        write_provenance(file, "rank", provenance, comm);
    });
    fill_statistics(report, aggregate, best, worst);
}

} // namespace

void RankOptions::describe(OptionVisitor& visitor)
{
    common.describe(visitor);
    encoding.describe(visitor);
    visitor.option("rank", "iter", iter, "iteration file (iter.h5) to rank", OptionRole::operational);
    visitor.option("rank", "ranker", rankers, "KIND:PATH, repeatable: pairrm:DIR (PairRM), reward:DIR (sequence-classification model) or file:F.jsonl",
                   OptionRole::recipe);
    visitor.option("rank", "update-rule", update_rule, "best-worst|replace|offline", OptionRole::recipe);
    visitor.option("rank", "rank-mode", rank_mode, "per-row|blender: how pairrm cuts long texts (blender: by batches of 8 rows, as LLM-Blender)",
                   OptionRole::recipe);
    visitor.option("rank", "pairrm-dtype", pairrm_dtype, "fp32|bf16: type of computation of pairrm, whatever --dtype says", OptionRole::recipe);
    visitor.option("rank", "generated-only", generated_only, "on|off: score the generated answers alone (held-out files)", OptionRole::recipe);
    visitor.option("rank", "tokens-per-microbatch", tokens_per_microbatch, "packed tokens computed together", OptionRole::operational);
    visitor.option("rank", "stop-file", stop_file, "stop and save when this file exists", OptionRole::operational);
}

void RankOptions::validate() const
{
    common.validate();
    encoding.validate();
    SELM_VALIDATE(!iter.empty(), ExitCode::usage, "--iter is missing (there is nothing to rank). Pass --iter iter.h5");
    parse_update_rule(update_rule);
    SELM_VALIDATE(!rankers.empty() || update_rule == "offline", ExitCode::usage,
                  "--ranker is missing (update rule " << update_rule << " needs scores). Pass --ranker pairrm:DIR, reward:DIR or file:F.jsonl, or --update-rule offline");
    SELM_VALIDATE(!generated_only || !rankers.empty(), ExitCode::usage, "--generated-only on needs a --ranker");
    SELM_VALIDATE(pairrm_dtype == "fp32" || pairrm_dtype == "bf16", ExitCode::usage, "--pairrm-dtype is '" << pairrm_dtype << "'. Use fp32 or bf16");
    SELM_VALIDATE(tokens_per_microbatch >= 1, ExitCode::usage, "--tokens-per-microbatch must be at least 1");
    bool pairwise = false;
    for (const std::string& word : rankers)
        pairwise = RankerSpec::parse(word).kind == "pairrm" || pairwise;
    SELM_VALIDATE(parse_pair_rank_mode(rank_mode) == PairRankMode::per_row || pairwise, ExitCode::usage,
                  "--rank-mode blender is for --ranker pairrm:DIR (other rankers read a row by itself). Use --rank-mode per-row");
}

RankReport run_rank(const RankOptions& options, Communicator& comm)
{
    const auto start = std::chrono::steady_clock::now();
    RankPlan plan;
    std::unique_ptr<IterationReader> file;
    agree(comm, "ranking options and rows", [&] {
        options.validate();
        for (const std::string& word : options.rankers)
            plan.specs.push_back(RankerSpec::parse(word));
        plan.names = ranker_names(plan.specs);
        plan.rule = options.generated_only ? rule_of_held_out : options.update_rule;
        file = std::make_unique<IterationReader>(options.iter);
    });
    StopCondition stop(options.stop_file, options.common.walltime_margin, comm);
    plan.rows_digest = root_string(comm, "digest of the rows", [&] { return rows_digest(*file); });

    std::vector<LoadedRanker> rankers;
    Hasher binding;
    binding.update(cat(plan.rule, '\n', plan.rows_digest, '\n', options.generated_only, '\n'));
    for (std::size_t i = 0; i < plan.specs.size(); ++i) {
        rankers.push_back(load_ranker(plan.specs[i], plan.names[i], options, comm));
        binding.update(cat(plan.names[i], ' ', rankers.back().identity, '\n'));
    }

    RankReport report;
    RankingInfo info;
    info.update_rule = plan.rule;
    info.attributes = {{"binding", binding.hex()}, {"rank_mode", options.rank_mode}};
    for (const LoadedRanker& ranker : rankers)
        info.rankers.push_back({ranker.name, ranker.pairwise(), {{"path", ranker.spec.path}, {"digest", ranker.identity}}});

    std::int64_t complete = 0;
    agree(comm, "existing ranking", [&] {
        if (!file->has_ranking())
            return;
        const auto stored = file->file().attribute("/ranking", "binding");
        complete = stored && *stored == h5::AttributeValue(binding.hex());
        if (!complete)
            SELM_LOG(info, options.iter << " was ranked otherwise; its ranking and pairs are replaced (log-probs of other pairs are refused by training)");
    });
    if (complete != 0) {
        const auto pairs = file->pairs();
        fill_statistics(report, file->ranking_scores(), pairs.best, pairs.worst);
        report.outcome = Outcome::already_complete;
        agree(comm, "leftover journals", [&] {
            for (const std::string& name : plan.names) // of a run that was killed between publishing and tidying up
                if (comm.is_root())
                    Journal::remove_leftover(journal_of(options, name));
        });
        SELM_LOG(info, options.iter << " is ranked already");
        return report;
    }
    claim_phase_output(options.iter, comm);

    RankTiming timing;
    std::vector<std::vector<ScoredRow>> scored;
    std::vector<std::unique_ptr<RankerPass>> passes;
    for (LoadedRanker& ranker : rankers) {
        passes.push_back(std::make_unique<RankerPass>(options, *file, plan.rows_digest, ranker, stop, comm));
        scored.push_back(passes.back()->run(timing));
        if (scored.back().empty() && file->rows() > 0) {
            report.outcome = Outcome::stopped;
            return report;
        }
        report.tokens += all_reduce_value(comm, ranker.ranker->computed_tokens(), ReduceOp::sum, "tokens ranked");
    }
    std::vector<Scores> aggregate(static_cast<std::size_t>(file->rows()), Scores{no_candidate, no_candidate, no_candidate});
    if (!scored.empty()) {
        std::vector<std::vector<Scores>> raw;
        for (const auto& of_ranker : scored) {
            raw.emplace_back();
            for (const ScoredRow& row : of_ranker)
                raw.back().push_back(row.scores);
        }
        aggregate = aggregate_scores(raw);
    }
    write_results(options, plan, rankers, scored, aggregate, info, timing, report, comm);
    for (const auto& pass : passes)
        pass->remove_journal();
    report.seconds = all_reduce_value(comm, seconds_since(start), ReduceOp::max, "ranking time");
    return report;
}

} // namespace selm
