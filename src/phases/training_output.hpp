#pragma once

#include <cstdint>
#include <fstream>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "selm/comm/communicator.hpp"
#include "selm/phases/train.hpp"
#include "selm/shard/checkpoint.hpp"

namespace selm {

/// Written last into a training output: the run that made it and its report. With it the output is complete.
inline constexpr const char* training_record_name = "training.json";

/**
 * @brief The output directory of selm_train: metrics.jsonl and checkpoints/ while it runs, the model files at the end.
 *
 * Methods are collective unless said; rank 0 does the work.
 */
class TrainingOutput {
  public:
    TrainingOutput(std::string directory, Communicator& comm);

    std::string checkpoints() const { return directory_ + "/checkpoints"; } ///< not collective

    /// The record of a finished run, or nothing. @throws Error bad_data when another run made the directory's content.
    std::optional<nlohmann::ordered_json> finished(const CheckpointBinding& binding);
    /// Makes the directory and claims it for this attempt; drops what a killed run left half written.
    void claim();
    /// Removes metrics and checkpoints (--resume never).
    void start_anew();

    /// Keeps the lines of metrics.jsonl up to `step` and returns them, the same on every rank. The file is a new one, which only
    /// this attempt appends to: what an older one still writes goes to a file that has lost its name.
    std::vector<nlohmann::ordered_json> cut_metrics(std::int64_t step);
    void append_metrics(const nlohmann::ordered_json& line);

    /// Puts the files that `write_files(directory)` (on rank 0) and `write_weights(directory)` (collective) make into the
    /// output, config.json last, then the record. @throws Error on every rank; what was written is removed again.
    void publish(const std::function<void(const std::string&)>& write_files,
                 const std::function<void(const std::string&)>& write_weights, nlohmann::ordered_json record,
                 const CheckpointBinding& binding);

  private:
    std::string metrics_path() const { return directory_ + "/metrics.jsonl"; }
    void remove_leftovers() const;
    void move_model(const std::string& partial) const;
    std::string directory_;
    std::ofstream metrics_; ///< rank 0, after cut_metrics()
    Communicator& comm_;
};

nlohmann::ordered_json report_to_json(const TrainReport& report);
TrainReport report_from_json(const nlohmann::ordered_json& record);

} // namespace selm
