#include "selm/phases/train.hpp"

#include <filesystem>
#include <utility>

#include "pairrm_objective.hpp"
#include "reward_objective.hpp"
#include "same_numerics.hpp"
#include "selm/base/error.hpp"
#include "selm/base/log.hpp"
#include "selm/comm/agree.hpp"
#include "selm_objective.hpp"
#include "training_loop.hpp"
#include "training_output.hpp"

namespace selm {

namespace {

/// The recipe's keys, one by one, so that a refusal can name the one that differs.
class RecipeKeys final : public OptionVisitor {
  public:
    void option(const char* s, const char* n, std::string& v, const char*, OptionRole r) override { add(s, n, v, r); }
    void option(const char* s, const char* n, std::int64_t& v, const char*, OptionRole r) override
    {
        add(s, n, cat(v), r);
    }
    void option(const char* s, const char* n, double& v, const char*, OptionRole r) override { add(s, n, cat(v), r); }
    void option(const char* s, const char* n, bool& v, const char*, OptionRole r) override
    {
        add(s, n, v ? "on" : "off", r);
    }
    void option(const char*, const char*, std::vector<double>&, const char*, OptionRole) override {
    } // this iteration's values count
    void option(const char* s, const char* n, std::vector<std::string>& v, const char*, OptionRole r) override
    {
        std::string joined;
        for (const std::string& value : v)
            joined += (joined.empty() ? "" : ",") + value;
        add(s, n, joined, r);
    }
    CheckpointBinding keys;

  private:
    void add(const char* section, const char* name, const std::string& value, OptionRole role)
    {
        if (role == OptionRole::recipe)
            keys.emplace_back(cat(section, ".", name), value);
    }
};

CheckpointBinding binding_of(TrainOptions options, const SelmObjectiveParts& parts)
{
    RecipeKeys visitor;
    options.describe(visitor);
    CheckpointBinding binding = std::move(visitor.keys);
    binding.emplace_back("train.alpha", cat(parts.alpha));
    binding.emplace_back("train.beta", cat(parts.beta));
    binding.emplace_back("train.learning-rate", cat(parts.learning_rate));
    for (auto& entry : parts.objective->binding())
        binding.push_back(std::move(entry));
    return binding;
}

SelmObjectiveParts make_objective(const TrainOptions& options, Communicator& comm)
{
    if (options.objective == "selm")
        return make_selm_objective(options, comm);
    SelmObjectiveParts parts;
    parts.objective = options.objective == "pairrm" ? make_pairrm_objective(options, comm) : make_reward_objective(options, comm);
    parts.learning_rate = options.learning_rate.front();
    return parts;
}

} // namespace

TrainReport run_train(const TrainOptions& options, Communicator& comm)
{
    options.validate();
    agree(comm, "directories", [&] {
        std::error_code ignored; // of an output that is not there yet
        SELM_VALIDATE(!std::filesystem::equivalent(options.policy, options.output, ignored), ExitCode::usage,
                      "--output is the directory that --policy reads (it would be overwritten). Pass another --output");
    });
    const SelmObjectiveParts parts = make_objective(options, comm);
    agree(comm, "options beside the model and its rows", [&] {
        frozen_parameters(options.freeze, parts.objective->parameters());
        parts.objective->check_memory();
    });
    check_same_numerics(parts.objective->numerics(), comm);
    const CheckpointBinding binding = binding_of(options, parts);
    TrainingOutput output(options.output, comm);
    if (const auto record = output.finished(binding)) {
        SELM_LOG(info, options.output << " is trained already");
        TrainReport report = report_from_json(*record);
        report.outcome = Outcome::already_complete;
        return report;
    }
    output.claim();
    if (!parts.objective->prepare(comm)) {
        SELM_LOG(info, "stopped before the first step; what is done is saved. Run the same command again to go on");
        TrainReport report;
        report.outcome = Outcome::stopped;
        report.rows = parts.objective->rows();
        return report;
    }
    TrainingLoop loop(options, parts.iteration, parts.learning_rate, *parts.objective, output, binding, comm);
    TrainReport report = loop.run();
    if (report.outcome == Outcome::done) {
        loop.publish(report);
        parts.objective->finish(comm);
    }
    return report;
}

} // namespace selm
