#pragma once

#include <iomanip>
#include <sstream>
#include <string>

#include "selm/base/error.hpp"
#include "selm/phases/generate.hpp"

namespace selm::apps {

inline ExitCode exit_code(Outcome outcome)
{
    return outcome == Outcome::stopped ? ExitCode::stopped : ExitCode::done;
}

/// The first line of a report.
inline std::string outcome_text(Outcome outcome, const std::string& output)
{
    switch (outcome) {
    case Outcome::done: return output + " is complete";
    case Outcome::already_complete: return output + " was complete already: nothing to do";
    case Outcome::stopped: return "stopped, everything so far is saved: run the same command again to go on";
    }
    return output;
}

/// A number with so many digits after the point.
inline std::string fixed(double value, int digits)
{
    std::ostringstream out;
    out << std::fixed << std::setprecision(digits) << value;
    return out.str();
}

inline std::string percent(double part, double whole)
{
    return whole > 0 ? fixed(100 * part / whole, 1) + " %" : "-";
}

/// "tokens per second" of a phase; "-" where nothing was timed.
inline std::string per_second(double count, double seconds)
{
    return seconds > 0 ? fixed(count / seconds, 1) : "-";
}

} // namespace selm::apps
