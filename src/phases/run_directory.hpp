#pragma once

#include <string>

#include <nlohmann/json.hpp>

#include "selm/comm/communicator.hpp"

namespace selm {

/// Names inside a run directory of selm_iter (docs/FORMATS.md).
struct RunPaths {
    explicit RunPaths(std::string run) : run_(std::move(run)) {}
    std::string recipe() const { return run_ + "/recipe.cfg"; }
    std::string manifest() const { return run_ + "/manifest.json"; }
    std::string train_data() const { return run_ + "/prefs.h5"; }
    std::string test_data() const { return run_ + "/test.h5"; }
    std::string stop_file() const { return run_ + "/STOP"; }
    std::string iteration(std::int64_t t) const { return run_ + "/iter" + std::to_string(t); }
    std::string rows(std::int64_t t) const { return iteration(t) + "/iter.h5"; }
    std::string test_rows(std::int64_t t) const { return iteration(t) + "/test.h5"; }
    std::string policy(std::int64_t t) const { return iteration(t) + "/policy"; }
    std::string log(std::int64_t t) const { return iteration(t) + "/log"; }

  private:
    std::string run_;
};

/**
 * @brief manifest.json: what is finished, and the numbers each phase reported. Every rank holds the same content; rank 0
 * writes it, atomically, after each phase. The files themselves remain the truth: a phase that is not recorded is run
 * again and finds its output complete.
 */
class RunManifest {
  public:
    /// Reads RUN/manifest.json (an empty one where there is none). Collective over comm.
    RunManifest(const RunPaths& paths, Communicator& comm);

    /// The record of a finished phase, or nullptr. `iteration` 0 is the state before training.
    const nlohmann::json* phase(std::int64_t iteration, const std::string& name) const;
    /// Records a finished phase and publishes the file. Collective over comm.
    void record(std::int64_t iteration, const std::string& name, const nlohmann::json& report, Communicator& comm);
    const nlohmann::json& json() const { return json_; }

  private:
    RunPaths paths_;
    nlohmann::json json_;
};

/// Creates RUN, stores the recipe on the first call, afterwards refuses another recipe naming each key that differs; then claims
/// RUN for this attempt. @throws Error configuration. Collective over comm.
void claim_run_directory(const RunPaths& paths, const std::string& run, const std::string& recipe_text, Communicator& comm);

/// The lines by which two canonical recipes ("section.key = value" lines) differ, in words; empty when equal.
std::string recipe_difference(const std::string& stored, const std::string& given);

/// What the user reads of iteration t, from the manifest alone (held-out scores need iteration t-1 too).
std::string block_text(const nlohmann::json& manifest, std::int64_t t);

} // namespace selm
