#include "selm/phases/generate.hpp"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <fstream>
#include <iterator>
#include <limits>
#include <optional>
#include <sstream>
#include <thread>
#include <utility>

#include <unistd.h>

#include "generate_input.hpp"
#include "generate_journal.hpp"
#include "given_responses.hpp"
#include "model_files.hpp"
#include "prompt_store.hpp"
#include "selm/algo/schedule.hpp"
#include "selm/base/error.hpp"
#include "selm/base/log.hpp"
#include "selm/base/scope_end.hpp"
#include "selm/comm/agree.hpp"
#include "selm/comm/claim.hpp"
#include "selm/comm/stop_condition.hpp"
#include "selm/data/iteration.hpp"
#include "selm/data/journal.hpp"
#include "selm/data/work_queue.hpp"
#include "selm/phases/config_text.hpp"
#include "selm/phases/generate_scheduler.hpp"
#include "selm/phases/progress.hpp"
#include "selm/phases/shared_model.hpp"
#include "selm/text/encoding.hpp"
#include "selm/text/recipe_encoding.hpp"
#include "selm/text/utf8.hpp"

namespace selm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double sync_every_s = 3;
constexpr auto shortest_sleep = std::chrono::milliseconds(1), longest_sleep = std::chrono::milliseconds(20);
constexpr int queue_tag = 1, progress_tag = 7;

double seconds_since(Clock::time_point start)
{
    return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Seconds since the system started this process; 0 where it does not tell.
double process_seconds()
{
    std::ifstream file("/proc/self/stat");
    std::string text{std::istreambuf_iterator<char>(file), {}};
    // Behind the name in brackets, which may hold spaces: field 3 and on; the start, in clock ticks, is field 22.
    std::istringstream fields(text.substr(std::min(text.size(), text.rfind(')') + 1)));
    std::string skipped;
    for (int field = 3; field < 22; ++field)
        fields >> skipped;
    double ticks = 0;
    timespec now{};
    if (!(fields >> ticks) || ::clock_gettime(CLOCK_BOOTTIME, &now) != 0)
        return 0;
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec)
           - ticks / static_cast<double>(::sysconf(_SC_CLK_TCK));
}

/// What a rank brings to the output.
struct Answers {
    std::vector<GeneratedAnswer> mine;
    RankTiming timing;
    std::string engine, chat_format; ///< empty when nothing was generated
};

// --- generation

/// Tokenizer, chat format and encoding of the policy.
struct Language {
    Tokenizer tokenizer;
    ChatFormat format;
    bool recipe = false;
    std::vector<std::int32_t> end_tokens;

    std::vector<std::int32_t> prompt(std::span<const Message> messages) const
    {
        return recipe ? encode_prompt_recipe(tokenizer, format, messages)
                      : encode_prompt_chat(tokenizer, format, messages, std::numeric_limits<std::int64_t>::max());
    }
};

Language load_language(const GenerateOptions& options)
{
    Tokenizer tokenizer = Tokenizer::from_directory(options.policy);
    const ChatFormat format = options.encoding.chat_format.empty() ? ChatFormat::recognise(options.policy, tokenizer)
                                                                   : ChatFormat::by_name(options.encoding.chat_format);
    std::vector<std::int32_t> end_tokens = end_of_sequence_ids(options.policy);
    const bool recipe = options.encoding.encoding == "recipe";
    end_tokens.push_back(
        recipe ? recipe_ids(tokenizer, format, options.encoding.bos_token, options.encoding.eos_token).eos
               : end_of_turn_id(tokenizer, format));
    std::sort(end_tokens.begin(), end_tokens.end());
    end_tokens.erase(std::unique(end_tokens.begin(), end_tokens.end()), end_tokens.end());
    return {std::move(tokenizer), format, recipe, std::move(end_tokens)};
}

/// Rows to answer with their token limits, and rows whose prompt leaves no room in the context.
struct Plan {
    std::vector<std::int64_t> rows; ///< hand-out order: longest prompt first
    std::vector<std::int64_t> skipped;
    std::int64_t longest = 0; ///< prompt and answer, in tokens
};

std::int64_t new_token_limit(const GenerateOptions& options, const DecoderConfig& config, std::int64_t prompt_tokens)
{
    return std::min(options.max_new_tokens, config.max_positions - prompt_tokens);
}

Plan plan_rows(const GenerateOptions& options, const DecoderConfig& config, const GenerationInput& input,
               const PromptStore& prompts)
{
    Plan plan;
    for (std::int64_t row = input.range.begin; row < input.range.end; ++row) {
        const std::int64_t length = prompts.length(row), limit = new_token_limit(options, config, length);
        if (limit >= 1) {
            plan.rows.push_back(row);
            plan.longest = std::max(plan.longest, length + limit);
        } else {
            plan.skipped.push_back(row);
        }
    }
    if (!plan.skipped.empty() && options.on_long_prompt == "stop") {
        const std::int64_t row = plan.skipped.front();
        throw data_error(cat(options.data, " row ", row, " (prompt_id \"", input.prefs->id(row), "\"): its prompt of ",
                             prompts.length(row), " tokens leaves no room for an answer in the model's context of ",
                             config.context(), " (", plan.skipped.size(),
                             " such row(s)). Take the rows out, or pass --on-long-prompt skip"));
    }
    std::stable_sort(plan.rows.begin(), plan.rows.end(),
                     [&](std::int64_t a, std::int64_t b) { return prompts.length(a) > prompts.length(b); });
    return plan;
}

GeneratedAnswer to_answer(const Tokenizer& tokenizer, SampledAnswer sampled)
{
    GeneratedAnswer answer;
    answer.row = sampled.row;
    answer.text = std::string(strip_whitespace(tokenizer.decode(sampled.tokens, SpecialTokens::skip)));
    answer.tokens = std::move(sampled.tokens);
    answer.logprobs = std::move(sampled.log_probs);
    answer.finish_reason = sampled.ended ? FinishReason::stop : FinishReason::length;
    return answer;
}

/// One rank's work: takes rows from the queue, decodes, journals.
class Generator {
  public:
    Generator(const GenerateOptions& options, const Language& language, const PromptStore& prompts, SharedModel& model,
              std::int64_t slots, std::int64_t capacity, Journal& journal, ProgressReporter& progress,
              StopCondition& stop, Communicator& comm)
        : options_(options), language_(language), prompts_(prompts), model_(model), journal_(journal),
          progress_(progress), stop_(stop), comm_(comm), session_(model.decoder(), slots, capacity, options.cuda_graphs),
          batch_(batch_options(slots), [this](std::span<const DecodeWork> work) { return run_step(work); })
    {
    }

    /// Until there is no more work for this rank; rank 0 stays until all rows are done everywhere, to spread a stop
    /// request and to show the progress. Rows in flight are dropped when stopped.
    void run(WorkQueue& queue)
    {
        const Clock::time_point start = Clock::now();
        Clock::time_point synced = start;
        bool finished = false;
        model_.set_between_layers([&queue] { queue.poll(); });
        const ScopeEnd no_more([this] { model_.set_between_layers({}); });
        while (!finished || !batch_.empty()) {
            poll(queue);
            if (queue.stopped())
                break;
            finished = fill(queue, finished);
            if (batch_.empty()) {
                if (!finished)
                    sleep();
                continue;
            }
            nap_ = shortest_sleep;
            finish(batch_.step());
            if (first_token_s_ == 0 && batch_.new_tokens() > 0)
                first_token_s_ = process_seconds();
            if (seconds_since(synced) > sync_every_s) {
                journal_.sync();
                synced = Clock::now();
            }
        }
        journal_.sync();
        progress_.update(rows_, batch_.new_tokens());
        progress_.flush();
        busy_s_ = seconds_since(start) - slept_s_;
        while (comm_.is_root() && !queue.stopped() && progress_.rows_done() < total_) {
            sleep();
            poll(queue);
        }
    }

    void set_total(std::int64_t total) { total_ = total; }
    std::vector<SampledAnswer> take_answers() { return std::move(answers_); }
    std::int64_t rows() const { return rows_; }
    std::int64_t ended() const { return ended_; }
    std::int64_t new_tokens() const { return batch_.new_tokens(); }
    std::int64_t prompt_tokens() const { return batch_.prompt_tokens(); }
    std::int64_t copied_tokens() const { return batch_.copied_tokens(); }
    double busy_s() const { return busy_s_; } ///< in run(), without waiting for rows
    double first_token_s() const { return first_token_s_; } ///< since the process started; 0: there was none

  private:
    ContinuousBatch::Options batch_options(std::int64_t slots) const
    {
        return {.slots = slots,
                .prefill_tokens = options_.prefill_tokens,
                .prefix_granularity = options_.share_prefixes ? model_.engine().prefix_granularity() : 0,
                .end_tokens = language_.end_tokens,
                .sampling = {.temperature = options_.temperature, .top_p = options_.top_p, .top_k = options_.top_k},
                .allowed_ids = std::min(language_.tokenizer.vocabulary_size(), model_.config().vocabulary),
                .seed = static_cast<std::uint64_t>(options_.common.seed),
                .iteration = static_cast<std::uint64_t>(options_.iteration)};
    }

    Tensor run_step(std::span<const DecodeWork> work)
    {
        const Tensor logits = session_.step(work);
        if (logits.device == Device::cpu)
            return logits;
        host_logits_.resize(static_cast<std::size_t>(logits.rows * logits.columns));
        model_.engine().copy_to_host(logits, host_logits_.data());
        return borrow_f32(host_logits_.data(), logits.rows, logits.columns);
    }

    /// Takes the rows whose prompts the next step can read; true: the queue has nothing more for this rank.
    bool fill(WorkQueue& queue, bool finished)
    {
        while (!finished && batch_.wants_row()) {
            const WorkQueue::Next next = queue.try_next();
            if (next.state != WorkQueue::State::item)
                return next.state == WorkQueue::State::finished;
            const auto prompt = prompts_.prompt(next.item);
            batch_.add({.row = next.item,
                        .prompt = prompt,
                        .max_new_tokens =
                            new_token_limit(options_, model_.config(), static_cast<std::int64_t>(prompt.size()))});
        }
        return finished;
    }

    void finish(std::vector<SampledAnswer> answers)
    {
        for (SampledAnswer& answer : answers) {
            journal_.append(answer.row, to_payload(answer));
            ++rows_;
            ended_ += answer.ended;
            answers_.push_back(std::move(answer));
        }
    }

    /// Messages, progress and requests to stop; never waits.
    void poll(WorkQueue& queue)
    {
        queue.poll();
        progress_.update(rows_, batch_.new_tokens());
        progress_.poll();
        if (!queue.stopped() && stop_.here())
            queue.stop();
    }

    void sleep()
    {
        const Clock::time_point start = Clock::now();
        std::this_thread::sleep_for(nap_);
        nap_ = std::min(2 * nap_, longest_sleep);
        slept_s_ += seconds_since(start);
    }

    const GenerateOptions& options_;
    const Language& language_;
    const PromptStore& prompts_;
    SharedModel& model_;
    Journal& journal_;
    ProgressReporter& progress_;
    StopCondition& stop_;
    Communicator& comm_;
    DecodeSession session_;
    ContinuousBatch batch_;
    std::vector<float> host_logits_;
    std::vector<SampledAnswer> answers_;
    std::int64_t rows_ = 0, ended_ = 0, total_ = 0;
    double busy_s_ = 0, slept_s_ = 0, first_token_s_ = 0;
    std::chrono::milliseconds nap_ = shortest_sleep;
};

/// Sums of this run's counts over all ranks, into the report. Collective over comm.
void add_up(GenerateReport& report, const Generator& generator, const RankTiming& timing, Communicator& comm)
{
    std::int64_t counts[] = {generator.rows(), generator.ended(), generator.prompt_tokens(), generator.new_tokens(),
                             generator.copied_tokens()};
    comm.all_reduce(std::span<std::int64_t>(counts), ReduceOp::sum, "counts of generation");
    report.generated_rows = counts[0];
    report.stopped_by_end = counts[1];
    report.stopped_by_length = counts[0] - counts[1];
    report.prompt_tokens = counts[2];
    report.new_tokens = counts[3];
    report.copied_tokens = counts[4];
    constexpr double never = std::numeric_limits<double>::max();
    const double first = generator.first_token_s();
    report.first_token_s = all_reduce_value(comm, first > 0 ? first : never, ReduceOp::min, "time of the first token");
    if (report.first_token_s == never)
        report.first_token_s = 0;
    const double wall = timing.busy_s + timing.idle_s;
    report.idle_fraction =
        all_reduce_value(comm, wall > 0 ? timing.idle_s / wall : 0, ReduceOp::sum, "idle time") / comm.size();
}

void log_start(const GenerateOptions& options, const Language& language, const Plan& plan, const SharedModel& model,
               std::int64_t slots, std::int64_t resumed, const Communicator& comm)
{
    std::string ends;
    for (const std::int32_t id : language.end_tokens)
        ends += cat(ends.empty() ? "" : ", ", language.tokenizer.token_text(id).value_or("?"), " (", id, ")");
    SELM_LOG(info, "generating " << plan.rows.size() << " answers of at most " << options.max_new_tokens << " tokens, "
                                 << (options.temperature > 0 ? "sampled" : "greedy") << ", encoding "
                                 << options.encoding.encoding << ", chat format " << language.format.name()
                                 << ", answers end at " << ends << "; " << comm.size()
                                 << " rank(s) of " << slots << " slots");
    if (resumed > 0)
        SELM_LOG(info, resumed << " of them are in the journal of an earlier run");
    if (!plan.skipped.empty())
        SELM_LOG(warning, plan.skipped.size()
                              << " row(s) get no answer: their prompt leaves no room in the model's context");
    if (!model.engine().row_invariant() && (comm.size() > 1 || slots > 1))
        SELM_LOG(warning, "engine " << model.engine().name()
                                    << " is not row invariant: answers may differ with the number of ranks and slots");
}

/// Rows whose prompts one step reads, on average.
std::int64_t rows_per_step(const GenerateOptions& options, const PromptStore& prompts, std::span<const std::int64_t> rows)
{
    std::int64_t tokens = 0;
    for (const std::int64_t row : rows)
        tokens += prompts.length(row);
    const auto count = static_cast<std::int64_t>(rows.size());
    return tokens == 0 ? 1 : std::clamp<std::int64_t>(options.prefill_tokens * count / tokens, 1, options.slots);
}

/// Answers of the policy; nullopt when stopped before all rows were done. Collective over comm.
std::optional<Answers> generate_answers(const GenerateOptions& options, const GenerationInput& input,
                                        std::optional<Journal>& opened, GenerateReport& report, Communicator& comm)
{
    StopCondition stop(options.stop_file, options.common.walltime_margin, comm);
    std::optional<Language> language;
    std::optional<DecoderConfig> config;
    agree(comm, "reading the policy", [&] {
        config = DecoderConfig::from_directory(options.policy);
        SELM_VALIDATE(
            !config->sequence_classifier, ExitCode::configuration,
            options.policy
                << " is a reward model (it has no language-model head). Pass --policy a causal language model");
        language.emplace(load_language(options));
        check_vocabulary(options.policy, language->tokenizer.vocabulary_size(), config->vocabulary);
    });
    const PromptStore prompts(
        *input.prefs, input.range.begin, input.range.end,
        [&](std::span<const Message> messages) { return language->prompt(messages); }, comm);
    Plan plan;
    agree(comm, "lengths of the prompts", [&] { plan = plan_rows(options, *config, input, prompts); });
    report.skipped_rows = static_cast<std::int64_t>(plan.skipped.size());
    const auto model = SharedModel::from_directory(options.policy, options.common, comm, input.source.policy_digest);
    claim_phase_output(options.output, comm);
    Journal& journal = opened.emplace(options.output,
                                      generation_binding(input.source.config.recipe_hash, input.source.policy_digest,
                                                         input.source.data_digest, model->engine_key()),
                                      comm);
    report.resumed_rows = static_cast<std::int64_t>(journal.done_rows().size());

    std::vector<std::int64_t> items;
    std::copy_if(plan.rows.begin(), plan.rows.end(), std::back_inserter(items),
                 [&](std::int64_t row) { return !journal.is_done(row); });
    const auto count = static_cast<std::int64_t>(items.size());
    const std::int64_t slots = std::clamp<std::int64_t>(count, 1, options.slots);
    const std::int64_t capacity = (plan.longest + prefill_tile - 1) / prefill_tile * prefill_tile;

    log_start(options, *language, plan, *model, slots, report.resumed_rows, comm);
    ProgressReporter progress(comm, {.mode = options.common.progress,
                                     .label = "generate",
                                     .total = static_cast<std::int64_t>(plan.rows.size()),
                                     .done_before = report.resumed_rows,
                                     .tag = progress_tag});
    std::optional<Generator> generator;
    agree(comm, "memory for keys and values", [&] {
        generator.emplace(options, *language, prompts, *model, slots, std::max(capacity, prefill_tile), journal,
                          progress, stop, comm);
        generator->set_total(static_cast<std::int64_t>(plan.rows.size()));
    });

    const Clock::time_point start = Clock::now();
    const std::int64_t per_step = rows_per_step(options, prompts, items);
    WorkQueue queue(comm, items,
                    {.tag = queue_tag,
                     .initial_per_rank = std::min(per_step, initial_share(count, comm.size(), slots)),
                     .prefetch = per_step});
    run_queue(comm, queue, "generation", [&](WorkQueue& work) { generator->run(work); });
    progress.finish();
    Answers answers;
    answers.timing.rows = generator->rows();
    answers.timing.busy_s = generator->busy_s();
    answers.timing.idle_s = std::max(0.0, seconds_since(start) - answers.timing.busy_s);
    add_up(report, *generator, answers.timing, comm);
    if (report.resumed_rows + report.generated_rows < static_cast<std::int64_t>(plan.rows.size()))
        return std::nullopt;

    agree(comm, "decoding the answers", [&] {
        for (SampledAnswer& answer : generator->take_answers())
            answers.mine.push_back(to_answer(language->tokenizer, std::move(answer)));
        for (const Journal::Record& record : journal.take_recovered())
            answers.mine.push_back(to_answer(language->tokenizer, from_payload(record)));
        for (const std::int64_t row : comm.is_root() ? plan.skipped : std::vector<std::int64_t>())
            answers.mine.push_back(
                {.row = row, .text = {}, .tokens = {}, .logprobs = {}, .finish_reason = FinishReason::none});
    });
    answers.engine = model->engine().description();
    answers.chat_format = language->format.name();
    return answers;
}

/// Answers made elsewhere, or none. Collective over comm.
Answers given_answers(const GenerateOptions& options, const GenerationInput& input, Communicator& comm)
{
    Answers answers;
    claim_phase_output(options.output, comm);
    agree(comm, "reading the responses", [&] {
        if (!comm.is_root())
            return;
        if (options.responses != "none") {
            answers.mine = read_given_responses(options.responses, *input.prefs, input.range.begin, input.range.end);
        } else {
            for (const std::int64_t row : input.keys())
                answers.mine.push_back(
                    {.row = row, .text = {}, .tokens = {}, .logprobs = {}, .finish_reason = FinishReason::none});
        }
        answers.timing.rows = input.rows();
    });
    return answers;
}

void write_output(const GenerateOptions& options, const GenerationInput& input, const Answers& answers, double first_token_s,
                  Communicator& comm)
{
    IterationAttributes attributes;
    attributes.file.config = input.source.config.ini;
    attributes.file.config_hash = input.source.config.recipe_hash;
    attributes.file.source_digest = input.source.data_digest;
    if (!answers.engine.empty())
        attributes.provenance = {{"engine", answers.engine},
                                 {"dtype", options.common.dtype},
                                 {"device", options.common.device},
                                 {"encoding", options.encoding.encoding},
                                 {"chat_format", answers.chat_format},
                                 {"slots", options.slots},
                                 {"first_token_s", first_token_s}};
    if (!input.source.responses_digest.empty())
        attributes.file.extra["responses_digest"] = input.source.responses_digest;
    attributes.iteration = options.iteration;
    attributes.portion = options.portion;
    attributes.portions = options.portions;
    attributes.policy = options.responses.empty() ? options.policy : std::string();
    attributes.policy_digest = input.source.policy_digest;
    write_iteration(options.output, *input.prefs, input.keys(), answers.mine, attributes, answers.timing, comm);
}

} // namespace

GenerateReport run_generate(const GenerateOptions& given, Communicator& comm)
{
    const Clock::time_point start = Clock::now();
    GenerateOptions options = given;
    options.validate();
    if (options.iteration == 0)
        options.iteration = options.portion;
    const GenerationInput input = open_input(options, comm);
    if (auto report = existing_output(options, input, comm))
        return *report;

    GenerateReport report;
    report.rows = input.rows();
    std::optional<Answers> answers;
    std::optional<Journal> journal;
    if (options.responses.empty())
        answers = generate_answers(options, input, journal, report, comm);
    else
        answers = given_answers(options, input, comm);
    if (answers)
        write_output(options, input, *answers, report.first_token_s, comm);
    if (answers && journal)
        journal->remove();
    report.outcome = answers ? Outcome::done : Outcome::stopped;
    report.seconds = all_reduce_value(comm, seconds_since(start), ReduceOp::max, "time of generation");
    if (!answers)
        SELM_LOG(info, "stopped; " << report.resumed_rows + report.generated_rows << " of " << report.rows
                                   << " rows are in the journal. Run the same command again to go on");
    return report;
}

} // namespace selm
