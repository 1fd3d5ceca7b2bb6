#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <string_view>
#include <vector>

#include "selm/comm/communicator.hpp"

namespace selm {

/**
 * @brief Dynamic hand-out of work items over ranks. Rank 0 coordinates and works too: it answers requests whenever it calls
 * poll() or try_next(), so call one of them between steps. The other ranks ask ahead of need, but for the last items, which
 * go to whoever is out of work first. One rank: no messages.
 *
 * Every rank starts with a fixed share without any message: item r, r + np, r + 2 np, ... for `initial_per_rank` rounds. Who
 * gets what depends on timing; results must not. No collectives inside: ranks never wait for each other before drain().
 */
class WorkQueue {
  public:
    struct Options {
        int tag = 1;                       ///< point-to-point tags tag and tag + 1 of the communicator are used
        std::int64_t initial_per_rank = 1; ///< items each rank starts with (see initial_share)
        std::int64_t prefetch = 1;         ///< items asked for ahead of need
    };
    enum class State { item, waiting, finished };
    struct Next {
        State state = State::waiting;
        std::int64_t item = 0; ///< valid when state == item
    };

    /// @param items in hand-out order (longest first), the same on every rank. Not collective, no messages.
    WorkQueue(Communicator& comm, std::vector<std::int64_t> items, Options options);

    /// An item for this rank; or waiting: none has come yet, work on or sleep; or finished: there will be none. Not collective.
    Next try_next();
    /// As try_next, but sleeps (1 to 20 ms at a time) while waiting; nullopt: finished.
    std::optional<std::int64_t> next();
    /// Answers what has come (rank 0) or takes in what has come (others). Cheap. Not collective.
    void poll();

    /// No further items are handed out to any rank (a stop request, a failure of this rank). The others see it in stopped()
    /// as soon as they poll, whether they ask for work or not. Not collective.
    void stop();
    /// True when this rank knows that somebody called stop(); rank 0 is certain after drain(), run_queue() tells all.
    bool stopped() const noexcept { return stopped_; }

    /**
     * @brief Ends the hand-out: every rank calls it once, also after an error. Ranks other than 0 leave when rank 0 has answered
     * their last message, rank 0 when all have come; sleeps while waiting. Afterwards no message is left. A rank that calls it
     * before try_next() said finished has given up: that counts as stop().
     */
    void drain();
    /// Sleeps until all ranks have drained. Collective.
    void wait_for_all(std::string_view label);

    std::int64_t taken() const noexcept { return taken_; } ///< items that this rank got from try_next
    double idle_s() const noexcept { return idle_s_; }     ///< time spent waiting in next(), drain() and wait_for_all()

  private:
    void answer_requests();
    void notify(int rank);
    void take_replies();
    void request(bool is_needed);
    void sleep_a_little(unsigned& microseconds);
    std::optional<std::int64_t> next_shared();

    Communicator& comm_;
    std::vector<std::int64_t> items_;
    Options options_;
    std::size_t handed_out_ = 0;      ///< rank 0: first item not handed out yet
    int departed_ = 0;                ///< rank 0: ranks that have left
    std::deque<std::int64_t> ready_;
    std::int64_t outstanding_ = 0;    ///< requests sent and not answered
    std::int64_t left_ = 0;           ///< other ranks: items not handed out, when rank 0 last said so
    std::vector<bool> notified_;      ///< rank 0: who got the notice that hand-out is over
    bool noticed_ = false;            ///< other ranks: it came
    bool exhausted_ = false, stopped_ = false, drained_ = false;
    std::int64_t taken_ = 0;
    double idle_s_ = 0;
};

/// Items to start each rank with: as many as it works on at a time (slots), at most three quarters of an even share.
std::int64_t initial_share(std::int64_t items, int ranks, std::int64_t slots);

/**
 * @brief Runs @p body (the loop over queue.try_next()), then drains, then agrees: when body throws on one rank, hand-out
 * stops, the others finish what they have in hand, and every rank throws that error. Collective.
 * @returns true on every rank when hand-out was stopped before the last item.
 */
bool run_queue(Communicator& comm, WorkQueue& queue, std::string_view label, const std::function<void(WorkQueue&)>& body);

} // namespace selm
