#pragma once

#include <optional>
#include <string>
#include <vector>

#include "selm/phases/run_status.hpp"

namespace selm {

/// Jobs that RUN/slurm/jobs (submit_chain.sh), RUN/slurm/provenance.txt (every start of a job) and RUN/attempts (every start of the run)
/// name; no states yet.
std::vector<JobStatus> jobs_of_run(const std::string& run);

/// A program's end: what it wrote, and how it ended.
struct CommandResult {
    enum class End { exited, not_found, timed_out } end = End::exited;
    int exit_code = 0;   ///< where it exited
    std::string output;  ///< standard output
    std::string errors;  ///< standard error
};

/// Runs a program of PATH with nothing to read, and kills it with all it started after @p timeout_s.
CommandResult run_command(const std::vector<std::string>& words, double timeout_s);

} // namespace selm
