#include "selm/base/stop.hpp"

#include <charconv>
#include <csignal>
#include <cstdlib>
#include <initializer_list>
#include <string_view>

#include "selm/base/error.hpp"

namespace selm {

namespace {

volatile std::sig_atomic_t stop_flag = 0;

extern "C" void on_stop_signal(int)
{
    stop_flag = 1;
}

} // namespace

void install_stop_handlers()
{
    struct sigaction action {};
    action.sa_handler = on_stop_signal;
    sigemptyset(&action.sa_mask);
    action.sa_flags = SA_RESTART; // a checkpoint's write must not fail with EINTR
    sigset_t signals;
    sigemptyset(&signals);
    for (const int signal_number : {SIGTERM, SIGUSR1, SIGINT}) {
        sigaction(signal_number, &action, nullptr);
        sigaddset(&signals, signal_number);
    }
    // Who starts a program may block them, so that one that comes while it is being loaded waits for this moment.
    sigprocmask(SIG_UNBLOCK, &signals, nullptr);
    std::signal(SIGXFSZ, SIG_IGN); // a write beyond a file-size limit fails (exit code 74) instead of killing the rank
}

bool stop_signal_received() noexcept
{
    return stop_flag != 0;
}

std::optional<std::int64_t> job_end_time()
{
    for (const char* const name : {"SLURM_JOB_END_TIME", "SELM_JOB_END_TIME"}) {
        const char* const value = std::getenv(name);
        if (value == nullptr || *value == '\0')
            continue;
        const std::string_view text(value);
        std::int64_t seconds = 0;
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), seconds);
        SELM_VALIDATE(error == std::errc() && end == text.data() + text.size() && seconds >= 0, ExitCode::usage,
                      name << " is '" << text << "', which is no time in seconds since 1970 (the end of the job is not "
                           << "known). Set it right, or leave out --walltime-margin");
        if (seconds > 0)
            return seconds;
    }
    return std::nullopt;
}

} // namespace selm
