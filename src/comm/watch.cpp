#include "watch.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <thread>

#include "late_ranks.hpp"
#include "mpi_call.hpp"
#include "pending_operation.hpp"
#include "selm/base/error.hpp"
#include "selm/base/log.hpp"
#include "selm/comm/watchdog.hpp"

namespace selm::comm {

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

constexpr int query_tag = 1;
constexpr int answer_tag = 2;
constexpr auto time_between_looks = std::chrono::milliseconds(20);
constexpr std::size_t label_bytes = 112;

struct Query {
    std::uint64_t serial, group, number;
    char label[label_bytes];
};

struct Answer {
    std::uint64_t serial, number;
    std::int32_t waiting, arrived, same_group, investigates, has_error;
    char label[label_bytes];
};

void copy_label(char (&to)[label_bytes], std::string_view label)
{
    const std::size_t length = std::min(label.size(), label_bytes - 1);
    std::copy_n(label.data(), length, to);
    to[length] = '\0';
}

/// Questions about one collective that are on their way.
struct Investigation {
    std::uint64_t serial;
    Clock::time_point start;
    std::map<int, Answer> answers; ///< by world rank
};

struct PendingMessage {
    MPI_Request request = MPI_REQUEST_NULL;
    std::unique_ptr<std::byte[]> data;
};

/// The watchdog of this process. Its communicator is its own: nobody else's messages meet its own.
struct Watch {
    MPI_Comm comm = MPI_COMM_NULL;
    int rank = 0;
    int size = 1;
    std::vector<std::string> hosts;
    std::map<std::uint64_t, const CallCounter*> counters;
    const Call* current = nullptr; ///< what this rank waits in
    Clock::time_point last_look{};
    Clock::time_point quiet_until{}; ///< a lower rank investigates: this one leaves it to it
    std::optional<Investigation> investigation;
    std::uint64_t serials = 0;
    std::uint64_t inquiries = 0;
    bool has_error = false; ///< this rank will tell it and end all ranks
    std::list<PendingMessage> messages;
};

Watch& watch()
{
    static Watch instance;
    return instance;
}

double& timeout()
{
    static double seconds = 0;
    return seconds;
}

Seconds grace()
{
    return Seconds(std::clamp(timeout() / 10, 0.5, 5.0));
}

template<typename T>
void post(int destination, int tag, const T& message)
{
    Watch& w = watch();
    for (auto sent = w.messages.begin(); sent != w.messages.end();) {
        int done = 0;
        SELM_MPI("watchdog", MPI_Test(&sent->request, &done, MPI_STATUS_IGNORE));
        sent = done != 0 ? w.messages.erase(sent) : std::next(sent);
    }
    PendingMessage& own = w.messages.emplace_back();
    own.data = std::make_unique<std::byte[]>(sizeof(T));
    std::memcpy(own.data.get(), &message, sizeof(T));
    SELM_MPI("watchdog", MPI_Isend(own.data.get(), static_cast<int>(sizeof(T)), MPI_BYTE, destination, tag, w.comm, &own.request));
}

template<typename T>
std::optional<std::pair<int, T>> receive(int tag)
{
    Watch& w = watch();
    int found = 0;
    MPI_Status status;
    SELM_MPI("watchdog", MPI_Iprobe(MPI_ANY_SOURCE, tag, w.comm, &found, &status));
    if (found == 0)
        return std::nullopt;
    std::pair<int, T> message{status.MPI_SOURCE, {}};
    SELM_MPI("watchdog", MPI_Recv(&message.second, static_cast<int>(sizeof(T)), MPI_BYTE, status.MPI_SOURCE, tag, w.comm,
                                  MPI_STATUS_IGNORE));
    return message;
}

/// Somebody else speaks and aborts all; that takes its time on a busy machine or with many ranks.
void be_quiet(Clock::time_point now)
{
    watch().investigation.reset();
    watch().quiet_until = now + std::chrono::seconds(30);
}

/// One rank speaks: of those that ask at the same time, the lowest.
void leave_it_to_lower(int other, Clock::time_point now)
{
    if (other < watch().rank)
        be_quiet(now);
}

void answer(int asking, const Query& query)
{
    const Watch& w = watch();
    Answer reply{};
    reply.serial = query.serial;
    reply.investigates = w.investigation ? 1 : 0;
    reply.has_error = w.has_error ? 1 : 0;
    const auto counter = w.counters.find(query.group);
    bool arrived = query.number > 0 && counter != w.counters.end() && counter->second->started() >= query.number;
    if (w.current != nullptr) {
        reply.waiting = 1;
        reply.number = w.current->number;
        reply.same_group = w.current->group == query.group ? 1 : 0;
        copy_label(reply.label, w.current->label);
        if (query.number == 0)
            arrived = reply.same_group != 0 && reply.number == 0 && std::strcmp(reply.label, query.label) == 0;
    }
    reply.arrived = arrived ? 1 : 0;
    post(asking, answer_tag, reply);
}

void look_at_messages(Clock::time_point now)
{
    Watch& w = watch();
    w.last_look = now;
    while (const auto query = receive<Query>(query_tag)) {
        ++w.inquiries;
        answer(query->first, query->second);
        leave_it_to_lower(query->first, now);
    }
    while (const auto reply = receive<Answer>(answer_tag)) {
        if (w.investigation && reply->second.serial == w.investigation->serial)
            w.investigation->answers[reply->first] = reply->second;
        if (reply->second.investigates != 0)
            leave_it_to_lower(reply->first, now);
        if (reply->second.has_error != 0)
            be_quiet(now);
    }
}

std::vector<int> world_ranks(MPI_Comm comm)
{
    MPI_Group group = MPI_GROUP_NULL;
    MPI_Group world = MPI_GROUP_NULL;
    int size = 0;
    SELM_MPI("watchdog", MPI_Comm_group(comm, &group));
    SELM_MPI("watchdog", MPI_Comm_group(watch().comm, &world));
    SELM_MPI("watchdog", MPI_Group_size(group, &size));
    std::vector<int> own(static_cast<std::size_t>(size)), translated(own.size());
    for (int r = 0; r < size; ++r)
        own[static_cast<std::size_t>(r)] = r;
    SELM_MPI("watchdog", MPI_Group_translate_ranks(group, size, own.data(), world, translated.data()));
    MPI_Group_free(&group);
    MPI_Group_free(&world);
    return translated;
}

[[noreturn]] void abort_all(const std::string& message)
{
    const Watch& w = watch();
    log_verbatim(cat("[rank ", w.rank, "/", w.size, "] ", ::program_invocation_short_name, ": error: ", message, " [exit code ",
                     static_cast<int>(ExitCode::internal), "]\n"));
    MPI_Abort(MPI_COMM_WORLD, static_cast<int>(ExitCode::internal));
    std::abort();
}

/// A wait that others can ask about, and that asks when it lasts too long.
class WatchedWait {
  public:
    WatchedWait(const Call& call, bool patient) : call_(call), patient_(patient), outer_(watch().current), start_(Clock::now())
    {
        watch().current = &call_;
    }
    ~WatchedWait()
    {
        watch().current = outer_;
        watch().investigation.reset();
    }
    WatchedWait(const WatchedWait&) = delete;
    WatchedWait& operator=(const WatchedWait&) = delete;

    void look(Clock::time_point now)
    {
        Watch& w = watch();
        if (w.comm == MPI_COMM_NULL || now - w.last_look < time_between_looks)
            return;
        look_at_messages(now);
        if (timeout() <= 0)
            return;
        if (!w.investigation && now >= w.quiet_until && now - start_ > Seconds(timeout()) + head_start_of_lower())
            investigate(now);
        else if (w.investigation && now - w.investigation->start > grace())
            conclude(now);
    }

  private:
    /// Ranks that began to wait together ask one after the other, so that the lowest is first.
    static Seconds head_start_of_lower() { return Seconds(0.03 * std::min(watch().rank, 30)); }

    void investigate(Clock::time_point now)
    {
        Watch& w = watch();
        w.investigation = Investigation{++w.serials, now, {}};
        Query query{w.serials, call_.group, call_.number, {}};
        copy_label(query.label, call_.label);
        for (const int rank : world_ranks(call_.comm))
            if (rank != w.rank)
                post(rank, query_tag, query);
    }

    void conclude(Clock::time_point now)
    {
        const std::vector<RankState> others = states();
        watch().investigation.reset();
        const Verdict verdict = judge(others);
        const bool just_arrived = verdict == Verdict::all_arrived && !all_had_arrived_;
        if (just_arrived || (verdict == Verdict::alive && patient_)) {
            all_had_arrived_ = verdict == Verdict::all_arrived;
            start_ = now; // the last rank may have come a moment ago: now it is the data's turn
            return;
        }
        abort_all(late_message(call_.label, call_.number, timeout(), others));
    }

    std::vector<RankState> states() const
    {
        const Watch& w = watch();
        std::vector<RankState> result;
        for (const int rank : world_ranks(call_.comm)) {
            if (rank == w.rank)
                continue;
            RankState state;
            state.rank = rank;
            state.host = w.hosts[static_cast<std::size_t>(rank)];
            if (const auto found = w.investigation->answers.find(rank); found != w.investigation->answers.end()) {
                const Answer& reply = found->second;
                state.kind = reply.waiting != 0 ? RankState::Kind::waiting : RankState::Kind::working;
                state.arrived = reply.arrived != 0;
                state.label = reply.label;
                state.number = reply.number;
                state.same_group = reply.same_group != 0;
            }
            result.push_back(std::move(state));
        }
        return result;
    }

    const Call& call_;
    bool patient_;
    const Call* outer_;
    Clock::time_point start_;
    bool all_had_arrived_ = false;
};

void pause(Pausing pausing, Clock::duration waited)
{
    using namespace std::chrono_literals;
    const Clock::duration share = waited / 50; // a wait gets longer by a fiftieth at most
    if (pausing == Pausing::brief && waited > 5ms)
        std::this_thread::sleep_for(std::clamp<Clock::duration>(share, 50us, 1ms));
    else if (pausing == Pausing::bulk && waited > 1s)
        std::this_thread::sleep_for(50us);
    else if (pausing == Pausing::sleeping)
        std::this_thread::sleep_for(std::clamp<Clock::duration>(share, 20us, 2ms));
    else
        std::this_thread::yield();
}

} // namespace

CallCounter::CallCounter(MPI_Comm comm, std::uint64_t name) : comm_(comm), name_(name)
{
    watch().counters[name_] = this;
}

CallCounter::~CallCounter()
{
    watch().counters.erase(name_);
}

Call CallCounter::collective(std::string_view label)
{
    answer_watchdogs(); // a rank that calls short collectives of other communicators is alive
    return {comm_, name_, ++started_, label};
}

std::uint64_t CallCounter::name_of_child(int first)
{
    std::uint64_t name = name_; // any mixing that makes equal names of different communicators unlikely
    for (const std::uint64_t part : {++children_, static_cast<std::uint64_t>(first) + 1}) {
        name = (name ^ part) * 0x9E3779B97F4A7C15U;
        name ^= name >> 29U;
    }
    return name;
}

void wait_until(const Call& call, Pausing pausing, const std::function<bool()>& done, const std::function<void()>& poll)
{
    constexpr int tests_without_clock = 500;
    for (int i = 0; pausing != Pausing::sleeping && i < tests_without_clock; ++i)
        if (done())
            return;
    WatchedWait wait(call, pausing == Pausing::sleeping);
    const auto start = Clock::now();
    while (!done()) {
        advance_all_in_flight();
        if (poll)
            poll();
        const auto now = Clock::now();
        wait.look(now);
        pause(pausing, now - start);
    }
}

void wait_for(MPI_Request& request, const Call& call, std::size_t bytes)
{
    constexpr std::size_t little = 64 * 1024;
    const auto done = [&] {
        int finished = 0;
        SELM_MPI(call.label, MPI_Test(&request, &finished, MPI_STATUS_IGNORE));
        return finished != 0;
    };
    wait_until(call, bytes <= little ? Pausing::brief : Pausing::bulk, done);
}

void answer_watchdogs()
{
    const auto now = Clock::now();
    if (watch().comm != MPI_COMM_NULL && now - watch().last_look >= time_between_looks)
        look_at_messages(now);
}

const std::vector<std::string>& host_names()
{
    return watch().hosts;
}

void start_watch()
{
    Watch& w = watch();
    SELM_MPI("watchdog", MPI_Comm_dup(MPI_COMM_WORLD, &w.comm));
    SELM_MPI("watchdog", MPI_Comm_rank(w.comm, &w.rank));
    SELM_MPI("watchdog", MPI_Comm_size(w.comm, &w.size));
    std::array<char, 64> own{};
    char name[MPI_MAX_PROCESSOR_NAME] = {};
    int length = 0;
    SELM_MPI("watchdog", MPI_Get_processor_name(name, &length));
    std::copy_n(name, std::min<std::size_t>(static_cast<std::size_t>(length), own.size() - 1), own.begin());
    std::vector<char> all(own.size() * static_cast<std::size_t>(w.size));
    const int count = static_cast<int>(own.size());
    SELM_MPI("watchdog", MPI_Allgather(own.data(), count, MPI_CHAR, all.data(), count, MPI_CHAR, w.comm));
    w.hosts.clear();
    for (std::size_t r = 0; r < static_cast<std::size_t>(w.size); ++r)
        w.hosts.emplace_back(all.data() + r * own.size());
}

void end_watch()
{
    Watch& w = watch();
    for (PendingMessage& message : w.messages) {
        int done = 0;
        MPI_Test(&message.request, &done, MPI_STATUS_IGNORE);
        if (done == 0) { // nobody asks any more: MPI keeps the bytes
            MPI_Request_free(&message.request);
            [[maybe_unused]] const auto* left_to_mpi = message.data.release();
        }
    }
    w.messages.clear();
    MPI_Comm_free(&w.comm);
    w.comm = MPI_COMM_NULL;
}

} // namespace selm::comm

namespace selm {

void set_collective_timeout(double seconds)
{
    comm::timeout() = seconds;
}

double collective_timeout()
{
    return comm::timeout();
}

std::uint64_t watchdog_inquiries()
{
    return comm::watch().inquiries;
}

void tell_watchdogs_of_error()
{
    comm::watch().has_error = true;
}

} // namespace selm
