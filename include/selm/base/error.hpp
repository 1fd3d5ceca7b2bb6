#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace selm {

/// Process exit codes (sysexits.h values where one exists). Scripts rely on them.
enum class ExitCode : int {
    done = 0,
    usage = 64,        ///< bad command line
    bad_data = 65,     ///< missing, unreadable or bad data, or non-finite numbers
    internal = 70,     ///< a bug, or a collective timed out
    io = 74,           ///< a write or a read under way failed (disk full)
    stopped = 75,      ///< stopped early, state saved: run me again
    configuration = 78 ///< bad configuration file, missing model, feature not built
};

/// Concatenates streamable values into a string: `cat("row ", i, " is empty")`.
template<typename... Parts>
std::string cat(const Parts&... parts)
{
    std::ostringstream out;
    (out << ... << parts);
    return std::move(out).str();
}

/**
 * @brief An expected failure: one message "problem (why it matters) what to do" and the exit code it ends in.
 *
 * Libraries throw it; only apps/ print and exit. `agree()` (comm/agree.hpp) turns one rank's Error into the same
 * Error on every rank.
 */
class Error : public std::runtime_error {
  public:
    Error(ExitCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
    ExitCode code() const noexcept { return code_; }

  private:
    ExitCode code_;
};

inline Error usage_error(const std::string& message) { return {ExitCode::usage, message}; }
inline Error data_error(const std::string& message) { return {ExitCode::bad_data, message}; }
inline Error io_error(const std::string& message) { return {ExitCode::io, message}; }
inline Error config_error(const std::string& message) { return {ExitCode::configuration, message}; }
inline Error internal_error(const std::string& message) { return {ExitCode::internal, message}; }

/// Runs @p body; an Error that leaves it gets "@p context: " in front of its message.
template<typename Body>
decltype(auto) with_context(const std::string& context, Body&& body)
{
    try {
        return std::forward<Body>(body)();
    } catch (const Error& error) {
        throw Error(error.code(), context + ": " + error.what());
    }
}

[[noreturn]] void contract_failed(const char* kind, const char* condition, const char* file, int line);

} // namespace selm

/// User or environment error, always on: SELM_VALIDATE(n > 0, ExitCode::usage, "n is " << n << " (...). Pass --n 1").
#define SELM_VALIDATE(condition, code, stream)                                                                         \
    do {                                                                                                               \
        if (!(condition)) [[unlikely]] {                                                                               \
            std::ostringstream selm_validate_out_;                                                                     \
            selm_validate_out_ << stream;                                                                              \
            throw ::selm::Error((code), selm_validate_out_.str());                                                     \
        }                                                                                                              \
    } while (false)

/// Programmer's contract; throws an internal Error naming the condition and place.
#define SELM_EXPECT(condition)                                                                                         \
    do {                                                                                                               \
        if (!(condition)) [[unlikely]]                                                                                 \
            ::selm::contract_failed("precondition", #condition, __FILE__, __LINE__);                                   \
    } while (false)
#define SELM_ENSURE(condition)                                                                                         \
    do {                                                                                                               \
        if (!(condition)) [[unlikely]]                                                                                 \
            ::selm::contract_failed("postcondition", #condition, __FILE__, __LINE__);                                  \
    } while (false)
