#include "selm/phases/logprob.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>

#include "packed_rows.hpp"
#include "selm/base/error.hpp"
#include "selm/base/log.hpp"
#include "selm/base/scope_end.hpp"
#include "selm/comm/agree.hpp"
#include "selm/comm/claim.hpp"
#include "selm/comm/stop_condition.hpp"
#include "selm/data/iteration.hpp"
#include "selm/data/journal.hpp"
#include "selm/data/work_queue.hpp"
#include "selm/phases/progress.hpp"
#include "selm/phases/shared_model.hpp"

namespace selm {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int queue_tag = 1, progress_tag = 7;
/// Tokens that keep the matrix kernels busy: passes take rows up to here, not more, so that ranks end together.
constexpr std::int64_t enough_tokens = 512;
constexpr std::int64_t bytes_per_token = 4; ///< of text, about
constexpr std::int64_t most_rows_ahead = 16;

double seconds_since(Clock::time_point start)
{
    return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Everything the ranks read before the model: the same on each.
struct Input {
    std::unique_ptr<IterationReader> reader;
    IterationReader::Pairs pairs;
    std::string pairs_digest;
    std::string model_digest;

    RowPair pair(std::int64_t position) const
    {
        const auto i = static_cast<std::size_t>(position);
        return {pairs.best[i], pairs.worst[i], reader->has_generated(position)};
    }
};

Input open_input(const LogProbOptions& options, Communicator& comm)
{
    Input input;
    agree(comm, "opening the rows", [&] {
        input.reader = std::make_unique<IterationReader>(options.iter);
        input.pairs = input.reader->pairs();
        SELM_VALIDATE(
            input.pairs.update_rule != "none", ExitCode::bad_data,
            options.iter << " was ranked with --generated-only on (held-out answers have no pairs to learn from). "
                            "Rank it without --generated-only first");
    });
    input.pairs_digest = root_string(comm, "digest of the pairs", [&] { return input.reader->pairs_digest(); });
    input.model_digest = root_string(comm, "digest of the model", [&] { return model_digest(options.model); });
    return input;
}

LogProbAttributes attributes_of(const LogProbOptions& options, const Input& input, const std::string& engine,
                                const RowEncoder& encoder)
{
    LogProbAttributes attributes;
    attributes.model = options.model;
    attributes.digest = input.model_digest;
    attributes.engine = engine;
    attributes.encoding = options.encoding.encoding;
    attributes.chat_format = encoder.format_name();
    attributes.dtype = options.common.dtype;
    attributes.pairs_digest = input.pairs_digest;
    attributes.max_length = options.encoding.max_length;
    attributes.max_prompt_length = options.encoding.max_prompt_length;
    attributes.extra = encoder.attributes();
    return attributes;
}

/// Would computing again give the same values? The directory's name does not matter.
bool same_values(const LogProbAttributes& a, const LogProbAttributes& b)
{
    return a.digest == b.digest && a.engine == b.engine && a.encoding == b.encoding && a.chat_format == b.chat_format &&
           a.dtype == b.dtype && a.pairs_digest == b.pairs_digest && a.max_length == b.max_length &&
           a.max_prompt_length == b.max_prompt_length && a.extra == b.extra;
}

JournalBinding journal_binding(const LogProbAttributes& a)
{
    JournalBinding binding{{"model", a.digest},
                           {"engine", a.engine},
                           {"encoding", a.encoding},
                           {"chat format", a.chat_format},
                           {"dtype", a.dtype},
                           {"pairs", a.pairs_digest},
                           {"max-length", std::to_string(a.max_length)},
                           {"max-prompt-length", std::to_string(a.max_prompt_length)}};
    for (const auto& [name, value] : a.extra)
        binding.emplace_back(name, std::visit([](const auto& one) { return cat(one); }, value));
    return binding;
}

std::vector<std::byte> to_payload(const RowLogProbSums& row)
{
    PayloadWriter writer;
    writer.value(row.sum);
    writer.value(row.tokens);
    return writer.bytes();
}

RowLogProbSums from_payload(const Journal::Record& record)
{
    PayloadReader reader(record.payload);
    RowLogProbSums row;
    row.position = record.row;
    row.sum = reader.value<std::array<double, 3>>();
    row.tokens = reader.value<std::array<std::int32_t, 3>>();
    return row;
}

struct HandOut {
    std::vector<std::int64_t> rows;
    std::int64_t per_pass = 1; ///< rows that make up a pass, on average
};

/// Rows longest first, so that the last ones handed out are short.
HandOut hand_out(const Input& input, const Journal& journal)
{
    std::vector<std::pair<std::int64_t, std::int64_t>> rows; // (-bytes, position)
    for (std::int64_t i = 0; i < input.reader->rows(); ++i)
        if (!journal.is_done(i))
            rows.emplace_back(-RowEncoder::bytes(*input.reader, i, input.pair(i)), i);
    std::sort(rows.begin(), rows.end());
    HandOut out;
    std::int64_t total = 1;
    for (const auto& [bytes, position] : rows) {
        out.rows.push_back(position);
        total -= bytes;
    }
    const auto count = static_cast<std::int64_t>(rows.size());
    out.per_pass = std::clamp<std::int64_t>(enough_tokens * bytes_per_token * count / total, 1, most_rows_ahead);
    return out;
}

/// This rank's share of the rows.
class Scorer {
  public:
    Scorer(const LogProbOptions& options, const Input& input, const RowEncoder& encoder, SharedModel& model,
           Journal& journal, ProgressReporter& progress, StopCondition& stop)
        : options_(options), input_(input), encoder_(encoder), model_(model), journal_(journal), progress_(progress),
          stop_(stop), budget_(model.engine().row_invariant() ? options.tokens_per_microbatch
                                                              : 1), // rows alone give the same bits anywhere
          enough_(std::min(budget_, enough_tokens))
    {
    }

    void run(WorkQueue& queue)
    {
        model_.set_between_layers([&queue] { queue.poll(); });
        const ScopeEnd no_more([this] { model_.set_between_layers({}); });
        std::optional<PackedRow> next;
        for (bool finished = false; !finished || next;) {
            std::vector<PackedRow> rows;
            std::int64_t tokens = 0;
            if (next)
                take(rows, tokens, std::move(next));
            while (!finished && !next && tokens < enough_) {
                const WorkQueue::Next item = queue.try_next();
                finished = item.state == WorkQueue::State::finished;
                if (item.state != WorkQueue::State::item)
                    break;
                next = encoder_.encode(*input_.reader, item.item, input_.pair(item.item));
                if (rows.empty() || tokens + next->tokens() <= budget_)
                    take(rows, tokens, std::move(next));
            }
            if (!rows.empty()) {
                score(rows);
            } else if (!finished) { // wait for one
                if (const auto item = queue.next())
                    next = encoder_.encode(*input_.reader, *item, input_.pair(*item));
                else
                    finished = true;
            }
            poll(queue);
        }
        journal_.sync();
        progress_.flush();
    }

    std::vector<RowLogProbSums> take_rows() { return std::move(done_); }
    std::int64_t rows() const { return static_cast<std::int64_t>(done_.size()); }
    std::int64_t tokens() const { return tokens_; }
    std::int64_t scored_tokens() const { return scored_tokens_; }

  private:
    static void take(std::vector<PackedRow>& rows, std::int64_t& tokens, std::optional<PackedRow>&& row)
    {
        tokens += row->tokens();
        rows.push_back(std::move(*row));
        row.reset();
    }

    void score(const std::vector<PackedRow>& rows)
    {
        PackedBatch batch;
        for (const PackedRow& row : rows)
            batch.add_scored(row.trunk, row.branches);
        const std::vector<float> log_probs = model_.decoder().log_probs(batch);
        std::vector<double> sums(static_cast<std::size_t>(batch.branches), 0.0);
        for (std::size_t i = 0; i < log_probs.size(); ++i)
            sums[static_cast<std::size_t>(batch.owner[i])] += static_cast<double>(log_probs[i]);
        std::size_t first_branch = 0;
        for (const PackedRow& row : rows) {
            finish(row, sums, first_branch);
            first_branch += row.branches.size();
        }
        tokens_ += static_cast<std::int64_t>(batch.tokens.size());
        scored_tokens_ += static_cast<std::int64_t>(log_probs.size());
    }

    void finish(const PackedRow& row, const std::vector<double>& sums, std::size_t first_branch)
    {
        RowLogProbSums out;
        out.position = row.position;
        for (std::size_t c = 0; c < row.branch_of.size(); ++c) {
            out.sum[c] = std::numeric_limits<double>::quiet_NaN();
            if (row.branch_of[c] < 0)
                continue;
            const auto branch = static_cast<std::size_t>(row.branch_of[c]);
            out.sum[c] = sums[first_branch + branch];
            out.tokens[c] = static_cast<std::int32_t>(row.scored_tokens(branch));
            SELM_VALIDATE(
                std::isfinite(out.sum[c]), ExitCode::bad_data,
                options_.iter << " row " << row.position << " (prompt_id \"" << input_.reader->id(row.position)
                              << "\"): its log-prob is not finite (training would break). Check the weights of "
                              << options_.model << ", or use --dtype fp32");
        }
        journal_.append(out.position, to_payload(out));
        done_.push_back(out);
    }

    void poll(WorkQueue& queue)
    {
        queue.poll();
        progress_.update(rows(), tokens_);
        progress_.poll();
        if (!queue.stopped() && stop_.here())
            queue.stop();
    }

    const LogProbOptions& options_;
    const Input& input_;
    const RowEncoder& encoder_;
    SharedModel& model_;
    Journal& journal_;
    ProgressReporter& progress_;
    StopCondition& stop_;
    std::int64_t budget_; ///< tokens of a pass, at most
    std::int64_t enough_; ///< from here on no further row joins a pass
    std::vector<RowLogProbSums> done_;
    std::int64_t tokens_ = 0, scored_tokens_ = 0;
};

void write_output(const LogProbOptions& options, const Input& input, const std::vector<RowLogProbSums>& mine,
                  const LogProbAttributes& attributes, const RankTiming& timing, const std::string& engine,
                  Communicator& comm)
{
    const std::string phase = "logprob_" + options.name;
    update_iteration(options.iter, comm, {"/logprobs/" + options.name, "/timing/" + phase, "/provenance/" + phase},
                     [&](h5::File& file) {
                         write_logprobs(file, options.name, input.reader->rows(), mine, attributes, comm);
                         write_timing(file, phase, timing, comm);
                         write_provenance(file, phase, {{"model", options.model}, {"engine", engine}}, comm);
                     });
}

/// True when the file holds these very log-probs. Collective over comm.
bool already_there(const LogProbOptions& options, const Input& input, const LogProbAttributes& attributes,
                   Communicator& comm)
{
    bool same = false;
    agree(comm, "existing log-probs", [&] {
        if (!input.reader->has_logprobs(options.name))
            return;
        same = same_values(input.reader->logprobs(options.name).attributes, attributes);
        if (!same)
            SELM_LOG(
                info,
                options.iter << " has log-probs '" << options.name
                             << "' made with another model, encoding, dtype, engine or other pairs; they are replaced");
    });
    return same;
}

} // namespace

void LogProbOptions::describe(OptionVisitor& visitor)
{
    common.describe(visitor);
    encoding.describe(visitor);
    visitor.option("logp", "iter", iter, "iter.h5 with /pairs", OptionRole::operational);
    visitor.option("logp", "model", model, "Hugging Face model directory that scores", OptionRole::operational);
    visitor.option("logp", "name", name, "group under /logprobs", OptionRole::recipe);
    visitor.option("logp", "tokens-per-microbatch", tokens_per_microbatch, "packed tokens computed together",
                   OptionRole::operational);
    visitor.option("logp", "stop-file", stop_file, "stop, with everything saved, when this file appears",
                   OptionRole::operational);
}

void LogProbOptions::validate() const
{
    common.validate();
    encoding.validate();
    SELM_VALIDATE(!iter.empty(), ExitCode::usage, "--iter is missing (there are no rows). Pass --iter iter.h5");
    SELM_VALIDATE(!model.empty(), ExitCode::usage, "--model is missing (nothing can score). Pass --model DIR");
    SELM_VALIDATE(!name.empty() && name.find('/') == std::string::npos, ExitCode::usage,
                  "--name '" << name << "' cannot name a group. Use letters, digits, - and _");
    SELM_VALIDATE(tokens_per_microbatch >= 1, ExitCode::usage,
                  "--tokens-per-microbatch " << tokens_per_microbatch << " is too small. Use 1 or more");
}

LogProbReport run_logprob(const LogProbOptions& options, Communicator& comm)
{
    const Clock::time_point start = Clock::now();
    options.validate();
    StopCondition stop(options.stop_file, options.common.walltime_margin, comm);
    const Input input = open_input(options, comm);
    LogProbReport report;
    report.rows = input.reader->rows();

    const auto model = SharedModel::from_directory(options.model, options.common, comm, input.model_digest);
    std::optional<RowEncoder> encoder;
    agree(comm, "reading the tokenizer", [&] {
        SELM_VALIDATE(
            !model->config().sequence_classifier, ExitCode::configuration,
            options.model
                << " is a reward model (it has no language-model head). Pass --model a causal language model");
        encoder.emplace(options.model, options.encoding, model->config());
    });
    const LogProbAttributes attributes = attributes_of(options, input, model->engine().numerics(), *encoder);
    const std::string journal_of = cat(options.iter, ".logprobs-", options.name);
    if (already_there(options, input, attributes, comm)) {
        agree(comm, "leftover journal", [&] {
            if (comm.is_root()) // of a run that was killed between publishing and tidying up
                Journal::remove_leftover(journal_of);
        });
        report.outcome = Outcome::already_complete;
        SELM_LOG(info, options.iter << " has the log-probs '" << options.name << "' already");
        return report;
    }
    encoder->check_lengths(*input.reader, [&](std::int64_t row) { return input.pair(row); }, comm);
    claim_phase_output(options.iter, comm);

    Journal journal(journal_of, journal_binding(attributes), comm);
    report.resumed_rows = static_cast<std::int64_t>(journal.done_rows().size());
    ProgressReporter progress(comm, {.mode = options.common.progress,
                                     .label = "log-probs",
                                     .total = report.rows,
                                     .done_before = report.resumed_rows,
                                     .tag = progress_tag});
    Scorer scorer(options, input, *encoder, *model, journal, progress, stop);
    HandOut order;
    agree(comm, "order of the rows", [&] { order = hand_out(input, journal); });
    const Clock::time_point work_start = Clock::now();
    const auto count = static_cast<std::int64_t>(order.rows.size());
    WorkQueue queue(comm, order.rows,
                    {.tag = queue_tag,
                     .initial_per_rank = initial_share(count, comm.size(), order.per_pass),
                     .prefetch = order.per_pass});
    run_queue(comm, queue, "log-probs", [&](WorkQueue& work) { scorer.run(work); });
    progress.finish();

    RankTiming timing{scorer.rows(), 0, queue.idle_s()};
    timing.busy_s = seconds_since(work_start) - timing.idle_s;
    std::array<std::int64_t, 3> counts{scorer.rows(), scorer.tokens(), scorer.scored_tokens()};
    comm.all_reduce(std::span<std::int64_t>(counts), ReduceOp::sum, "counts of log-probs");
    report.tokens = counts[1];
    report.scored_tokens = counts[2];
    if (report.resumed_rows + counts[0] < report.rows) {
        report.outcome = Outcome::stopped;
        SELM_LOG(info, "stopped; " << report.resumed_rows + counts[0] << " of " << report.rows
                                   << " rows are in the journal. Run the same command again to go on");
    } else {
        std::vector<RowLogProbSums> mine = scorer.take_rows();
        agree(comm, "journal of the log-probs", [&] {
            for (const Journal::Record& record : journal.take_recovered())
                mine.push_back(from_payload(record));
        });
        write_output(options, input, mine, attributes, timing, model->engine().description(), comm);
        journal.remove();
    }
    report.seconds = all_reduce_value(comm, seconds_since(start), ReduceOp::max, "time of log-probs");
    return report;
}

} // namespace selm
