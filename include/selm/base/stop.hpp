#pragma once

namespace selm {

/// Installs handlers for SIGTERM, SIGUSR1 and SIGINT that only set a flag, and ignores SIGXFSZ (first thing in main).
void install_stop_handlers();

/// True once one of those signals came to this process. The loop decides collectively (comm/agree.hpp: stop_requested).
bool stop_signal_received() noexcept;

} // namespace selm
