#include "selm/phases/iterate.hpp"

#include <algorithm>
#include <filesystem>
#include <ostream>

#include <nlohmann/json.hpp>

#include "run_directory.hpp"
#include "selm/base/error.hpp"
#include "selm/base/log.hpp"
#include "selm/comm/agree.hpp"

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
    Driver(const IterateOptions& options, Communicator& comm, std::ostream& out)
        : options_(options), comm_(comm), out_(out), paths_(options.run), manifest_(paths_, comm)
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
        if (import_data() == Outcome::stopped)
            return Outcome::stopped;
        if (held_out(0, options_.policy) == Outcome::stopped)
            return Outcome::stopped;
        for (std::int64_t t = 1; t <= options_.iterations; ++t) {
            if (iteration(t) == Outcome::stopped || held_out(t, paths_.policy(t)) == Outcome::stopped)
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
        if (stop_requested(comm_, paths_.stop_file())) {
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

    bool is_hdf5(const std::string& path) const { return path.ends_with(".h5") || path.ends_with(".hdf5"); }
    std::string train_data() const { return is_hdf5(options_.train) ? options_.train : paths_.train_data(); }
    std::string test_data() const { return is_hdf5(options_.test) ? options_.test : paths_.test_data(); }

    Outcome import_one(const std::string& input, const std::string& rows, const std::string& output)
    {
        if (input.empty() || is_hdf5(input))
            return Outcome::done;
        ImportOptions import = options_.import;
        import.input = input;
        import.rows = rows;
        import.output = output;
        const ImportReport report = run_import(import, comm_);
        if (!report.already_complete)
            SELM_LOG(info, "imported " << report.rows << " rows of " << input << " into " << output);
        return Outcome::done;
    }

    Outcome import_data()
    {
        if (import_one(options_.train, options_.train_rows, paths_.train_data()) == Outcome::stopped)
            return Outcome::stopped;
        return import_one(options_.test, options_.test_rows, paths_.test_data());
    }

    GenerateOptions generate_options(std::int64_t t, const std::string& policy) const
    {
        GenerateOptions generate = options_.generate;
        generate.common = options_.generate.common;
        generate.policy = policy;
        generate.iteration = t;
        generate.stop_file = paths_.stop_file();
        return generate;
    }

    Outcome iteration(std::int64_t t)
    {
        const bool offline = t == 1 && options_.first_iteration == "dpo";
        const std::string before = t == 1 ? options_.policy : paths_.policy(t - 1);
        agree(comm_, "iteration directory", [&] {
            if (comm_.is_root())
                std::filesystem::create_directories(paths_.iteration(t));
        });
        const Outcome generated = phase(t, "generate", [&] {
            GenerateOptions generate = generate_options(t, before);
            generate.data = train_data();
            generate.output = paths_.rows(t);
            generate.portion = t;
            generate.portions = options_.iterations;
            if (offline)
                generate.responses = "none";
            return run_generate(generate, comm_);
        });
        if (generated == Outcome::stopped || rank(t, "rank", paths_.rows(t), offline, false) == Outcome::stopped)
            return Outcome::stopped;
        const Outcome scored = phase(t, "logprob", [&] {
            LogProbOptions logprob = options_.logprob;
            logprob.iter = paths_.rows(t);
            logprob.model = before;
            logprob.stop_file = paths_.stop_file();
            return run_logprob(logprob, comm_);
        });
        if (scored == Outcome::stopped)
            return Outcome::stopped;
        return phase(t, "train", [&] {
            TrainOptions train = options_.train_options;
            train.iter = paths_.rows(t);
            train.policy = before;
            train.output = paths_.policy(t);
            train.stop_file = paths_.stop_file();
            if (offline)
                train.alpha = {0.0};
            return run_train(train, comm_);
        });
    }

    Outcome rank(std::int64_t t, const std::string& name, const std::string& iter, bool offline, bool generated_only)
    {
        return phase(t, name, [&] {
            RankOptions rank = options_.rank;
            rank.iter = iter;
            rank.generated_only = generated_only;
            rank.stop_file = paths_.stop_file();
            if (offline)
                rank.update_rule = "offline";
            return run_rank(rank, comm_);
        });
    }

    /// Answers of a policy to the held-out prompts and their scores (the paper selects by this mean).
    Outcome held_out(std::int64_t t, const std::string& policy)
    {
        if (options_.test.empty())
            return Outcome::done;
        agree(comm_, "iteration directory", [&] {
            if (comm_.is_root())
                std::filesystem::create_directories(paths_.iteration(t));
        });
        const Outcome generated = phase(t, "test_generate", [&] {
            GenerateOptions generate = generate_options(t, policy);
            generate.data = test_data();
            generate.output = paths_.test_rows(t);
            generate.responses.clear();
            return run_generate(generate, comm_);
        });
        if (generated == Outcome::stopped)
            return Outcome::stopped;
        return options_.rank.rankers.empty() ? Outcome::done : rank(t, "test_rank", paths_.test_rows(t), false, true);
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

    const IterateOptions& options_;
    Communicator& comm_;
    std::ostream& out_;
    RunPaths paths_;
    RunManifest manifest_;
};

void share_run_options(IterateOptions& o)
{
    for (CommonOptions* common : {&o.rank.common, &o.logprob.common, &o.train_options.common})
        *common = o.generate.common;
    for (EncodingOptions* encoding : {&o.rank.encoding, &o.logprob.encoding, &o.train_options.encoding})
        *encoding = o.generate.encoding;
}

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
    visitor.option("run", "status", status, "print where the run directory stands and exit; reads only", OptionRole::operational);
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
    SELM_VALIDATE(!run.empty(), ExitCode::usage, "--run is missing (results need a directory). Pass --run PATH");
    if (status)
        return;
    SELM_VALIDATE(!train.empty(), ExitCode::usage, "train is missing (there are no preference rows). Set train = FILE in [run] or pass --train FILE");
    SELM_VALIDATE(!policy.empty(), ExitCode::usage, "policy is missing (there is no model to start from). Set policy = DIR in [run] or pass --policy DIR");
    SELM_VALIDATE(iterations >= 1, ExitCode::usage, "iterations is " << iterations << " (nothing would be done). Use 1 or more");
    SELM_VALIDATE(first_iteration == "selm" || first_iteration == "dpo", ExitCode::usage,
                  "first-iteration is '" << first_iteration << "'. Use selm or dpo");
    SELM_VALIDATE(!rank.rankers.empty() || rank.update_rule == "offline", ExitCode::usage,
                  "no ranker is given (new answers cannot be ordered). Set ranker = KIND:PATH in [rank]");
    generate.common.validate();
    generate.encoding.validate();
}

IterateReport run_iterate(const IterateOptions& given, Communicator& comm, std::ostream& out)
{
    IterateOptions options = given;
    share_run_options(options);
    options.validate();
    const RunPaths paths(options.run);
    if (options.status) {
        IterateReport report;
        const RunManifest manifest(paths, comm);
        agree(comm, "status", [&] {
            SELM_VALIDATE(std::filesystem::exists(paths.recipe()), ExitCode::bad_data,
                          options.run << " is no run directory of selm_iter (it has no recipe.cfg). Pass --run PATH of a run");
            if (comm.is_root())
                report.status = status_text(paths, manifest.json());
        });
        return report;
    }
    claim_run_directory(paths, options.run, options.recipe_text, comm);
    IterateReport report = Driver(options, comm, out).run();
    if (report.outcome == Outcome::stopped)
        SELM_LOG(info, "run " << word(report.outcome) << "; everything so far is saved. Run the same command again to go on");
    return report;
}

} // namespace selm
