#include "pending_operation.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
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

/// The wire type of T; bf16 has none in MPI and needs none, since MPI does not add.
template<typename T>
MPI_Datatype wire_type()
{
    if constexpr (std::is_same_v<T, float>)
        return MPI_FLOAT;
    else if constexpr (std::is_same_v<T, double>)
        return MPI_DOUBLE;
    else
        return MPI_UINT16_T;
}

/// From values on the wire to the result: what is computed with, and how two of them combine.
struct SumOfFloats {
    using Wire = float;
    using Value = float;
    Value value(Wire wire) const { return wire; }
    Value operator()(Value a, Value b) const { return a + b; }
};

struct SumOfBf16 {
    using Wire = std::uint16_t;
    using Value = float;
    Value value(Wire wire) const { return float_of_bf16(wire); }
    Value operator()(Value a, Value b) const { return a + b; }
};

struct ReductionOfDoubles {
    using Wire = double;
    using Value = double;
    ReduceOp op;
    Value value(Wire wire) const { return wire; }
    Value operator()(Value a, Value b) const { return combine(a, b, op); }
};

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

/// result[i] = combination over ranks, in rank order; `others` holds own.size() values of each other rank, in rank order.
template<typename Reduction>
void combine_in_rank_order(const Reduction& reduction, std::span<const typename Reduction::Wire> own,
                           const typename Reduction::Wire* others, std::size_t rank, std::size_t ranks,
                           typename Reduction::Value* result)
{
    const std::size_t count = own.size();
    const auto part = [&](std::size_t r) {
        return r == rank ? own.data() : others + (r < rank ? r : r - 1) * count;
    };
    constexpr std::size_t block = 4096; // stays in the first cache while all ranks' parts pass by
    std::array<typename Reduction::Value, block> sums;
    for (std::size_t begin = 0; begin < count; begin += block) {
        const std::size_t n = std::min(block, count - begin);
        for (std::size_t i = 0; i < n; ++i)
            sums[i] = reduction.value(part(0)[begin + i]);
        for (std::size_t r = 1; r < ranks; ++r) {
            const auto* const values = part(r) + begin;
            for (std::size_t i = 0; i < n; ++i)
                sums[i] = reduction(sums[i], reduction.value(values[i]));
        }
        std::copy_n(sums.data(), n, result + begin); // own may be the same memory
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

/// In round k a rank tells the rank 2^k behind it that it and all it has heard of are here (dissemination: Hensgen, Finkel,
/// Manber 1988). A pair of ranks meets in one round at most, so the order of messages keeps barriers apart.
class MessageBarrier final : public Operation {
  public:
    MessageBarrier(MPI_Comm comm, std::string_view label) : label_(label), comm_(comm), rank_(rank_in(comm, label))
    {
        SELM_MPI(label_, MPI_Comm_size(comm, &size_));
        post();
    }

    bool advance() override
    {
        while (distance_ < size_) {
            if (!test_all(requests_, label_))
                return false;
            distance_ *= 2;
            post();
        }
        return true;
    }

  private:
    void post()
    {
        if (distance_ >= size_)
            return;
        const int to = (rank_ + distance_) % size_;
        const int from = (rank_ - distance_ + size_) % size_;
        requests_.assign(2, MPI_REQUEST_NULL);
        SELM_MPI(label_, MPI_Irecv(nullptr, 0, MPI_BYTE, from, sleep_tag, comm_, &requests_[0]));
        SELM_MPI(label_, MPI_Isend(nullptr, 0, MPI_BYTE, to, sleep_tag, comm_, &requests_[1]));
    }

    std::string label_;
    MPI_Comm comm_;
    int rank_;
    int size_ = 1;
    int distance_ = 1;
    std::vector<MPI_Request> requests_;
};

template<typename T>
class Gather final : public Request {
  public:
    /// The rank's own part of full holds its shard.
    Gather(MPI_Comm comm, std::span<const std::size_t> offsets, T* full, std::string_view label) : Request(label)
    {
        for (std::size_t r = 0; r + 1 < offsets.size(); ++r) {
            counts_.push_back(to_count(elements_of(offsets, r)));
            starts_.push_back(to_count(offsets[r] - offsets[0]));
        }
        SELM_MPI(label_, MPI_Iallgatherv(MPI_IN_PLACE, 0, wire_type<T>(), full + offsets[0], counts_.data(), starts_.data(),
                                         wire_type<T>(), comm, &request_));
    }

  private:
    std::vector<int> counts_, starts_;
};

/// Everyone sends everyone its part (all-to-all), then combines locally: the order is fixed whatever MPI does.
template<typename Reduction>
class ReduceScatter final : public Request {
    using Wire = typename Reduction::Wire;
    using Value = typename Reduction::Value;

  public:
    ReduceScatter(MPI_Comm comm, Reduction reduction, std::span<const Wire> full, std::span<const std::size_t> offsets,
                  std::span<Value> shard, std::string_view label)
        : Request(label), reduction_(reduction), shard_(shard), rank_(static_cast<std::size_t>(rank_in(comm, label))),
          ranks_(offsets.size() - 1), own_(full.subspan(offsets[rank_], shard.size())),
          others_(std::make_unique_for_overwrite<Wire[]>(shard.size() * (ranks_ - 1)))
    {
        for (std::size_t r = 0; r < ranks_; ++r) {
            const std::size_t before = r < rank_ ? r : r - 1; // other ranks before r
            send_counts_.push_back(r == rank_ ? 0 : to_count(elements_of(offsets, r)));
            send_starts_.push_back(to_count(offsets[r] - offsets[0]));
            receive_counts_.push_back(r == rank_ ? 0 : to_count(shard.size()));
            receive_starts_.push_back(r == rank_ ? 0 : to_count(before * shard.size()));
        }
        SELM_MPI(label_, MPI_Ialltoallv(full.data() + offsets[0], send_counts_.data(), send_starts_.data(), wire_type<Wire>(),
                                        others_.get(), receive_counts_.data(), receive_starts_.data(), wire_type<Wire>(), comm,
                                        &request_));
    }

    bool advance() override
    {
        if (!Request::advance())
            return false;
        combine_in_rank_order(reduction_, own_, others_.get(), rank_, ranks_, shard_.data());
        return true;
    }

  private:
    Reduction reduction_;
    std::span<Value> shard_;
    std::size_t rank_, ranks_;
    std::span<const Wire> own_;
    std::unique_ptr<Wire[]> others_;
    std::vector<int> send_counts_, send_starts_, receive_counts_, receive_starts_;
};

template<typename Reduction>
class ReduceScatterInRounds final : public Operation {
    using Wire = typename Reduction::Wire;
    using Value = typename Reduction::Value;

  public:
    ReduceScatterInRounds(MPI_Comm comm, Reduction reduction, std::span<const Wire> full, std::span<const std::size_t> offsets,
                          std::span<Value> shard, std::size_t round, int tag, std::string_view label)
        : label_(label), comm_(comm), tag_(tag), reduction_(reduction), shard_(shard),
          rank_(static_cast<std::size_t>(rank_in(comm, label))), ranks_(offsets.size() - 1),
          own_(full.subspan(offsets[rank_], shard.size())), round_(round),
          others_(std::make_unique_for_overwrite<Wire[]>(std::min(round_, shard.size()) * (ranks_ - 1)))
    {
        post_receives();
        for (std::size_t step = 1; step < ranks_; ++step) { // not all to rank 0 first
            const std::size_t r = (rank_ + step) % ranks_;
            const auto part = full.subspan(offsets[r], elements_of(offsets, r));
            for (std::size_t done = 0; done < part.size(); done += round_) {
                const std::size_t count = std::min(round_, part.size() - done);
                SELM_MPI(label_, MPI_Isend(part.data() + done, to_count(count), wire_type<Wire>(), static_cast<int>(r), tag_, comm_,
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
            combine_in_rank_order(reduction_, own_.subspan(done_, count), others_.get(), rank_, ranks_, shard_.data() + done_);
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
            Wire* const buffer = others_.get() + receives_.size() * count;
            SELM_MPI(label_, MPI_Irecv(buffer, to_count(count), wire_type<Wire>(), static_cast<int>(r), tag_, comm_,
                                       &receives_.emplace_back(MPI_REQUEST_NULL)));
        }
    }

    std::string label_;
    MPI_Comm comm_;
    int tag_;
    Reduction reduction_;
    std::span<Value> shard_;
    std::size_t rank_, ranks_;
    std::span<const Wire> own_;
    std::size_t round_;
    std::size_t done_ = 0;
    std::unique_ptr<Wire[]> others_;
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

template<typename Reduction>
std::unique_ptr<Operation> make_reduce_scatter(MPI_Comm comm, Reduction reduction, std::span<const typename Reduction::Wire> full,
                                               std::span<const std::size_t> offsets,
                                               std::span<typename Reduction::Value> shard, ReducePlan plan, int tag,
                                               std::string_view label)
{
    if (plan.in_rounds)
        return std::make_unique<ReduceScatterInRounds<Reduction>>(comm, reduction, full, offsets, shard, plan.round, tag, label);
    return std::make_unique<ReduceScatter<Reduction>>(comm, reduction, full, offsets, shard, label);
}

template<typename T>
std::unique_ptr<Operation> make_gather(MPI_Comm comm, std::span<const T> shard, std::span<const std::size_t> offsets,
                                       std::span<T> full, std::string_view label)
{
    const int rank = rank_in(comm, label);
    const std::size_t ranks = offsets.size() - 1;
    const auto own = full.subspan(offsets[static_cast<std::size_t>(rank)], shard.size());
    if (!shard.empty() && own.data() != shard.data())
        std::memmove(own.data(), shard.data(), shard.size_bytes()); // they may overlap
    if ((offsets.back() - offsets.front()) * sizeof(T) <= max_message_bytes())
        return std::make_unique<Gather<T>>(comm, offsets, full.data(), label);
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

std::vector<MpiPending*>& in_flight()
{
    static std::vector<MpiPending*> list;
    return list;
}

} // namespace

double combine(double a, double b, ReduceOp op)
{
    if (op == ReduceOp::sum)
        return a + b;
    if (std::isnan(a) || std::isnan(b))
        return a + b; // a non-finite number on one rank is seen on all
    return op == ReduceOp::min ? std::min(a, b) : std::max(a, b);
}

std::unique_ptr<Operation> start_reduce_scatter(MPI_Comm comm, std::span<const float> full, std::span<const std::size_t> offsets,
                                                std::span<float> shard, ReducePlan plan, int tag, std::string_view label)
{
    return make_reduce_scatter(comm, SumOfFloats{}, full, offsets, shard, plan, tag, label);
}

std::unique_ptr<Operation> start_reduce_scatter(MPI_Comm comm, std::span<const std::uint16_t> full,
                                                std::span<const std::size_t> offsets, std::span<float> shard, ReducePlan plan,
                                                int tag, std::string_view label)
{
    return make_reduce_scatter(comm, SumOfBf16{}, full, offsets, shard, plan, tag, label);
}

std::unique_ptr<Operation> start_reduce_scatter(MPI_Comm comm, std::span<const double> full, std::span<const std::size_t> offsets,
                                                std::span<double> shard, ReduceOp op, ReducePlan plan, int tag,
                                                std::string_view label)
{
    return make_reduce_scatter(comm, ReductionOfDoubles{op}, full, offsets, shard, plan, tag, label);
}

std::unique_ptr<Operation> start_gather(MPI_Comm comm, std::span<const float> shard, std::span<const std::size_t> offsets,
                                        std::span<float> full, std::string_view label)
{
    return make_gather(comm, shard, offsets, full, label);
}

std::unique_ptr<Operation> start_gather(MPI_Comm comm, std::span<const double> shard, std::span<const std::size_t> offsets,
                                        std::span<double> full, std::string_view label)
{
    return make_gather(comm, shard, offsets, full, label);
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

std::unique_ptr<Operation> start_message_barrier(MPI_Comm comm, std::string_view label)
{
    return std::make_unique<MessageBarrier>(comm, label);
}

MpiPending::MpiPending(std::unique_ptr<Operation> operation, const Call& call, int tag)
    : operation_(std::move(operation)), label_(call.label), call_(call), tag_(tag),
      exceptions_at_start_(std::uncaught_exceptions())
{
    call_.label = label_;
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
    if (!operation_)
        return true;
    answer_watchdogs();
    advance_all_in_flight();
    return !operation_;
}

void MpiPending::wait()
{
    const auto done = [this] {
        advance();
        return !operation_;
    };
    wait_until(call_, Pausing::bulk, done);
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
