#include "selm/phases/iterate.hpp"

#include <algorithm>
#include <filesystem>
#include <ostream>

#include <nlohmann/json.hpp>

#include "dry_run.hpp"
#include "iterate_phases.hpp"
#include "run_directory.hpp"
#include "selm/base/error.hpp"
#include "selm/base/log.hpp"
#include "selm/comm/agree.hpp"
#include "selm/comm/stop_condition.hpp"
#include "selm/phases/run_status.hpp"

namespace selm {
namespace {

using nlohmann::json;

/// Passes on the options of one section only, without those that the driver fills itself.
class SectionOnly final : public OptionVisitor {
  public:
    SectionOnly(OptionVisitor& inner, std::vector<std::string> driver_fills) : inner_(inner), driver_fills_(std::move(driver_fills)) {}
    void option(const char* s, const char* n, std::string& v, const char* h, OptionRole r) override { pass(s, n, v, h, r); }
    void option(const char* s, const char* n, std::int64_t& v, const char* h, OptionRole r) override { pass(s, n, v, h, r); }
    void option(const char* s, const char* n, double& v, const char* h, OptionRole r) override { pass(s, n, v, h, r); }
    void option(const char* s, const char* n, bool& v, const char* h, OptionRole r) override { pass(s, n, v, h, r); }
    void option(const char* s, const char* n, std::vector<double>& v, const char* h, OptionRole r) override { pass(s, n, v, h, r); }
    void option(const char* s, const char* n, std::vector<std::string>& v, const char* h, OptionRole r) override { pass(s, n, v, h, r); }

  private:
    template<typename T>
    void pass(const char* section, const char* name, T& value, const char* help, OptionRole role)
    {
        if (std::string(section) == "run" || std::count(driver_fills_.begin(), driver_fills_.end(), name))
            return;
        inner_.option(section, name, value, help, role);
    }
    OptionVisitor& inner_;
    std::vector<std::string> driver_fills_;
};

const char* word(Outcome outcome)
{
    return outcome == Outcome::stopped ? "stopped" : "done";
}

json to_json(const GenerateReport& r)
{
    return {{"rows", r.rows}, {"skipped_rows", r.skipped_rows}, {"tokens", r.prompt_tokens + r.new_tokens}, {"new_tokens", r.new_tokens},
            {"stopped_by_end", r.stopped_by_end}, {"stopped_by_length", r.stopped_by_length}, {"seconds", r.seconds},
            {"idle_fraction", r.idle_fraction}, {"resumed_rows", r.resumed_rows}};
}

json to_json(const RankReport& r)
{
    return {{"rows", r.rows}, {"generated_best", r.generated_best}, {"generated_middle", r.generated_middle},
            {"generated_worst", r.generated_worst}, {"ties", r.ties}, {"mean_score", r.mean_score}, {"tokens", r.tokens},
            {"seconds", r.seconds}};
}

json to_json(const LogProbReport& r)
{
    return {{"rows", r.rows}, {"tokens", r.tokens}, {"scored_tokens", r.scored_tokens}, {"seconds", r.seconds}, {"resumed_rows", r.resumed_rows}};
}

json to_json(const TrainReport& r)
{
    return {{"rows", r.rows}, {"steps", r.steps}, {"loss", r.loss}, {"loss_dpo", r.loss_dpo}, {"loss_optimism", r.loss_optimism},
            {"reward_margin", r.reward_margin}, {"reward_accuracy", r.reward_accuracy}, {"first_loss", r.first_loss},
            {"last_loss", r.last_loss}, {"tokens", r.tokens}, {"seconds", r.seconds}};
}

/// Runs the phases in order; each is skipped when the manifest has it. Every method is collective.
class Driver {
  public:
    Driver(const IteratePhases& phases, Communicator& comm, std::ostream& out)
        : phases_(phases), options_(phases.options()), comm_(comm), out_(out), paths_(phases.paths()), manifest_(paths_, comm),
          stop_(paths_.stop_file(), options_.generate.common.walltime_margin, comm)
    {
    }

    IterateReport run()
    {
        IterateReport report;
        report.outcome = run_phases(report.iterations_done);
        return report;
    }

  private:
    Outcome run_phases(std::int64_t& iterations_done)
    {
        import_data();
        if (held_out(0) == Outcome::stopped)
            return Outcome::stopped;
        for (std::int64_t t = 1; t <= options_.iterations; ++t) {
            if (iteration(t) == Outcome::stopped || held_out(t) == Outcome::stopped)
                return Outcome::stopped;
            iterations_done = t;
            print_block(t);
        }
        return Outcome::done;
    }

    /// Phase `name` of iteration t through `body` (returning a report), unless it is recorded.
    template<typename Body>
    Outcome phase(std::int64_t t, const std::string& name, Body&& body)
    {
        if (manifest_.phase(t, name))
            return Outcome::done;
        if (stop_.agreed()) {
            SELM_LOG(info, "stop requested before " << name << " of iteration " << t);
            return Outcome::stopped;
        }
        SELM_LOG(info, (t == 0 ? std::string("before training") : cat("iteration ", t, " of ", options_.iterations)) << ": " << name);
        const auto report = with_context(cat("iteration ", t, ", ", name), body);
        if (report.outcome == Outcome::stopped)
            return Outcome::stopped;
        manifest_.record(t, name, to_json(report), comm_);
        return Outcome::done;
    }

    void import_one(const ImportOptions& import)
    {
        const ImportReport report = run_import(import, comm_);
        if (!report.already_complete)
            SELM_LOG(info, "imported " << report.rows << " rows of " << import.input << " into " << import.output);
    }

    void import_data()
    {
        if (phases_.imports_train())
            import_one(phases_.import_train());
        if (phases_.imports_test())
            import_one(phases_.import_test());
    }

    void make_iteration_directory(std::int64_t t)
    {
        agree(comm_, "iteration directory", [&] {
            if (comm_.is_root())
                std::filesystem::create_directories(paths_.iteration(t));
        });
    }

    Outcome iteration(std::int64_t t)
    {
        make_iteration_directory(t);
        if (phase(t, "generate", [&] { return run_generate(phases_.generate(t), comm_); }) == Outcome::stopped
            || phase(t, "rank", [&] { return run_rank(phases_.rank(t), comm_); }) == Outcome::stopped
            || phase(t, "logprob", [&] { return run_logprob(phases_.logprob(t), comm_); }) == Outcome::stopped)
            return Outcome::stopped;
        return phase(t, "train", [&] { return run_train(phases_.train(t), comm_); });
    }

    /// Answers of the policy after iteration t to the held-out prompts and their scores (the paper selects by this mean).
    Outcome held_out(std::int64_t t)
    {
        if (options_.test.empty())
            return Outcome::done;
        make_iteration_directory(t);
        if (phase(t, "test_generate", [&] { return run_generate(phases_.held_out_generate(t), comm_); }) == Outcome::stopped)
            return Outcome::stopped;
        if (options_.rank.rankers.empty())
            return Outcome::done;
        return phase(t, "test_rank", [&] { return run_rank(phases_.held_out_rank(t), comm_); });
    }

    void print_block(std::int64_t t)
    {
        if (!comm_.is_root())
            return;
        json one;
        for (const std::int64_t i : {t - 1, t})
            if (const auto entry = manifest_.json().find("iter" + std::to_string(i)); entry != manifest_.json().end())
                one["iter" + std::to_string(i)] = *entry;
        out_ << block_text(one, t) << std::flush;
    }

    const IteratePhases& phases_;
    const IterateOptions& options_;
    Communicator& comm_;
    std::ostream& out_;
    const RunPaths& paths_;
    RunManifest manifest_;
    StopCondition stop_;
};

} // namespace

void IterateOptions::describe(OptionVisitor& visitor)
{
    visitor.option("run", "run", run, "run directory: created, or continued where it stands", OptionRole::operational);
    visitor.option("run", "train", train, "preference rows: .jsonl, .parquet or .h5 of selm_import", OptionRole::recipe);
    visitor.option("run", "train-rows", train_rows, "lines A:B of train (0-based, B excluded); empty: all", OptionRole::recipe);
    visitor.option("run", "test", test, "held-out prompts, as train; empty: none", OptionRole::recipe);
    visitor.option("run", "test-rows", test_rows, "lines A:B of test", OptionRole::recipe);
    visitor.option("run", "policy", policy, "Hugging Face model directory to start from", OptionRole::recipe);
    visitor.option("run", "iterations", iterations, "iterations, each on its own portion of train", OptionRole::recipe);
    visitor.option("run", "first-iteration", first_iteration, "selm|dpo (dpo: the given pairs, no new answers, alpha 0)", OptionRole::recipe);
    visitor.option("run", "status", status, "print where the run stands and exit; reads only, needs no MPI", OptionRole::operational);
    visitor.option("run", "dry-run", dry_run, "print what the recipe would do and exit; needs config.json of the policy, no weights",
                   OptionRole::operational);
    visitor.option("run", "ranks", ranks, "dry run: plan for this many ranks (0: as started)", OptionRole::operational);
    visitor.option("run", "ranks-per-node", ranks_per_node, "dry run: ranks that share a node (0: all)", OptionRole::operational);
    visitor.option("run", "node-memory", node_memory, "dry run: GiB of a node; refuse a plan that needs more (0: not checked)",
                   OptionRole::operational);
    visitor.option("run", "rows-total", rows_total, "dry run: rows of train, where the file is not at hand (0: counted)",
                   OptionRole::operational);
    visitor.option("run", "format", format, "dry run and status: table|json", OptionRole::operational);
    generate.common.describe(visitor);
    generate.encoding.describe(visitor);
    SectionOnly filtered(visitor, {"data", "policy", "output", "iteration", "portion", "portions", "responses", "stop-file", "iter", "model",
                                   "input", "rows", "name", "reference", "generated-only", "objective", "trainable", "max-steps", "limit"});
    import.describe(filtered);
    generate.describe(filtered);
    rank.describe(filtered);
    logprob.describe(filtered);
    train_options.describe(filtered);
}

void IterateOptions::validate() const
{
    generate.common.validate();
    SELM_VALIDATE(!run.empty() || dry_run, ExitCode::usage, "--run is missing (results need a directory). Pass --run PATH");
    SELM_VALIDATE(!status || !dry_run, ExitCode::usage, "--status and --dry-run exclude each other. Pass one of them");
    SELM_VALIDATE(format == "table" || format == "json", ExitCode::usage, "--format " << format << " is not known. Use table or json");
    for (const auto& [name, value] : {std::pair{"ranks", ranks}, {"ranks-per-node", ranks_per_node}, {"rows-total", rows_total}})
        SELM_VALIDATE(value >= 0, ExitCode::usage, "--" << name << " " << value << " is negative. Use 0 or more");
    SELM_VALIDATE(node_memory >= 0, ExitCode::usage, "--node-memory " << node_memory << " is negative. Use 0 or more");
    if (status)
        return;
    SELM_VALIDATE(!train.empty(), ExitCode::usage, "train is missing (there are no preference rows). Set train = FILE in [run] or pass --train FILE");
    SELM_VALIDATE(!policy.empty(), ExitCode::usage, "policy is missing (there is no model to start from). Set policy = DIR in [run] or pass --policy DIR");
    SELM_VALIDATE(iterations >= 1, ExitCode::usage, "iterations is " << iterations << " (nothing would be done). Use 1 or more");
    SELM_VALIDATE(first_iteration == "selm" || first_iteration == "dpo", ExitCode::usage,
                  "first-iteration is '" << first_iteration << "'. Use selm or dpo");
    SELM_VALIDATE(!rank.rankers.empty() || rank.update_rule == "offline", ExitCode::usage,
                  "no ranker is given (new answers cannot be ordered). Set ranker = KIND:PATH in [rank]");
    // All phases now, not when their turn comes after hours.
    const IteratePhases phases(*this);
    if (phases.imports_train())
        phases.import_train().validate();
    if (phases.imports_test())
        phases.import_test().validate();
    for (std::int64_t t = 1; t <= std::min<std::int64_t>(iterations, 2); ++t) { // the first may be another kind than the rest
        phases.generate(t).validate();
        phases.rank(t).validate();
        phases.logprob(t).validate();
        phases.train(t).validate();
    }
    if (!test.empty())
        phases.held_out_generate(1).validate();
}

IterateReport run_iterate(const IterateOptions& options, Communicator& comm, std::ostream& out)
{
    options.validate();
    IterateReport report;
    if (options.dry_run) {
        report.status = root_string(comm, "dry run", [&] { return dry_run_text(options, comm.size()); });
        return report;
    }
    if (options.status) {
        report.status = root_string(comm, "status", [&] {
            RunStatus status = read_run_status(options.run);
            ask_slurm(status);
            return options.format == "json" ? status_json(status) : status_table(status);
        });
        return report;
    }
    const IteratePhases phases(options);
    const RunPaths& paths = phases.paths();
    claim_run_directory(paths, options.run, options.recipe_text, comm);
    report = Driver(phases, comm, out).run();
    if (report.outcome == Outcome::stopped)
        SELM_LOG(info, "run " << word(report.outcome) << "; everything so far is saved. Run the same command again to go on");
    return report;
}

} // namespace selm
