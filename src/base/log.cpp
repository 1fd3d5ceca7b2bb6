#include "selm/base/log.hpp"

#include <cerrno>
#include <cstdlib>
#include <string_view>

#include <unistd.h>

namespace selm {

namespace {

struct LogRank {
    int rank = 0;
    int size = 1;
};

LogRank& log_rank()
{
    static LogRank value;
    return value;
}

bool debug_enabled()
{
    static const bool enabled = [] {
        const char* text = std::getenv("SELM_LOG");
        return text != nullptr && std::string_view(text) == "debug";
    }();
    return enabled;
}

const char* level_prefix(LogLevel level)
{
    switch (level) {
    case LogLevel::debug: return "debug: ";
    case LogLevel::info: return "";
    case LogLevel::warning: return "warning: ";
    case LogLevel::error: return "error: ";
    }
    return "";
}

} // namespace

void log_verbatim(const std::string& text)
{
    std::size_t done = 0;
    while (done < text.size()) {
        const ssize_t written = ::write(STDERR_FILENO, text.data() + done, text.size() - done);
        if (written < 0 && errno == EINTR)
            continue;
        if (written <= 0)
            return; // nowhere left to tell it
        done += static_cast<std::size_t>(written);
    }
}

void set_log_rank(int rank, int size)
{
    log_rank() = {rank, size};
}

void log_root(LogLevel level, const std::string& message)
{
    if (log_rank().rank != 0 || (level == LogLevel::debug && !debug_enabled()))
        return;
    log_verbatim(std::string("selm: ") + level_prefix(level) + message + "\n");
}

void log_local(LogLevel level, const std::string& message)
{
    if (level == LogLevel::debug && !debug_enabled())
        return;
    log_verbatim("[rank " + std::to_string(log_rank().rank) + "/" + std::to_string(log_rank().size) + "] selm: " +
                 level_prefix(level) + message + "\n");
}

} // namespace selm
