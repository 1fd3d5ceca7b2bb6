#pragma once

#include <sstream>
#include <string>

namespace selm {

enum class LogLevel { debug, info, warning, error };

/// Tells the logger which rank this process is; called once by the session at start. Not collective.
void set_log_rank(int rank, int size);

/// Writes one line to stderr on rank 0 only ("selm: message"; warnings as "selm: warning: message"). Debug lines appear
/// with SELM_LOG=debug in the environment.
void log_root(LogLevel level, const std::string& message);

/// Writes one line to stderr from any rank, prefixed "[rank r/n]".
void log_local(LogLevel level, const std::string& message);

} // namespace selm

#define SELM_LOG(level, stream)                                                                                        \
    do {                                                                                                               \
        std::ostringstream selm_log_out_;                                                                              \
        selm_log_out_ << stream;                                                                                       \
        ::selm::log_root(::selm::LogLevel::level, selm_log_out_.str());                                                \
    } while (false)
#define SELM_LOG_LOCAL(level, stream)                                                                                  \
    do {                                                                                                               \
        std::ostringstream selm_log_out_;                                                                              \
        selm_log_out_ << stream;                                                                                       \
        ::selm::log_local(::selm::LogLevel::level, selm_log_out_.str());                                               \
    } while (false)
