#include "selm/comm/stop_condition.hpp"

#include <cmath>
#include <utility>

#include "selm/base/attempt.hpp"
#include "selm/base/error.hpp"
#include "selm/base/log.hpp"
#include "selm/base/stop.hpp"
#include "selm/comm/agree.hpp"

namespace selm {

namespace {

constexpr double look_every_s = 0.5;

} // namespace

StopCondition::StopCondition(std::string stop_file, double walltime_margin_s, Communicator& comm)
    : stop_file_(std::move(stop_file)), margin_s_(walltime_margin_s), comm_(comm)
{
    if (margin_s_ <= 0)
        return;
    agree(comm_, "end of the job", [&] { // a launcher may not pass the environment on to ranks of other nodes
        if (!comm_.is_root())
            return;
        end_ = job_end_time();
        SELM_VALIDATE(end_.has_value(), ExitCode::usage,
                      "--walltime-margin " << margin_s_
                                           << " needs to know when the job ends, and neither SLURM_JOB_END_TIME nor "
                                              "SELM_JOB_END_TIME is set (nothing would stop the run in time). Set "
                                              "SELM_JOB_END_TIME to seconds since 1970, or leave the option out");
    });
}

bool StopCondition::here(double needed_s)
{
    if (stop_signal_received() || time_is_up(needed_s))
        return true;
    if (!comm_.is_root())
        return false;
    const auto now = Clock::now();
    if (looked_ && std::chrono::duration<double>(now - *looked_).count() < look_every_s)
        return false;
    looked_ = now;
    return told_to_stop(stop_file_);
}

bool StopCondition::agreed(double needed_s)
{
    const bool stop = stop_signal_received() || time_is_up(needed_s) || (comm_.is_root() && told_to_stop(stop_file_));
    return all_reduce_value(comm_, static_cast<std::int64_t>(stop), ReduceOp::max, "stop request") != 0;
}

bool StopCondition::time_is_up(double needed_s)
{
    if (!end_)
        return false;
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    const double left = static_cast<double>(*end_) - std::chrono::duration<double>(now).count();
    if (left >= margin_s_ + needed_s)
        return false;
    if (!std::exchange(told_, true))
        SELM_LOG(info, "the job ends in " << std::llround(left) << " s: stopping now, since --walltime-margin is "
                                          << margin_s_ << " s"
                                          << (needed_s > 0 ? cat(" and the next piece of work may take ",
                                                                 std::ceil(needed_s), " s")
                                                           : std::string()));
    return true;
}

} // namespace selm
