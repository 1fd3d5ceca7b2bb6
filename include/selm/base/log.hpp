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

/// Writes @p text (whole lines, with their ends) to stderr from any rank by one write(2), so that neither other ranks' lines nor
/// the launcher's own come between its parts. std::cerr writes each `<<` by itself.
void log_verbatim(const std::string& text);

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
