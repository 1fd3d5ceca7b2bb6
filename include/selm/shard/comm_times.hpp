#pragma once

#include <chrono>

namespace selm {

/// Seconds of communication: `exposed` is what a rank waited, `in_flight` from the start of each operation to when it was
/// seen to be complete, added up (operations may overlap). The difference was hidden behind computation.
struct CommTimes {
    double exposed = 0;
    double in_flight = 0;
    double hidden() const { return in_flight > exposed ? in_flight - exposed : 0; }
    CommTimes& operator+=(const CommTimes& other)
    {
        exposed += other.exposed;
        in_flight += other.in_flight;
        return *this;
    }
    CommTimes operator-(const CommTimes& other) const
    {
        return {exposed - other.exposed, in_flight - other.in_flight};
    }
};

/// Adds the life time of the object to a counter.
class Stopwatch {
  public:
    using Clock = std::chrono::steady_clock;
    explicit Stopwatch(double& seconds) : seconds_(seconds) {}
    ~Stopwatch() { seconds_ += seconds_since(start_); }
    Stopwatch(const Stopwatch&) = delete;
    Stopwatch& operator=(const Stopwatch&) = delete;
    static double seconds_since(Clock::time_point start)
    {
        return std::chrono::duration<double>(Clock::now() - start).count();
    }

  private:
    double& seconds_;
    Clock::time_point start_ = Clock::now();
};

} // namespace selm
