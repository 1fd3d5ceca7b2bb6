#include "selm/phases/progress.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <span>
#include <thread>
#include <utility>

#include <unistd.h>

#include "selm/base/error.hpp"
#include "selm/base/log.hpp"

namespace selm {
namespace {

constexpr double redraw_every_s = 0.5, plain_every_s = 10;
constexpr int messages_per_second = 200; // that rank 0 is asked to take in

double seconds_between(std::chrono::steady_clock::time_point from, std::chrono::steady_clock::time_point to)
{
    return std::chrono::duration<double>(to - from).count();
}

std::string duration_text(double seconds)
{
    const auto total = static_cast<long long>(seconds + 0.5);
    std::array<char, 32> buffer{};
    if (total >= 3600)
        std::snprintf(buffer.data(), buffer.size(), "%lld:%02lld:%02lld", total / 3600, total / 60 % 60, total % 60);
    else
        std::snprintf(buffer.data(), buffer.size(), "%lld:%02lld", total / 60, total % 60);
    return buffer.data();
}

} // namespace

ProgressReporter::ProgressReporter(Communicator& comm, Options options)
    : comm_(comm), options_(std::move(options)),
      send_every_s_(std::max(1.0, static_cast<double>(comm.size()) / messages_per_second)), start_(Clock::now()),
      last_sent_(start_), last_drawn_(start_)
{
    silent_ = options_.mode == "off" || !comm.is_root();
    in_place_ = options_.mode == "auto" && ::isatty(STDERR_FILENO) == 1;
}

void ProgressReporter::update(std::int64_t rows, std::int64_t tokens)
{
    mine_ = {rows, tokens};
}

void ProgressReporter::exchange(bool now)
{
    if (comm_.is_root()) {
        receive();
        if (!silent_ && seconds_between(last_drawn_, Clock::now()) >= (in_place_ ? redraw_every_s : plain_every_s))
            draw(false);
        return;
    }
    if (mine_.rows == sent_.rows && mine_.tokens == sent_.tokens)
        return;
    if (!now && seconds_between(last_sent_, Clock::now()) < send_every_s_)
        return;
    const Counts change{mine_.rows - sent_.rows, mine_.tokens - sent_.tokens};
    comm_.send(0, options_.tag, std::as_bytes(std::span<const Counts>(&change, 1)));
    ++messages_;
    sent_ = mine_;
    last_sent_ = Clock::now();
}

void ProgressReporter::receive()
{
    while (const auto message = comm_.try_receive(options_.tag)) {
        SELM_EXPECT(message->data.size() == sizeof(Counts));
        Counts change;
        std::memcpy(&change, message->data.data(), sizeof change);
        all_.rows += change.rows;
        all_.tokens += change.tokens;
        ++messages_;
    }
}

std::int64_t ProgressReporter::rows_done() const
{
    return options_.done_before + mine_.rows + all_.rows;
}

void ProgressReporter::finish()
{
    exchange(true);
    const auto sent =
        all_reduce_value(comm_, comm_.is_root() ? std::int64_t{0} : messages_, ReduceOp::sum, "progress messages");
    while (comm_.is_root() && messages_ < sent) {
        receive();
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    if (!silent_)
        draw(true);
}

std::string ProgressReporter::line(double seconds) const
{
    const std::int64_t done = rows_done();
    const auto new_rows = static_cast<double>(done - options_.done_before);
    std::string text = cat(options_.label, ": ", done, "/", options_.total, " rows");
    if (seconds > 0)
        text += cat(", ", static_cast<std::int64_t>(static_cast<double>(mine_.tokens + all_.tokens) / seconds + 0.5),
                    " tokens/s");
    text += cat(", ", duration_text(seconds));
    if (new_rows > 0 && done < options_.total)
        text += cat(", ", duration_text(seconds * static_cast<double>(options_.total - done) / new_rows), " left");
    return text;
}

void ProgressReporter::draw(bool last)
{
    last_drawn_ = Clock::now();
    std::string text = line(seconds_between(start_, last_drawn_));
    if (!in_place_) {
        SELM_LOG(info, text);
        return;
    }
    const std::size_t width = text.size();
    text.append(drawn_width_ > width ? drawn_width_ - width : 0, ' ');
    drawn_width_ = width;
    const std::string out = cat("\r", text, last ? "\n" : "");
    [[maybe_unused]] const auto written = ::write(STDERR_FILENO, out.data(), out.size());
}

} // namespace selm
