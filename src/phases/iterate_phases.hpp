#pragma once

#include <cstdint>
#include <string>

#include "run_directory.hpp"
#include "selm/phases/iterate.hpp"

namespace selm {

/// The options with which selm_iter runs each phase: the run and the dry run take them from here.
class IteratePhases {
  public:
    /// Copies the options; what [run] holds is given to every phase.
    explicit IteratePhases(const IterateOptions& options);

    const IterateOptions& options() const { return options_; }
    const RunPaths& paths() const { return paths_; }

    bool is_offline(std::int64_t t) const { return t == 1 && options_.first_iteration == "dpo"; } ///< trains on the given pairs
    /// The model that iteration t starts from.
    std::string policy_before(std::int64_t t) const { return t == 1 ? options_.policy : paths_.policy(t - 1); }

    bool imports_train() const;
    bool imports_test() const; ///< false also where there are no held-out prompts
    std::string train_data() const;
    std::string test_data() const;

    ImportOptions import_train() const;
    ImportOptions import_test() const;
    GenerateOptions generate(std::int64_t t) const;
    RankOptions rank(std::int64_t t) const;
    LogProbOptions logprob(std::int64_t t) const;
    TrainOptions train(std::int64_t t) const;
    /// Answers of the policy after iteration t (0: the starting one) to the held-out prompts.
    GenerateOptions held_out_generate(std::int64_t t) const;
    RankOptions held_out_rank(std::int64_t t) const;

  private:
    ImportOptions import_of(const std::string& input, const std::string& rows, const std::string& output) const;

    IterateOptions options_;
    RunPaths paths_;
};

} // namespace selm
