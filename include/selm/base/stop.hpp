#pragma once

#include <cstdint>
#include <optional>

namespace selm {

/// Installs handlers for SIGTERM, SIGUSR1 and SIGINT that only set a flag, unblocks these signals, and ignores SIGXFSZ (first
/// thing in main, or before).
void install_stop_handlers();

/// True once one of those signals came to this process. Loops decide collectively (comm/stop_condition.hpp).
bool stop_signal_received() noexcept;

/// When the batch job ends, in seconds since 1970: SLURM_JOB_END_TIME (SLURM sets it since 23.02), else
/// SELM_JOB_END_TIME (slurm/lib/job.sh asks SLURM for it). Nothing when neither is set (or says 0).
/// @throws Error usage when the one that counts is not a whole number of seconds.
std::optional<std::int64_t> job_end_time();

} // namespace selm
