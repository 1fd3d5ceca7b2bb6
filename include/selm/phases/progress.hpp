#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "selm/comm/communicator.hpp"

namespace selm {

/**
 * @brief How far a phase with dynamically handed out rows is, over all ranks, on rank 0's stderr: rows, tokens per
 * second and the time left; one line rewritten in place on a terminal, else (and with mode "on") a plain line every 10 s.
 *
 * The other ranks send their counts now and then (buffered, at most one message per second). Only finish() is
 * collective.
 */
class ProgressReporter {
  public:
    struct Options {
        std::string mode = "auto";    ///< auto | on | off
        std::string label;            ///< "generate"
        std::int64_t total = 0;       ///< rows to be done, those done by earlier runs included
        std::int64_t done_before = 0; ///< by earlier runs
        int tag = 7;                  ///< point-to-point tag used
    };
    ProgressReporter(Communicator& comm, Options options);

    /// This rank's counts since the start.
    void update(std::int64_t rows, std::int64_t tokens);
    /// Sends or takes in counts and draws when it is time. Not collective.
    void poll() { exchange(false); }
    /// Sends this rank's final counts now. Not collective.
    void flush() { exchange(true); }
    /// Rank 0: rows done over all ranks as far as it has heard, earlier runs included. Exact once all have flushed.
    std::int64_t rows_done() const;
    /// Takes in what is under way and ends the line. Collective.
    void finish();

  private:
    struct Counts {
        std::int64_t rows = 0, tokens = 0;
    };
    using Clock = std::chrono::steady_clock;
    void exchange(bool now);
    void receive();
    void draw(bool last);
    std::string line(double seconds) const;

    Communicator& comm_;
    Options options_;
    bool in_place_ = false, silent_ = false;
    double send_every_s_ = 1;
    Counts mine_, sent_, all_; // all_: rank 0, of the others
    std::int64_t messages_ = 0;
    Clock::time_point start_, last_sent_, last_drawn_;
    std::size_t drawn_width_ = 0;
};

} // namespace selm
