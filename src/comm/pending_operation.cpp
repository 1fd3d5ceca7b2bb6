#include "pending_operation.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <numeric>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "bf16_wire.hpp"
#include "message_limit.hpp"
#include "mpi_call.hpp"
#include "selm/base/error.hpp"

namespace selm::comm {

namespace {

float to_float(float value)
{
    return value;
}

float to_float(std::uint16_t value)
{
    return float_of_bf16(value);
}

/// The wire type of T; bf16 has none in MPI and needs none, since MPI does not add.
template<typename T>
MPI_Datatype wire_type()
{
    if constexpr (std::is_same_v<T, float>)
        return MPI_FLOAT;
    else
        return MPI_UINT16_T;
}

int rank_in(MPI_Comm comm, std::string_view label)
{
    int rank = 0;
    SELM_MPI(label, MPI_Comm_rank(comm, &rank));
    return rank;
}

bool test_all(std::vector<MPI_Request>& requests, std::string_view label)
{
    int done = 1;
    SELM_MPI(label, MPI_Testall(static_cast<int>(requests.size()), requests.data(), &done, MPI_STATUSES_IGNORE));
    return done != 0;
}

std::size_t elements_of(std::span<const std::size_t> offsets, std::size_t rank)
{
    return offsets[rank + 1] - offsets[rank];
}

/// result[i] = sum over ranks, in rank order; `others` holds `count` values of each other rank, in rank order.
template<typename T>
void add_in_rank_order(std::span<const T> own, const T* others, std::size_t rank, std::size_t ranks, float* result)
{
    const std::size_t count = own.size();
    for (std::size_t i = 0; i < count; ++i) {
        const T* next = others + i;
        float sum = 0;
        for (std::size_t r = 0; r < ranks; ++r) {
            float value = 0;
            if (r == rank) {
                value = to_float(own[i]);
            } else {
                value = to_float(*next);
                next += count;
            }
            sum = r == 0 ? value : sum + value; // not 0 + value: that would lose the sign of -0
        }
        result[i] = sum;
    }
}

/// One request of MPI; counts and starts live as long as MPI reads them.
class Request : public Operation {
  public:
    explicit Request(std::string_view label) : label_(label) {}
    bool advance() override
    {
        int done = 0;
        SELM_MPI(label_, MPI_Test(&request_, &done, MPI_STATUS_IGNORE));
        return done != 0;
    }

  protected:
    std::string label_;
    MPI_Request request_ = MPI_REQUEST_NULL;
};

class Barrier final : public Request {
  public:
    Barrier(MPI_Comm comm, std::string_view label) : Request(label) { SELM_MPI(label_, MPI_Ibarrier(comm, &request_)); }
};

class Gather final : public Request {
  public:
    /// The rank's own part of full holds its shard.
    Gather(MPI_Comm comm, std::span<const std::size_t> offsets, float* full, std::string_view label) : Request(label)
    {
        for (std::size_t r = 0; r + 1 < offsets.size(); ++r) {
            counts_.push_back(to_count(elements_of(offsets, r)));
            starts_.push_back(to_count(offsets[r] - offsets[0]));
        }
        SELM_MPI(label_, MPI_Iallgatherv(MPI_IN_PLACE, 0, MPI_FLOAT, full + offsets[0], counts_.data(), starts_.data(), MPI_FLOAT,
                                         comm, &request_));
    }

  private:
    std::vector<int> counts_, starts_;
};

/// Everyone sends everyone its part (all-to-all), then adds locally: the order of the sum is fixed whatever MPI does.
template<typename T>
class ReduceScatter final : public Request {
  public:
    ReduceScatter(MPI_Comm comm, std::span<const T> full, std::span<const std::size_t> offsets, std::span<float> shard,
                  std::string_view label)
        : Request(label), shard_(shard), rank_(static_cast<std::size_t>(rank_in(comm, label))), ranks_(offsets.size() - 1),
          own_(full.subspan(offsets[rank_], shard.size())), others_(shard.size() * (ranks_ - 1))
    {
        for (std::size_t r = 0; r < ranks_; ++r) {
            const std::size_t before = r < rank_ ? r : r - 1; // other ranks before r
            send_counts_.push_back(r == rank_ ? 0 : to_count(elements_of(offsets, r)));
            send_starts_.push_back(to_count(offsets[r] - offsets[0]));
            receive_counts_.push_back(r == rank_ ? 0 : to_count(shard.size()));
            receive_starts_.push_back(r == rank_ ? 0 : to_count(before * shard.size()));
        }
        SELM_MPI(label_, MPI_Ialltoallv(full.data() + offsets[0], send_counts_.data(), send_starts_.data(), wire_type<T>(),
                                        others_.data(), receive_counts_.data(), receive_starts_.data(), wire_type<T>(), comm,
                                        &request_));
    }

    bool advance() override
    {
        if (!Request::advance())
            return false;
        add_in_rank_order<T>(own_, others_.data(), rank_, ranks_, shard_.data());
        return true;
    }

  private:
    std::span<float> shard_;
    std::size_t rank_, ranks_;
    std::span<const T> own_;
    std::vector<T> others_;
    std::vector<int> send_counts_, send_starts_, receive_counts_, receive_starts_;
};

/// Elements of a shard that a round moves from each other rank: the buffer for all others is at most as large as `full`.
std::size_t elements_per_round(std::span<const std::size_t> offsets, std::size_t element_bytes)
{
    const std::size_t others = std::max<std::size_t>(1, offsets.size() - 2);
    const std::size_t total = offsets.back() - offsets.front();
    return std::max<std::size_t>(1, std::min(max_message_bytes() / element_bytes, total / others));
}

template<typename T>
class ReduceScatterInRounds final : public Operation {
  public:
    ReduceScatterInRounds(MPI_Comm comm, std::span<const T> full, std::span<const std::size_t> offsets, std::span<float> shard,
                          int tag, std::string_view label)
        : label_(label), comm_(comm), tag_(tag), shard_(shard), rank_(static_cast<std::size_t>(rank_in(comm, label))),
          ranks_(offsets.size() - 1), own_(full.subspan(offsets[rank_], shard.size())),
          round_(elements_per_round(offsets, sizeof(T))), others_(std::min(round_, shard.size()) * (ranks_ - 1))
    {
        post_receives();
        for (std::size_t step = 1; step < ranks_; ++step) { // not all to rank 0 first
            const std::size_t r = (rank_ + step) % ranks_;
            const auto part = full.subspan(offsets[r], elements_of(offsets, r));
            for (std::size_t done = 0; done < part.size(); done += round_) {
                const std::size_t count = std::min(round_, part.size() - done);
                SELM_MPI(label_, MPI_Isend(part.data() + done, to_count(count), wire_type<T>(), static_cast<int>(r), tag_, comm_,
                                           &sends_.emplace_back(MPI_REQUEST_NULL)));
            }
        }
    }

    bool advance() override
    {
        while (done_ < shard_.size()) {
            if (!test_all(receives_, label_))
                return false;
            const std::size_t count = round_elements();
            add_in_rank_order<T>(own_.subspan(done_, count), others_.data(), rank_, ranks_, shard_.data() + done_);
            done_ += count;
            post_receives();
        }
        return test_all(sends_, label_);
    }

  private:
    std::size_t round_elements() const { return std::min(round_, shard_.size() - done_); }

    void post_receives()
    {
        receives_.clear();
        const std::size_t count = round_elements();
        if (count == 0)
            return;
        for (std::size_t r = 0; r < ranks_; ++r) {
            if (r == rank_)
                continue;
            T* const buffer = others_.data() + receives_.size() * count;
            SELM_MPI(label_, MPI_Irecv(buffer, to_count(count), wire_type<T>(), static_cast<int>(r), tag_, comm_,
                                       &receives_.emplace_back(MPI_REQUEST_NULL)));
        }
    }

    std::string label_;
    MPI_Comm comm_;
    int tag_;
    std::span<float> shard_;
    std::size_t rank_, ranks_;
    std::span<const T> own_;
    std::size_t round_;
    std::size_t done_ = 0;
    std::vector<T> others_;
    std::vector<MPI_Request> receives_, sends_;
};

/// Messages to and from any ranks, cut at the message limit, all posted at the start.
class Exchange final : public Operation {
  public:
    Exchange(MPI_Comm comm, std::span<const Communicator::Outgoing> outgoing,
             std::span<const Communicator::Incoming> incoming, int tag, std::string_view label)
        : label_(label)
    {
        for (const Communicator::Incoming& message : incoming)
            for_pieces(message.data.size(), [&](std::size_t begin, int bytes) {
                receive_bytes_.push_back(bytes);
                SELM_MPI(label_, MPI_Irecv(message.data.data() + begin, bytes, MPI_BYTE, message.rank, tag, comm,
                                           &receives_.emplace_back(MPI_REQUEST_NULL)));
            });
        for (const Communicator::Outgoing& message : outgoing)
            for_pieces(message.data.size(), [&](std::size_t begin, int bytes) {
                SELM_MPI(label_, MPI_Isend(message.data.data() + begin, bytes, MPI_BYTE, message.rank, tag, comm,
                                           &sends_.emplace_back(MPI_REQUEST_NULL)));
            });
    }

    bool advance() override
    {
        return receive() && test_all(sends_, label_);
    }

  private:
    template<typename Post>
    static void for_pieces(std::size_t bytes, Post&& post)
    {
        for (std::size_t done = 0; done < bytes;) {
            const std::size_t piece = std::min(max_message_bytes(), bytes - done);
            post(done, to_count(piece));
            done += piece;
        }
    }

    bool receive()
    {
        if (received_)
            return true;
        std::vector<MPI_Status> statuses(receives_.size());
        int done = 1;
        SELM_MPI(label_, MPI_Testall(static_cast<int>(receives_.size()), receives_.data(), &done, statuses.data()));
        if (done == 0)
            return false;
        received_ = true;
        for (std::size_t i = 0; i < statuses.size(); ++i) {
            int bytes = 0;
            SELM_MPI(label_, MPI_Get_count(&statuses[i], MPI_BYTE, &bytes));
            SELM_VALIDATE(bytes == receive_bytes_[i], ExitCode::internal,
                          label_ << ": rank " << statuses[i].MPI_SOURCE << " sent " << bytes << " bytes where " << receive_bytes_[i]
                                 << " were expected (the ranks' lists of messages differ). Report this with the command line");
        }
        return true;
    }

    std::string label_;
    std::vector<MPI_Request> receives_, sends_;
    std::vector<int> receive_bytes_;
    bool received_ = false;
};

template<typename T>
std::unique_ptr<Operation> make_reduce_scatter(MPI_Comm comm, std::span<const T> full, std::span<const std::size_t> offsets,
                                               std::span<float> shard, int tag, std::string_view label)
{
    if (reduce_scatter_needs_tag(offsets, sizeof(T)))
        return std::make_unique<ReduceScatterInRounds<T>>(comm, full, offsets, shard, tag, label);
    return std::make_unique<ReduceScatter<T>>(comm, full, offsets, shard, label);
}

std::vector<MpiPending*>& in_flight()
{
    static std::vector<MpiPending*> list;
    return list;
}

} // namespace

bool reduce_scatter_needs_tag(std::span<const std::size_t> offsets, std::size_t element_bytes)
{
    std::size_t longest = 0;
    for (std::size_t r = 0; r + 1 < offsets.size(); ++r)
        longest = std::max(longest, elements_of(offsets, r));
    const std::size_t total = offsets.back() - offsets.front();
    return total * element_bytes > max_message_bytes() || longest * (offsets.size() - 2) > total;
}

std::unique_ptr<Operation> start_reduce_scatter(MPI_Comm comm, std::span<const float> full, std::span<const std::size_t> offsets,
                                                std::span<float> shard, int tag, std::string_view label)
{
    return make_reduce_scatter<float>(comm, full, offsets, shard, tag, label);
}

std::unique_ptr<Operation> start_reduce_scatter(MPI_Comm comm, std::span<const std::uint16_t> full,
                                                std::span<const std::size_t> offsets, std::span<float> shard, int tag,
                                                std::string_view label)
{
    return make_reduce_scatter<std::uint16_t>(comm, full, offsets, shard, tag, label);
}

std::unique_ptr<Operation> start_gather(MPI_Comm comm, std::span<const float> shard, std::span<const std::size_t> offsets,
                                        std::span<float> full, std::string_view label)
{
    const int rank = rank_in(comm, label);
    const std::size_t ranks = offsets.size() - 1;
    const auto own = full.subspan(offsets[static_cast<std::size_t>(rank)], shard.size());
    if (!shard.empty())
        std::memmove(own.data(), shard.data(), shard.size_bytes()); // shard may lie inside full
    if ((offsets.back() - offsets.front()) * sizeof(float) <= max_message_bytes())
        return std::make_unique<Gather>(comm, offsets, full.data(), label);
    std::vector<Communicator::Outgoing> outgoing;
    std::vector<Communicator::Incoming> incoming;
    for (std::size_t step = 1; step < ranks; ++step) {
        const std::size_t to = (static_cast<std::size_t>(rank) + step) % ranks;
        const std::size_t from = (static_cast<std::size_t>(rank) + ranks - step) % ranks;
        outgoing.push_back({static_cast<int>(to), std::as_bytes(own)});
        incoming.push_back(
            {static_cast<int>(from), std::as_writable_bytes(full.subspan(offsets[from], elements_of(offsets, from)))});
    }
    return std::make_unique<Exchange>(comm, outgoing, incoming, gather_tag, label);
}

std::unique_ptr<Operation> start_exchange(MPI_Comm comm, std::span<const Communicator::Outgoing> outgoing,
                                          std::span<const Communicator::Incoming> incoming, int tag, std::string_view label)
{
    return std::make_unique<Exchange>(comm, outgoing, incoming, tag, label);
}

std::unique_ptr<Operation> start_barrier(MPI_Comm comm, std::string_view label)
{
    return std::make_unique<Barrier>(comm, label);
}

MpiPending::MpiPending(std::unique_ptr<Operation> operation, MPI_Comm comm, int tag, std::string_view label)
    : operation_(std::move(operation)), comm_(comm), tag_(tag), label_(label), exceptions_at_start_(std::uncaught_exceptions())
{
    in_flight().push_back(this);
}

MpiPending::~MpiPending()
{
    if (!operation_)
        return;
    const bool unwinding = std::uncaught_exceptions() > exceptions_at_start_;
    try {
        if (!unwinding)
            wait();
        // All ranks may be unwinding from an error that they agreed on; then the collective ends by itself.
        const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(2);
        while (unwinding && !test() && std::chrono::steady_clock::now() < give_up)
            std::this_thread::sleep_for(std::chrono::microseconds(100));
    } catch (...) { // a destructor must not throw; the collective's ranks are lost anyway
    }
    if (!operation_)
        return;
    std::erase(in_flight(), this);
    [[maybe_unused]] const auto* left_to_mpi = operation_.release(); // MPI may still write to its buffers
}

void MpiPending::advance()
{
    if (!operation_ || !operation_->advance())
        return;
    operation_.reset();
    std::erase(in_flight(), this);
}

bool MpiPending::test()
{
    if (operation_)
        advance_all_in_flight();
    return !operation_;
}

void MpiPending::wait()
{
    while (!test())
        std::this_thread::yield();
}

void advance_all_in_flight()
{
    const std::vector<MpiPending*> now = in_flight(); // advance() takes finished ones off the list
    for (MpiPending* const pending : now)
        pending->advance();
}

MpiPending* in_flight_with_tag(MPI_Comm comm, int tag)
{
    const auto found = std::find_if(in_flight().begin(), in_flight().end(),
                                    [&](const MpiPending* pending) { return pending->uses_tag(comm, tag); });
    return found == in_flight().end() ? nullptr : *found;
}

} // namespace selm::comm
