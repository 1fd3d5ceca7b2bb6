#include "selm/base/stop.hpp"

#include <csignal>
#include <initializer_list>

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
    for (const int signal_number : {SIGTERM, SIGUSR1, SIGINT})
        sigaction(signal_number, &action, nullptr);
    std::signal(SIGXFSZ, SIG_IGN); // a write beyond a file-size limit fails (exit code 74) instead of killing the rank
}

bool stop_signal_received() noexcept
{
    return stop_flag != 0;
}

} // namespace selm
