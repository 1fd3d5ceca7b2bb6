#include "selm/data/work_queue.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>

#include <unistd.h>

#include "selm/comm/agree.hpp"

namespace selm {

namespace {

enum class Request : std::int32_t { item, stop, goodbye };

/// From rank 0: an answer to a request, or the one notice that each rank gets: hand-out was stopped, or is over.
struct Reply {
    std::int64_t is_notice = 0;
    std::int64_t has_item = 0;
    std::int64_t item = 0;
    std::int64_t stopped = 0;
    std::int64_t left = 0; ///< items that are not handed out; of an answer
};

constexpr unsigned shortest_sleep_us = 1000;
constexpr unsigned longest_sleep_us = 20000;

template<typename T>
void send_value(Communicator& comm, int destination, int tag, const T& value)
{
    comm.send(destination, tag, std::as_bytes(std::span<const T>(&value, 1)));
}

template<typename T>
T value_of(const Communicator::Message& message)
{
    SELM_EXPECT(message.data.size() == sizeof(T));
    T value;
    std::memcpy(&value, message.data.data(), sizeof(T));
    return value;
}

double seconds_since(std::chrono::steady_clock::time_point start)
{
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

} // namespace

WorkQueue::WorkQueue(Communicator& comm, std::vector<std::int64_t> items, Options options)
    : comm_(comm), items_(std::move(items)), options_(options)
{
    SELM_EXPECT(options_.prefetch >= 1 && options_.initial_per_rank >= 0 && options_.tag >= 0);
    const auto np = static_cast<std::size_t>(comm.size());
    notified_.assign(np, false);
    const std::size_t dealt = std::min(items_.size(), np * static_cast<std::size_t>(options_.initial_per_rank));
    for (auto i = static_cast<std::size_t>(comm.rank()); i < dealt; i += np)
        ready_.push_back(items_[i]);
    handed_out_ = dealt;
    left_ = static_cast<std::int64_t>(items_.size() - dealt);
}

std::optional<std::int64_t> WorkQueue::next_shared()
{
    if (stopped_ || handed_out_ == items_.size())
        return std::nullopt;
    return items_[handed_out_++];
}

void WorkQueue::answer_requests()
{
    while (const auto message = comm_.try_receive(options_.tag)) {
        switch (value_of<Request>(*message)) {
        case Request::item: {
            const auto item = next_shared();
            send_value(comm_, message->source, options_.tag + 1,
                       Reply{.has_item = item ? 1 : 0,
                             .item = item.value_or(0),
                             .stopped = stopped_ ? 1 : 0,
                             .left = static_cast<std::int64_t>(items_.size() - handed_out_)});
            break;
        }
        case Request::stop: stop(); break;
        case Request::goodbye:
            ++departed_;
            notify(message->source);
            break;
        }
    }
}

void WorkQueue::notify(int rank)
{
    if (notified_[static_cast<std::size_t>(rank)])
        return;
    notified_[static_cast<std::size_t>(rank)] = true;
    send_value(comm_, rank, options_.tag + 1, Reply{.is_notice = 1, .stopped = stopped_ ? 1 : 0});
}

void WorkQueue::take_replies()
{
    while (const auto message = comm_.try_receive(options_.tag + 1)) {
        const auto reply = value_of<Reply>(*message);
        stopped_ = stopped_ || reply.stopped != 0;
        if (reply.is_notice != 0) {
            noticed_ = true;
            continue;
        }
        --outstanding_;
        left_ = reply.left;
        if (reply.has_item != 0)
            ready_.push_back(reply.item);
        else
            exhausted_ = true;
    }
}

void WorkQueue::request(bool is_needed)
{
    // What a rank has asked for it keeps: of the last items none may wait behind another one while a rank is idle.
    const bool are_last = left_ <= comm_.size() * options_.prefetch;
    const std::int64_t wanted = are_last && !is_needed ? 0 : options_.prefetch;
    const bool may_ask = !exhausted_ && !stopped_ && !drained_;
    while (may_ask && static_cast<std::int64_t>(ready_.size()) + outstanding_ < wanted) {
        send_value(comm_, 0, options_.tag, Request::item);
        ++outstanding_;
    }
}

void WorkQueue::poll()
{
    if (comm_.size() == 1 || drained_)
        return;
    if (comm_.is_root()) {
        answer_requests();
    } else {
        take_replies();
        request(false);
    }
}

WorkQueue::Next WorkQueue::try_next()
{
    poll();
    if (stopped_) {
        ready_.clear();
        return {.state = State::finished};
    }
    if (ready_.empty() && comm_.is_root()) {
        if (const auto item = next_shared())
            ready_.push_back(*item);
        else
            exhausted_ = true;
    } else if (ready_.empty()) {
        request(true);
    }
    if (!ready_.empty()) {
        const std::int64_t item = ready_.front();
        ready_.pop_front();
        ++taken_;
        poll(); // asks for the one after it
        return {.state = State::item, .item = item};
    }
    return {.state = exhausted_ && outstanding_ == 0 ? State::finished : State::waiting};
}

std::optional<std::int64_t> WorkQueue::next()
{
    unsigned microseconds = shortest_sleep_us;
    for (;;) {
        const Next found = try_next();
        if (found.state == State::item)
            return found.item;
        if (found.state == State::finished)
            return std::nullopt;
        sleep_a_little(microseconds);
    }
}

void WorkQueue::sleep_a_little(unsigned& microseconds)
{
    const auto start = std::chrono::steady_clock::now();
    ::usleep(microseconds);
    microseconds = std::min(longest_sleep_us, microseconds * 2);
    idle_s_ += seconds_since(start);
}

void WorkQueue::stop()
{
    if (stopped_ || drained_)
        return;
    stopped_ = true;
    if (!comm_.is_root())
        send_value(comm_, 0, options_.tag, Request::stop);
    for (int rank = 1; comm_.is_root() && rank < comm_.size(); ++rank)
        notify(rank);
}

void WorkQueue::drain()
{
    if (drained_)
        return;
    // Whoever leaves with work in hand has given up: nobody else would do it.
    const bool work_left = !ready_.empty() || (!exhausted_ && (!comm_.is_root() || handed_out_ < items_.size()));
    if (work_left)
        stop();
    ready_.clear();
    unsigned microseconds = shortest_sleep_us;
    if (comm_.is_root()) {
        while (departed_ < comm_.size() - 1) {
            answer_requests();
            if (departed_ < comm_.size() - 1)
                sleep_a_little(microseconds);
        }
    } else {
        while (outstanding_ > 0) {
            take_replies();
            if (outstanding_ > 0)
                sleep_a_little(microseconds);
        }
        ready_.clear();
        send_value(comm_, 0, options_.tag, Request::goodbye);
        while (!noticed_) {
            take_replies();
            if (!noticed_)
                sleep_a_little(microseconds);
        }
    }
    drained_ = true;
}

std::int64_t initial_share(std::int64_t items, int ranks, std::int64_t slots)
{
    SELM_EXPECT(ranks > 0 && slots > 0);
    return std::min(slots, std::max<std::int64_t>(1, items * 3 / (std::int64_t{4} * ranks)));
}

bool run_queue(Communicator& comm, WorkQueue& queue, std::string_view label,
               const std::function<void(WorkQueue&)>& body)
{
    std::exception_ptr failure;
    try {
        body(queue);
    } catch (...) {
        failure = std::current_exception();
        queue.stop();
    }
    queue.drain();
    queue.wait_for_all(label);
    agree(comm, label, [&] {
        if (failure)
            std::rethrow_exception(failure);
    });
    return all_reduce_value(comm, std::int64_t{queue.stopped() ? 1 : 0}, ReduceOp::max, label) != 0;
}

void WorkQueue::wait_for_all(std::string_view label)
{
    const auto start = std::chrono::steady_clock::now();
    comm_.sleeping_barrier(label, {});
    idle_s_ += seconds_since(start);
}

} // namespace selm
