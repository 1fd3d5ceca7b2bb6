#include "mpi_communicator.hpp"

#include <algorithm>
#include <exception>
#include <numeric>

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

MPI_Op mpi_op(ReduceOp op)
{
    switch (op) {
    case ReduceOp::sum: return MPI_SUM;
    case ReduceOp::min: return MPI_MIN;
    case ReduceOp::max: return MPI_MAX;
    }
    return MPI_SUM;
}

/// Bytes of a blocking reduction's buffer, at most: gradients of gigabytes must not exist twice.
constexpr std::size_t most_buffer_bytes = std::size_t{64} << 20;

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

MpiCommunicator::MpiCommunicator(MPI_Comm comm, std::uint64_t name)
    : comm_(comm), calls_(comm, name), exceptions_at_start_(std::uncaught_exceptions())
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
    MPI_Request request = MPI_REQUEST_NULL;
    SELM_MPI(label, MPI_Ibarrier(comm_, &request));
    wait_for(request, calls_.collective(label), 0);
}

void MpiCommunicator::sleeping_barrier(std::string_view label, const std::function<void()>& poll)
{
    const auto operation = start_message_barrier(comm_, label);
    wait_until(calls_.uncounted(label), Pausing::sleeping, [&] { return operation->advance(); }, poll);
}

void MpiCommunicator::broadcast_pieces(std::span<std::byte> data, int root, const Call& call)
{
    for (std::size_t done = 0; done < data.size();) {
        const std::size_t piece = std::min(data.size() - done, max_message_bytes());
        MPI_Request request = MPI_REQUEST_NULL;
        SELM_MPI(call.label, MPI_Ibcast(data.data() + done, to_count(piece), MPI_BYTE, root, comm_, &request));
        wait_for(request, call, piece);
        done += piece;
    }
}

void MpiCommunicator::broadcast(std::span<std::byte> data, int root, std::string_view label)
{
    broadcast_pieces(data, root, calls_.collective(label));
}

void MpiCommunicator::gather_blocks(std::span<const std::byte> send, std::span<std::byte> recv, const Call& call)
{
    const int count = to_count(send.size());
    MPI_Request request = MPI_REQUEST_NULL;
    SELM_MPI(call.label, MPI_Iallgather(send.data(), count, MPI_BYTE, recv.data(), count, MPI_BYTE, comm_, &request));
    wait_for(request, call, recv.size());
}

void MpiCommunicator::all_gather(std::span<const std::byte> send, std::span<std::byte> recv, std::string_view label)
{
    const auto ranks = static_cast<std::size_t>(size_);
    SELM_EXPECT(recv.size() == send.size() * ranks);
    const Call call = calls_.collective(label);
    if (recv.size() <= max_message_bytes()) {
        gather_blocks(send, recv, call);
        return;
    }
    const std::size_t round = std::max<std::size_t>(1, max_message_bytes() / ranks);
    std::vector<std::byte> incoming(round * ranks);
    for (std::size_t done = 0; done < send.size(); done += round) {
        const std::size_t piece = std::min(round, send.size() - done);
        gather_blocks(send.subspan(done, piece), std::span<std::byte>(incoming).first(piece * ranks), call);
        for (std::size_t r = 0; r < ranks; ++r)
            std::copy_n(incoming.data() + r * piece, piece, recv.data() + r * send.size() + done);
    }
}

std::vector<std::vector<std::byte>> MpiCommunicator::all_gather_ragged(std::span<const std::byte> send, std::string_view label)
{
    const Call call = calls_.collective(label);
    const auto ranks = static_cast<std::size_t>(size_);
    const std::uint64_t own = send.size();
    std::vector<std::uint64_t> bytes(ranks);
    gather_blocks(std::as_bytes(std::span<const std::uint64_t>(&own, 1)), std::as_writable_bytes(std::span<std::uint64_t>(bytes)),
                  call);
    std::vector<std::vector<std::byte>> result(ranks);
    for (std::size_t r = 0; r < ranks; ++r)
        result[r].resize(bytes[r]);
    const std::uint64_t total = std::accumulate(bytes.begin(), bytes.end(), std::uint64_t{0});
    if (total > max_message_bytes()) {
        std::copy(send.begin(), send.end(), result[static_cast<std::size_t>(rank_)].begin());
        for (int r = 0; r < size_; ++r)
            broadcast_pieces(result[static_cast<std::size_t>(r)], r, call);
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
    MPI_Request request = MPI_REQUEST_NULL;
    SELM_MPI(label, MPI_Iallgatherv(send.data(), to_count(own), MPI_BYTE, incoming.data(), counts.data(), starts.data(), MPI_BYTE,
                                    comm_, &request));
    wait_for(request, call, total);
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
    const Call call = calls_.collective(label);
    MPI_Request request = MPI_REQUEST_NULL;
    SELM_MPI(label, MPI_Ialltoall(send_bytes.data(), 1, MPI_UINT64_T, receive_bytes.data(), 1, MPI_UINT64_T, comm_, &request));
    wait_for(request, call, ranks * sizeof(std::uint64_t));
    // No copies on the way: what is sent lies where the caller has it, what comes goes where the caller will have it.
    std::vector<std::vector<std::byte>> result(ranks);
    std::vector<Outgoing> outgoing;
    std::vector<Incoming> incoming;
    for (int step = 1; step < size_; ++step) { // not all ranks at one rank first
        const int destination = (rank_ + step) % size_, source = (rank_ - step + size_) % size_;
        const auto& data = send[static_cast<std::size_t>(destination)];
        auto& place = result[static_cast<std::size_t>(source)];
        place.resize(receive_bytes[static_cast<std::size_t>(source)]);
        if (!data.empty())
            outgoing.push_back({destination, data});
        if (!place.empty())
            incoming.push_back({source, place});
    }
    const auto operation = comm::start_exchange(comm_, outgoing, incoming, piece_tag, label);
    result[static_cast<std::size_t>(rank_)] = send[static_cast<std::size_t>(rank_)];
    wait_until(call, Pausing::bulk, [&] { return operation->advance(); });
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
    const std::span<double> shard = data.subspan(offsets[own], elements_of(offsets, own));
    const Call call = calls_.collective(label);
    const ReducePlan plan = plan_reduce(offsets, sizeof(double), most_buffer_bytes);
    finish(start_reduce_scatter(comm_, data, offsets, shard, op, plan, tag_for(plan), label), call);
    finish(start_gather(comm_, shard, offsets, data, label), call);
}

void MpiCommunicator::all_reduce(std::span<std::int64_t> data, ReduceOp op, std::string_view label)
{
    const Call call = calls_.collective(label);
    const std::size_t limit = max_message_bytes() / sizeof(std::int64_t);
    for (std::size_t done = 0; done < data.size();) {
        const std::size_t piece = std::min(limit, data.size() - done);
        MPI_Request request = MPI_REQUEST_NULL;
        SELM_MPI(label, MPI_Iallreduce(MPI_IN_PLACE, data.data() + done, to_count(piece), MPI_INT64_T, mpi_op(op), comm_,
                                       &request));
        wait_for(request, call, piece * sizeof(std::int64_t));
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

int MpiCommunicator::tag_for(const ReducePlan& plan)
{
    if (!plan.in_rounds)
        return -1;
    const int tag = first_reduce_tag + next_reduce_++ % reduce_tags;
    // After so many it is used again; its former user was started by all ranks, so it can be waited for.
    while (MpiPending* const former = in_flight_with_tag(comm_, tag))
        former->wait();
    return tag;
}

void MpiCommunicator::finish(const std::unique_ptr<Operation>& operation, const Call& call)
{
    wait_until(call, Pausing::bulk, [&] { return operation->advance(); });
}

void MpiCommunicator::reduce_scatter_sum(std::span<const float> full, std::span<const std::size_t> offsets,
                                         std::span<float> shard, std::string_view label)
{
    check_offsets(offsets, full.size(), shard.size());
    const ReducePlan plan = plan_reduce(offsets, sizeof(float), most_buffer_bytes);
    const Call call = calls_.collective(label);
    finish(start_reduce_scatter(comm_, full, offsets, shard, plan, tag_for(plan), label), call);
}

void MpiCommunicator::all_gather_shards(std::span<const float> shard, std::span<const std::size_t> offsets,
                                        std::span<float> full, std::string_view label)
{
    check_offsets(offsets, full.size(), shard.size());
    const Call call = calls_.collective(label);
    finish(start_gather(comm_, shard, offsets, full, label), call);
}

std::unique_ptr<PendingCollective> MpiCommunicator::start_reduce_scatter_sum(std::span<const float> full,
                                                                             std::span<const std::size_t> offsets,
                                                                             std::span<float> shard, std::string_view label)
{
    check_offsets(offsets, full.size(), shard.size());
    const ReducePlan plan = plan_reduce(offsets, sizeof(float), full.size_bytes());
    const int tag = tag_for(plan);
    return std::make_unique<MpiPending>(start_reduce_scatter(comm_, full, offsets, shard, plan, tag, label),
                                        calls_.collective(label), tag);
}

std::unique_ptr<PendingCollective> MpiCommunicator::start_reduce_scatter_sum_bf16(std::span<const std::uint16_t> full,
                                                                                  std::span<const std::size_t> offsets,
                                                                                  std::span<float> shard,
                                                                                  std::string_view label)
{
    check_offsets(offsets, full.size(), shard.size());
    const ReducePlan plan = plan_reduce(offsets, sizeof(std::uint16_t), full.size_bytes());
    const int tag = tag_for(plan);
    return std::make_unique<MpiPending>(start_reduce_scatter(comm_, full, offsets, shard, plan, tag, label),
                                        calls_.collective(label), tag);
}

std::unique_ptr<PendingCollective> MpiCommunicator::start_all_gather_shards(std::span<const float> shard,
                                                                            std::span<const std::size_t> offsets,
                                                                            std::span<float> full, std::string_view label)
{
    check_offsets(offsets, full.size(), shard.size());
    return std::make_unique<MpiPending>(start_gather(comm_, shard, offsets, full, label), calls_.collective(label), -1);
}

std::unique_ptr<PendingCollective> MpiCommunicator::start_exchange(std::span<const Outgoing> outgoing,
                                                                   std::span<const Incoming> incoming, std::string_view label)
{
    for (const Outgoing& message : outgoing)
        SELM_EXPECT(message.rank >= 0 && message.rank < size_);
    for (const Incoming& message : incoming)
        SELM_EXPECT(message.rank >= 0 && message.rank < size_);
    return std::make_unique<MpiPending>(comm::start_exchange(comm_, outgoing, incoming, exchange_tag, label),
                                        calls_.uncounted(label), -1);
}

std::unique_ptr<PendingCollective> MpiCommunicator::start_barrier(std::string_view label)
{
    return std::make_unique<MpiPending>(comm::start_barrier(comm_, label), calls_.collective(label), -1);
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
    answer_watchdogs();
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

// MPI makes communicators only in blocking calls: a watched barrier before them finds ranks that do not come.
std::unique_ptr<Communicator> MpiCommunicator::split_node(std::string_view label, int ranks_at_most)
{
    SELM_EXPECT(ranks_at_most >= 0);
    barrier(label);
    MPI_Comm node = MPI_COMM_NULL;
    SELM_MPI(label, MPI_Comm_split_type(comm_, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &node));
    auto host = std::make_unique<MpiCommunicator>(node, calls_.name_of_child(first_rank_of(node, label)));
    if (ranks_at_most == 0)
        return host;
    MPI_Comm part = MPI_COMM_NULL;
    SELM_MPI(label, MPI_Comm_split(node, host->rank() / ranks_at_most, host->rank(), &part));
    return std::make_unique<MpiCommunicator>(part, calls_.name_of_child(first_rank_of(part, label)));
}

std::unique_ptr<Communicator> MpiCommunicator::duplicate(std::string_view label)
{
    barrier(label);
    MPI_Comm copy = MPI_COMM_NULL;
    SELM_MPI(label, MPI_Comm_dup(comm_, &copy));
    return std::make_unique<MpiCommunicator>(copy, calls_.name_of_child(0));
}

int MpiCommunicator::first_rank_of(MPI_Comm part, std::string_view label) const
{
    MPI_Group whole_group = MPI_GROUP_NULL;
    MPI_Group part_group = MPI_GROUP_NULL;
    SELM_MPI(label, MPI_Comm_group(comm_, &whole_group));
    SELM_MPI(label, MPI_Comm_group(part, &part_group));
    const int first = 0;
    int translated = 0;
    SELM_MPI(label, MPI_Group_translate_ranks(part_group, 1, &first, whole_group, &translated));
    MPI_Group_free(&whole_group);
    MPI_Group_free(&part_group);
    return translated;
}

} // namespace selm::comm
