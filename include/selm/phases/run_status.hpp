#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace selm {

/// Clock and file times, replaceable by tests. Seconds since 1970.
struct FileTimes {
    std::function<double()> now;
    std::function<std::optional<double>(const std::string& path)> born;     ///< nullopt: no file, or its file system does not tell
    std::function<std::optional<double>(const std::string& path)> modified; ///< nullopt: no file
    static FileTimes real();
};

enum class PhaseState { pending, under_way, done };

/// Where one phase of one iteration stands. `iteration` 0 is the state before training.
struct PhaseStatus {
    std::int64_t iteration = 0;
    std::string phase;                        ///< import, generate, rank, logprob, train, test_generate, test_rank
    PhaseState state = PhaseState::pending;
    std::string unit = "rows";                ///< rows | steps
    std::optional<std::int64_t> done, total;  ///< in `unit`; several rankers: rows of each
    std::optional<double> rate;               ///< `unit` per second of the present attempt; of a finished phase, of its whole
    std::optional<double> tokens_per_s;       ///< as reported by a finished phase
    std::optional<double> seconds;            ///< as reported by a finished phase
    std::optional<double> seconds_left;       ///< at `rate`; nothing where nothing has come for long
    std::optional<double> silent_s;           ///< since the last row or step
    std::int64_t attempt = 0;                 ///< of the journal; 0: none
    std::optional<std::int64_t> checkpoint;   ///< step of the newest whole checkpoint
    std::optional<double> checkpoint_age_s;
    std::vector<std::string> problems;        ///< files that cannot be read, in words
};

/// A batch job that the run directory names, and what SLURM says of it.
struct JobStatus {
    std::string id;
    std::string what;                  ///< "train of iteration 2", or the job's name
    std::optional<double> started;     ///< newest start that its script recorded
    std::string state;                 ///< PENDING, RUNNING, ...; empty: not known
    std::string elapsed, left, reason; ///< as SLURM writes them
};

struct RunStatus {
    std::string run;
    std::int64_t iterations = 0;
    std::int64_t iterations_done = 0; ///< trained
    bool stop_file = false;           ///< RUN/STOP exists
    std::vector<PhaseStatus> phases;  ///< in the order in which they run
    std::vector<JobStatus> jobs;      ///< in the order of submission
    std::string slurm;                ///< why states of jobs are missing; empty: none are
};

/**
 * @brief Reads where a run directory stands, made by selm_iter or by slurm/submit_chain.sh, also while its files are being
 * written. Reads only, needs no MPI. Does not ask SLURM. A damaged file is a problem of its phase, not an error.
 * @throws Error bad_data: no such directory, or no run directory.
 */
RunStatus read_run_status(const std::string& run, const FileTimes& times = FileTimes::real());

/// Fills the states of the jobs by squeue and, for jobs that have left the queue, sacct: @p timeout_s for both together. What
/// does not answer is told in `slurm`, never an error.
void ask_slurm(RunStatus& status, double timeout_s = 5);

std::string status_table(const RunStatus& status); ///< for people
std::string status_json(const RunStatus& status);  ///< for programs (docs/FORMATS.md)

} // namespace selm
