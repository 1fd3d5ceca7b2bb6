#include "mpi_communicator.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <numeric>
#include <thread>
#include <type_traits>

#include "message_limit.hpp"
#include "mpi_call.hpp"
#include "pending_operation.hpp"
#include "selm/base/error.hpp"

namespace selm::comm {

namespace {

constexpr std::size_t largest_point_to_point = 64 * 1024;

std::size_t& message_limit()
{
    static std::size_t bytes = std::size_t{256} << 20;
    return bytes;
}

bool mpi_is_finalized()
{
    int finalized = 0;
    MPI_Finalized(&finalized);
    return finalized != 0;
}

/// NaN wins, so that a non-finite number on one rank is seen on all.
double combine(double a, double b, ReduceOp op)
{
    if (op == ReduceOp::sum)
        return a + b;
    if (std::isnan(a) || std::isnan(b))
        return a + b;
    return op == ReduceOp::min ? std::min(a, b) : std::max(a, b);
}

MPI_Op mpi_op(ReduceOp op)
{
    switch (op) {
    case ReduceOp::sum: return MPI_SUM;
    case ReduceOp::min: return MPI_MIN;
    case ReduceOp::max: return MPI_MAX;
    }
    return MPI_SUM;
}

/// Part [begin, begin+count) of rank r's shard for the piece that starts @p done elements into every shard.
struct Piece {
    std::size_t begin = 0;
    std::size_t count = 0;
};

Piece piece_of(std::span<const std::size_t> offsets, std::size_t rank, std::size_t done, std::size_t elements)
{
    const std::size_t begin = std::min(offsets[rank] + done, offsets[rank + 1]);
    return {begin, std::min(elements, offsets[rank + 1] - begin)};
}

std::size_t longest_shard(std::span<const std::size_t> offsets)
{
    std::size_t longest = 0;
    for (std::size_t r = 0; r + 1 < offsets.size(); ++r)
        longest = std::max(longest, offsets[r + 1] - offsets[r]);
    return longest;
}

/// Bytes of a round's buffer, at most: gradients of gigabytes must not exist twice.
constexpr std::size_t most_bytes_per_round = std::size_t{64} << 20;

/// Elements of each shard that one round moves, so that a round's buffers stay small and within the message limit.
template<typename T>
std::size_t elements_per_round(std::size_t ranks)
{
    return std::max<std::size_t>(1, std::min(max_message_bytes(), most_bytes_per_round) / sizeof(T) / ranks);
}

template<typename T>
MPI_Datatype mpi_type()
{
    if constexpr (std::is_same_v<T, float>)
        return MPI_FLOAT;
    else
        return MPI_DOUBLE;
}

/// shard = combination over ranks, in rank order, of full[offsets[rank], offsets[rank+1]): everyone sends everyone its part
/// (all-to-all), then combines locally. So the order of the sum is fixed whatever algorithm MPI chooses.
template<typename T, typename Combine>
void ordered_reduce_scatter(MPI_Comm comm, std::span<const T> full, std::span<const std::size_t> offsets, std::span<T> shard,
                            Combine&& combine_values, std::string_view label)
{
    const std::size_t ranks = offsets.size() - 1;
    int rank = 0;
    SELM_MPI(label, MPI_Comm_rank(comm, &rank));
    const std::size_t longest = longest_shard(offsets);
    const std::size_t round = std::min(longest, elements_per_round<T>(ranks));
    std::vector<T> outgoing;
    std::vector<T> incoming;
    std::vector<int> send_counts(ranks), send_starts(ranks), receive_counts(ranks), receive_starts(ranks);
    for (std::size_t done = 0; done < longest; done += round) {
        outgoing.clear();
        for (std::size_t r = 0; r < ranks; ++r) {
            const Piece piece = piece_of(offsets, r, done, round);
            send_starts[r] = to_count(outgoing.size());
            send_counts[r] = to_count(piece.count);
            const auto part = full.subspan(piece.begin, piece.count);
            outgoing.insert(outgoing.end(), part.begin(), part.end());
        }
        const Piece own = piece_of(offsets, static_cast<std::size_t>(rank), done, round);
        incoming.resize(own.count * ranks);
        for (std::size_t r = 0; r < ranks; ++r) {
            receive_counts[r] = to_count(own.count);
            receive_starts[r] = to_count(own.count * r);
        }
        SELM_MPI(label, MPI_Alltoallv(outgoing.data(), send_counts.data(), send_starts.data(), mpi_type<T>(), incoming.data(),
                                      receive_counts.data(), receive_starts.data(), mpi_type<T>(), comm));
        T* const result = shard.data() + done; // done is past the end only where own.count is 0
        for (std::size_t i = 0; i < own.count; ++i) {
            T value = incoming[i];
            for (std::size_t r = 1; r < ranks; ++r)
                value = combine_values(value, incoming[own.count * r + i]);
            result[i] = value;
        }
    }
}

template<typename T>
void gather_shards(MPI_Comm comm, std::span<const T> shard, std::span<const std::size_t> offsets, std::span<T> full,
                   std::string_view label)
{
    const std::size_t ranks = offsets.size() - 1;
    int rank = 0;
    SELM_MPI(label, MPI_Comm_rank(comm, &rank));
    const std::size_t longest = longest_shard(offsets);
    const std::size_t round = std::min(longest, elements_per_round<T>(ranks));
    std::vector<T> incoming;
    std::vector<int> counts(ranks), starts(ranks);
    for (std::size_t done = 0; done < longest; done += round) {
        std::size_t total = 0;
        for (std::size_t r = 0; r < ranks; ++r) {
            starts[r] = to_count(total);
            counts[r] = to_count(piece_of(offsets, r, done, round).count);
            total += static_cast<std::size_t>(counts[r]);
        }
        incoming.resize(total);
        const int own = counts[static_cast<std::size_t>(rank)];
        // The piece goes through a buffer: shard may be the rank's own part of full, and MPI allows no overlap.
        SELM_MPI(label, MPI_Allgatherv(own > 0 ? shard.data() + done : nullptr, own, mpi_type<T>(), incoming.data(),
                                       counts.data(), starts.data(), mpi_type<T>(), comm));
        for (std::size_t r = 0; r < ranks; ++r) {
            const Piece piece = piece_of(offsets, r, done, round);
            std::copy_n(incoming.data() + starts[r], piece.count, full.data() + piece.begin);
        }
    }
}

} // namespace

std::size_t max_message_bytes()
{
    return message_limit();
}

void set_max_message_bytes(std::size_t bytes)
{
    SELM_EXPECT(bytes >= 64);
    message_limit() = bytes;
}

void check_mpi(int status, const char* call, std::string_view label)
{
    if (status == MPI_SUCCESS)
        return;
    char text[MPI_MAX_ERROR_STRING] = {};
    int length = 0;
    MPI_Error_string(status, text, &length);
    throw internal_error(cat(label, ": ", std::string_view(call).substr(0, std::string_view(call).find('(')), " failed (",
                             std::string_view(text, static_cast<std::size_t>(length)),
                             "). A rank or the network may have gone: look at the job's log, then run again"));
}

MpiCommunicator::MpiCommunicator(MPI_Comm comm) : comm_(comm), exceptions_at_start_(std::uncaught_exceptions())
{
    SELM_MPI("communicator", MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN));
    SELM_MPI("communicator", MPI_Comm_rank(comm_, &rank_));
    SELM_MPI("communicator", MPI_Comm_size(comm_, &size_));
}

MpiCommunicator::~MpiCommunicator()
{
    // MPI_Comm_free is collective: while an exception unwinds the peers may be elsewhere, and the process is about to end.
    if (mpi_is_finalized() || std::uncaught_exceptions() > exceptions_at_start_)
        return;
    for (PendingSend& pending : pending_sends_) {
        int done = 0;
        MPI_Test(&pending.request, &done, MPI_STATUS_IGNORE);
        if (done == 0) {
            // Nobody has received it yet: MPI still reads the buffer, so it must outlive this object.
            MPI_Request_free(&pending.request);
            [[maybe_unused]] const auto* left_to_mpi = new std::vector<std::byte>(std::move(pending.data));
        }
    }
    MPI_Comm_free(&comm_);
}

void MpiCommunicator::barrier(std::string_view label)
{
    SELM_MPI(label, MPI_Barrier(comm_));
}

void MpiCommunicator::sleeping_barrier(std::string_view label, const std::function<void()>& poll)
{
    MPI_Request request = MPI_REQUEST_NULL;
    SELM_MPI(label, MPI_Ibarrier(comm_, &request));
    auto pause = std::chrono::microseconds(20);
    while (true) {
        int done = 0;
        SELM_MPI(label, MPI_Test(&request, &done, MPI_STATUS_IGNORE));
        if (done != 0)
            return;
        if (poll)
            poll();
        std::this_thread::sleep_for(pause);
        pause = std::min<std::chrono::microseconds>(pause * 2, std::chrono::milliseconds(2));
    }
}

void MpiCommunicator::broadcast(std::span<std::byte> data, int root, std::string_view label)
{
    for (std::size_t done = 0; done < data.size();) {
        const std::size_t piece = std::min(data.size() - done, max_message_bytes());
        SELM_MPI(label, MPI_Bcast(data.data() + done, to_count(piece), MPI_BYTE, root, comm_));
        done += piece;
    }
}

void MpiCommunicator::all_gather(std::span<const std::byte> send, std::span<std::byte> recv, std::string_view label)
{
    const auto ranks = static_cast<std::size_t>(size_);
    SELM_EXPECT(recv.size() == send.size() * ranks);
    if (recv.size() <= max_message_bytes()) {
        const int count = to_count(send.size());
        SELM_MPI(label, MPI_Allgather(send.data(), count, MPI_BYTE, recv.data(), count, MPI_BYTE, comm_));
        return;
    }
    const std::size_t round = std::max<std::size_t>(1, max_message_bytes() / ranks);
    std::vector<std::byte> incoming(round * ranks);
    for (std::size_t done = 0; done < send.size(); done += round) {
        const std::size_t piece = std::min(round, send.size() - done);
        SELM_MPI(label, MPI_Allgather(send.data() + done, to_count(piece), MPI_BYTE, incoming.data(), to_count(piece), MPI_BYTE,
                                      comm_));
        for (std::size_t r = 0; r < ranks; ++r)
            std::copy_n(incoming.data() + r * piece, piece, recv.data() + r * send.size() + done);
    }
}

std::vector<std::vector<std::byte>> MpiCommunicator::all_gather_ragged(std::span<const std::byte> send, std::string_view label)
{
    const auto ranks = static_cast<std::size_t>(size_);
    const std::uint64_t own = send.size();
    std::vector<std::uint64_t> bytes(ranks);
    SELM_MPI(label, MPI_Allgather(&own, 1, MPI_UINT64_T, bytes.data(), 1, MPI_UINT64_T, comm_));
    std::vector<std::vector<std::byte>> result(ranks);
    for (std::size_t r = 0; r < ranks; ++r)
        result[r].resize(bytes[r]);
    const std::uint64_t total = std::accumulate(bytes.begin(), bytes.end(), std::uint64_t{0});
    if (total > max_message_bytes()) {
        std::copy(send.begin(), send.end(), result[static_cast<std::size_t>(rank_)].begin());
        for (int r = 0; r < size_; ++r)
            broadcast(result[static_cast<std::size_t>(r)], r, label);
        return result;
    }
    std::vector<std::byte> incoming(total);
    std::vector<int> counts(ranks), starts(ranks);
    std::uint64_t start = 0;
    for (std::size_t r = 0; r < ranks; ++r) {
        counts[r] = to_count(bytes[r]);
        starts[r] = to_count(start);
        start += bytes[r];
    }
    SELM_MPI(label, MPI_Allgatherv(send.data(), to_count(own), MPI_BYTE, incoming.data(), counts.data(), starts.data(), MPI_BYTE,
                                   comm_));
    for (std::size_t r = 0; r < ranks; ++r)
        std::copy_n(incoming.data() + starts[r], bytes[r], result[r].data());
    return result;
}

std::vector<std::vector<std::byte>> MpiCommunicator::all_to_all_ragged(const std::vector<std::vector<std::byte>>& send,
                                                                       std::string_view label)
{
    const auto ranks = static_cast<std::size_t>(size_);
    SELM_EXPECT(send.size() == ranks);
    std::vector<std::uint64_t> send_bytes(ranks), receive_bytes(ranks);
    for (std::size_t r = 0; r < ranks; ++r)
        send_bytes[r] = send[r].size();
    SELM_MPI(label, MPI_Alltoall(send_bytes.data(), 1, MPI_UINT64_T, receive_bytes.data(), 1, MPI_UINT64_T, comm_));
    std::uint64_t largest = std::max(std::accumulate(send_bytes.begin(), send_bytes.end(), std::uint64_t{0}),
                                     std::accumulate(receive_bytes.begin(), receive_bytes.end(), std::uint64_t{0}));
    // All ranks must take the same way.
    SELM_MPI(label, MPI_Allreduce(MPI_IN_PLACE, &largest, 1, MPI_UINT64_T, MPI_MAX, comm_));
    return largest <= max_message_bytes() ? all_to_all_packed(send, receive_bytes, label)
                                          : all_to_all_in_pieces(send, receive_bytes, label);
}

std::vector<std::vector<std::byte>> MpiCommunicator::all_to_all_packed(const std::vector<std::vector<std::byte>>& send,
                                                                       std::span<const std::uint64_t> receive_bytes,
                                                                       std::string_view label)
{
    const auto ranks = static_cast<std::size_t>(size_);
    std::vector<std::byte> outgoing;
    std::vector<int> send_counts(ranks), send_starts(ranks), receive_counts(ranks), receive_starts(ranks);
    std::size_t receive_total = 0;
    for (std::size_t r = 0; r < ranks; ++r) {
        send_starts[r] = to_count(outgoing.size());
        send_counts[r] = to_count(send[r].size());
        outgoing.insert(outgoing.end(), send[r].begin(), send[r].end());
        receive_starts[r] = to_count(receive_total);
        receive_counts[r] = to_count(receive_bytes[r]);
        receive_total += receive_bytes[r];
    }
    std::vector<std::byte> incoming(receive_total);
    SELM_MPI(label, MPI_Alltoallv(outgoing.data(), send_counts.data(), send_starts.data(), MPI_BYTE, incoming.data(),
                                  receive_counts.data(), receive_starts.data(), MPI_BYTE, comm_));
    std::vector<std::vector<std::byte>> result(ranks);
    for (std::size_t r = 0; r < ranks; ++r) {
        const auto* const begin = incoming.data() + receive_starts[r];
        result[r].assign(begin, begin + receive_counts[r]);
    }
    return result;
}

// Pairwise: in step s a rank sends to rank + s and receives from rank - s, piece by piece. Both sides know the sizes, so the
// k-th piece of step s meets its partner; a side that is done talks to MPI_PROC_NULL.
std::vector<std::vector<std::byte>> MpiCommunicator::all_to_all_in_pieces(const std::vector<std::vector<std::byte>>& send,
                                                                          std::span<const std::uint64_t> receive_bytes,
                                                                          std::string_view label)
{
    std::vector<std::vector<std::byte>> result(static_cast<std::size_t>(size_));
    const std::size_t limit = max_message_bytes();
    for (int step = 0; step < size_; ++step) {
        const int destination = (rank_ + step) % size_;
        const int source = (rank_ - step + size_) % size_;
        const auto& outgoing = send[static_cast<std::size_t>(destination)];
        auto& incoming = result[static_cast<std::size_t>(source)];
        incoming.resize(receive_bytes[static_cast<std::size_t>(source)]);
        for (std::size_t done = 0; done < std::max(outgoing.size(), incoming.size()); done += limit) {
            const std::size_t sent = done < outgoing.size() ? std::min(limit, outgoing.size() - done) : 0;
            const std::size_t received = done < incoming.size() ? std::min(limit, incoming.size() - done) : 0;
            SELM_MPI(label, MPI_Sendrecv(sent > 0 ? outgoing.data() + done : nullptr, to_count(sent), MPI_BYTE,
                                         sent > 0 ? destination : MPI_PROC_NULL, piece_tag,
                                         received > 0 ? incoming.data() + done : nullptr, to_count(received), MPI_BYTE,
                                         received > 0 ? source : MPI_PROC_NULL, piece_tag, comm_, MPI_STATUS_IGNORE));
        }
    }
    return result;
}

void MpiCommunicator::all_reduce(std::span<double> data, ReduceOp op, std::string_view label)
{
    if (size_ == 1 || data.empty())
        return;
    const auto ranks = static_cast<std::size_t>(size_);
    constexpr std::size_t small = 512; // doubles: one latency instead of two
    if (data.size() <= small) {
        std::vector<double> all(data.size() * ranks);
        all_gather(std::as_bytes(data), std::as_writable_bytes(std::span<double>(all)), label);
        for (std::size_t i = 0; i < data.size(); ++i) {
            double value = all[i];
            for (std::size_t r = 1; r < ranks; ++r)
                value = combine(value, all[r * data.size() + i], op);
            data[i] = value;
        }
        return;
    }
    std::vector<std::size_t> offsets(ranks + 1);
    for (std::size_t r = 0; r <= ranks; ++r)
        offsets[r] = data.size() / ranks * r + std::min(r, data.size() % ranks);
    const auto own = static_cast<std::size_t>(rank_);
    std::vector<double> shard(offsets[own + 1] - offsets[own]);
    ordered_reduce_scatter<double>(
        comm_, data, offsets, shard, [op](double a, double b) { return combine(a, b, op); }, label);
    gather_shards<double>(comm_, shard, offsets, data, label);
}

void MpiCommunicator::all_reduce(std::span<std::int64_t> data, ReduceOp op, std::string_view label)
{
    const std::size_t limit = max_message_bytes() / sizeof(std::int64_t);
    for (std::size_t done = 0; done < data.size();) {
        const std::size_t piece = std::min(limit, data.size() - done);
        SELM_MPI(label, MPI_Allreduce(MPI_IN_PLACE, data.data() + done, to_count(piece), MPI_INT64_T, mpi_op(op), comm_));
        done += piece;
    }
}

void MpiCommunicator::check_offsets(std::span<const std::size_t> offsets, std::size_t full, std::size_t shard) const
{
    SELM_EXPECT(offsets.size() == static_cast<std::size_t>(size_) + 1);
    SELM_EXPECT(std::is_sorted(offsets.begin(), offsets.end()));
    SELM_EXPECT(offsets.back() <= full);
    const auto own = static_cast<std::size_t>(rank_);
    SELM_EXPECT(shard == offsets[own + 1] - offsets[own]);
}

void MpiCommunicator::reduce_scatter_sum(std::span<const float> full, std::span<const std::size_t> offsets,
                                         std::span<float> shard, std::string_view label)
{
    check_offsets(offsets, full.size(), shard.size());
    ordered_reduce_scatter<float>(
        comm_, full, offsets, shard, [](float a, float b) { return a + b; }, label);
}

void MpiCommunicator::all_gather_shards(std::span<const float> shard, std::span<const std::size_t> offsets,
                                        std::span<float> full, std::string_view label)
{
    check_offsets(offsets, full.size(), shard.size());
    gather_shards<float>(comm_, shard, offsets, full, label);
}

int MpiCommunicator::next_reduce_tag()
{
    const int tag = first_reduce_tag + next_reduce_++ % reduce_tags;
    // After so many it is used again; its former user was started by all ranks, so it can be waited for.
    while (MpiPending* const former = in_flight_with_tag(comm_, tag))
        former->wait();
    return tag;
}

std::unique_ptr<PendingCollective> MpiCommunicator::start_reduce_scatter_sum(std::span<const float> full,
                                                                             std::span<const std::size_t> offsets,
                                                                             std::span<float> shard, std::string_view label)
{
    check_offsets(offsets, full.size(), shard.size());
    const int tag = reduce_scatter_needs_tag(offsets, sizeof(float)) ? next_reduce_tag() : -1;
    return std::make_unique<MpiPending>(start_reduce_scatter(comm_, full, offsets, shard, tag, label), comm_, tag, label);
}

std::unique_ptr<PendingCollective> MpiCommunicator::start_reduce_scatter_sum_bf16(std::span<const std::uint16_t> full,
                                                                                  std::span<const std::size_t> offsets,
                                                                                  std::span<float> shard,
                                                                                  std::string_view label)
{
    check_offsets(offsets, full.size(), shard.size());
    const int tag = reduce_scatter_needs_tag(offsets, sizeof(std::uint16_t)) ? next_reduce_tag() : -1;
    return std::make_unique<MpiPending>(start_reduce_scatter(comm_, full, offsets, shard, tag, label), comm_, tag, label);
}

std::unique_ptr<PendingCollective> MpiCommunicator::start_all_gather_shards(std::span<const float> shard,
                                                                            std::span<const std::size_t> offsets,
                                                                            std::span<float> full, std::string_view label)
{
    check_offsets(offsets, full.size(), shard.size());
    return std::make_unique<MpiPending>(start_gather(comm_, shard, offsets, full, label), comm_, -1, label);
}

std::unique_ptr<PendingCollective> MpiCommunicator::start_exchange(std::span<const Outgoing> outgoing,
                                                                   std::span<const Incoming> incoming, std::string_view label)
{
    for (const Outgoing& message : outgoing)
        SELM_EXPECT(message.rank >= 0 && message.rank < size_);
    for (const Incoming& message : incoming)
        SELM_EXPECT(message.rank >= 0 && message.rank < size_);
    return std::make_unique<MpiPending>(comm::start_exchange(comm_, outgoing, incoming, exchange_tag, label), comm_, -1, label);
}

std::unique_ptr<PendingCollective> MpiCommunicator::start_barrier(std::string_view label)
{
    return std::make_unique<MpiPending>(comm::start_barrier(comm_, label), comm_, -1, label);
}

void MpiCommunicator::forget_finished_sends()
{
    for (auto pending = pending_sends_.begin(); pending != pending_sends_.end();) {
        int done = 0;
        SELM_MPI("send", MPI_Test(&pending->request, &done, MPI_STATUS_IGNORE));
        pending = done != 0 ? pending_sends_.erase(pending) : std::next(pending);
    }
}

void MpiCommunicator::send(int destination, int tag, std::span<const std::byte> data)
{
    SELM_EXPECT(tag >= 0 && tag < first_own_tag);
    SELM_EXPECT(data.size() <= largest_point_to_point);
    SELM_EXPECT(destination >= 0 && destination < size_);
    forget_finished_sends();
    pending_sends_.push_back({MPI_REQUEST_NULL, std::vector<std::byte>(data.begin(), data.end())});
    PendingSend& pending = pending_sends_.back();
    SELM_MPI("send", MPI_Isend(pending.data.data(), to_count(pending.data.size()), MPI_BYTE, destination, tag, comm_,
                               &pending.request));
}

std::optional<Communicator::Message> MpiCommunicator::try_receive(int tag)
{
    SELM_EXPECT(tag >= 0 && tag < first_own_tag);
    forget_finished_sends();
    int found = 0;
    MPI_Message message = MPI_MESSAGE_NULL;
    MPI_Status status;
    SELM_MPI("try_receive", MPI_Improbe(MPI_ANY_SOURCE, tag, comm_, &found, &message, &status));
    if (found == 0)
        return std::nullopt;
    int count = 0;
    SELM_MPI("try_receive", MPI_Get_count(&status, MPI_BYTE, &count));
    Message result{status.MPI_SOURCE, std::vector<std::byte>(static_cast<std::size_t>(count))};
    SELM_MPI("try_receive", MPI_Mrecv(result.data.data(), count, MPI_BYTE, &message, MPI_STATUS_IGNORE));
    return result;
}

std::unique_ptr<Communicator> MpiCommunicator::split_node(std::string_view label, int ranks_at_most)
{
    SELM_EXPECT(ranks_at_most >= 0);
    MPI_Comm node = MPI_COMM_NULL;
    SELM_MPI(label, MPI_Comm_split_type(comm_, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &node));
    auto host = std::make_unique<MpiCommunicator>(node);
    if (ranks_at_most == 0)
        return host;
    MPI_Comm part = MPI_COMM_NULL;
    SELM_MPI(label, MPI_Comm_split(node, host->rank() / ranks_at_most, host->rank(), &part));
    return std::make_unique<MpiCommunicator>(part);
}

std::unique_ptr<Communicator> MpiCommunicator::duplicate(std::string_view label)
{
    MPI_Comm copy = MPI_COMM_NULL;
    SELM_MPI(label, MPI_Comm_dup(comm_, &copy));
    return std::make_unique<MpiCommunicator>(copy);
}

} // namespace selm::comm
