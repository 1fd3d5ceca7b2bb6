// Time of the Communicator's collectives beside plain MPI calls that move as much, and beside a copy in memory.
//
// usage: mpirun -np N selm_comm_benchmark --sizes BYTES[,BYTES...] --repetitions R
//
// Prints one line of JSON per operation and size: seconds of ours, of the peer and of the copy, one value per repetition
// (the slowest rank's), taken in turns. Both sides' results are compared before anything is timed.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iostream>
#include <memory>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include <mpi.h>

#include "selm/base/error.hpp"
#include "selm/comm/communicator.hpp"
#include "selm/comm/session.hpp"

namespace {

using selm::Communicator;
using Bytes = std::vector<std::byte>;

void check(int status)
{
    if (status != MPI_SUCCESS)
        throw selm::internal_error(selm::cat("a plain MPI call failed with code ", status));
}

MPI_Comm plain(const Communicator& comm)
{
    return *static_cast<const MPI_Comm*>(comm.native_handle());
}

/// One operation at one size, both ways. The results of both are bytes that must be equal.
struct Case {
    std::string name, peer;
    std::size_t bytes = 0; ///< of the whole vector, of what a rank sends, or of a message
    std::function<void()> ours, theirs;
    std::function<bool()> equal = [] { return true; };
};

/// Small whole numbers: their sums are exact in any order.
template<typename T>
std::vector<T> values(std::size_t count, int rank)
{
    std::vector<T> result(count);
    for (std::size_t i = 0; i < count; ++i)
        result[i] = static_cast<T>((i * 7 + static_cast<std::size_t>(rank) * 13) % 101);
    return result;
}

std::vector<std::size_t> equal_parts(std::size_t total, int ranks)
{
    std::vector<std::size_t> offsets{0};
    for (int r = 0; r < ranks; ++r)
        offsets.push_back(total * static_cast<std::size_t>(r + 1) / static_cast<std::size_t>(ranks));
    return offsets;
}

/// A vector of floats and its parts, for operations that cut one.
struct Cut {
    Cut(const Communicator& comm, std::size_t bytes)
        : full(values<float>(bytes / sizeof(float), comm.rank())), offsets(equal_parts(full.size(), comm.size()))
    {
        for (int r = 0; r < comm.size(); ++r) {
            const auto i = static_cast<std::size_t>(r);
            counts.push_back(static_cast<int>(offsets[i + 1] - offsets[i]));
            starts.push_back(static_cast<int>(offsets[i]));
        }
        const auto own = static_cast<std::size_t>(counts[static_cast<std::size_t>(comm.rank())]);
        shard.resize(own);
        peer_shard.resize(own);
    }
    std::vector<float> full;
    std::vector<std::size_t> offsets;
    std::vector<int> counts, starts;
    std::vector<float> shard, peer_shard;
};

Case reduce_scatter(Communicator& comm, std::size_t bytes, bool under_way)
{
    const auto cut = std::make_shared<Cut>(comm, bytes);
    Case result{under_way ? "start_reduce_scatter_sum" : "reduce_scatter_sum",
                under_way ? "MPI_Ireduce_scatter" : "MPI_Reduce_scatter", bytes, {}, {}};
    result.equal = [cut] { return cut->shard == cut->peer_shard; };
    if (under_way) {
        result.ours = [&comm, cut] { comm.start_reduce_scatter_sum(cut->full, cut->offsets, cut->shard, "ours")->wait(); };
        result.theirs = [&comm, cut] {
            MPI_Request request = MPI_REQUEST_NULL;
            check(MPI_Ireduce_scatter(cut->full.data(), cut->peer_shard.data(), cut->counts.data(), MPI_FLOAT, MPI_SUM,
                                      plain(comm), &request));
            check(MPI_Wait(&request, MPI_STATUS_IGNORE));
        };
    } else {
        result.ours = [&comm, cut] { comm.reduce_scatter_sum(cut->full, cut->offsets, cut->shard, "ours"); };
        result.theirs = [&comm, cut] {
            check(MPI_Reduce_scatter(cut->full.data(), cut->peer_shard.data(), cut->counts.data(), MPI_FLOAT, MPI_SUM,
                                     plain(comm)));
        };
    }
    return result;
}

Case all_gather(Communicator& comm, std::size_t bytes, bool under_way)
{
    const auto cut = std::make_shared<Cut>(comm, bytes);
    std::copy_n(cut->full.begin() + cut->starts[static_cast<std::size_t>(comm.rank())], cut->shard.size(), cut->shard.begin());
    const auto peer_full = std::make_shared<std::vector<float>>(cut->full.size());
    Case result{under_way ? "start_all_gather_shards" : "all_gather_shards",
                under_way ? "MPI_Iallgatherv" : "MPI_Allgatherv", bytes, {}, {}};
    result.equal = [cut, peer_full] { return cut->full == *peer_full; };
    const auto own = static_cast<int>(cut->shard.size());
    if (under_way) {
        result.ours = [&comm, cut] { comm.start_all_gather_shards(cut->shard, cut->offsets, cut->full, "ours")->wait(); };
        result.theirs = [&comm, cut, peer_full, own] {
            MPI_Request request = MPI_REQUEST_NULL;
            check(MPI_Iallgatherv(cut->shard.data(), own, MPI_FLOAT, peer_full->data(), cut->counts.data(),
                                  cut->starts.data(), MPI_FLOAT, plain(comm), &request));
            check(MPI_Wait(&request, MPI_STATUS_IGNORE));
        };
    } else {
        result.ours = [&comm, cut] { comm.all_gather_shards(cut->shard, cut->offsets, cut->full, "ours"); };
        result.theirs = [&comm, cut, peer_full, own] {
            check(MPI_Allgatherv(cut->shard.data(), own, MPI_FLOAT, peer_full->data(), cut->counts.data(),
                                 cut->starts.data(), MPI_FLOAT, plain(comm)));
        };
    }
    return result;
}

Case all_to_all(Communicator& comm, std::size_t bytes)
{
    const auto cut = std::make_shared<Cut>(comm, bytes);
    const auto send = std::make_shared<std::vector<Bytes>>();
    for (std::size_t r = 0; r < cut->counts.size(); ++r) {
        const auto part = std::as_bytes(std::span(std::as_const(cut->full)).subspan(cut->offsets[r], static_cast<std::size_t>(cut->counts[r])));
        send->emplace_back(part.begin(), part.end());
    }
    const auto received = std::make_shared<std::vector<Bytes>>();
    // Every rank gets its part from each: equal parts where the ranks divide the vector.
    const auto counts = std::make_shared<std::vector<int>>(cut->counts.size(), static_cast<int>(cut->shard.size()));
    const auto starts = std::make_shared<std::vector<int>>();
    for (std::size_t r = 0; r < counts->size(); ++r)
        starts->push_back(static_cast<int>(r * cut->shard.size()));
    const auto peer = std::make_shared<std::vector<float>>(cut->shard.size() * counts->size());
    Case result{"all_to_all_ragged", "MPI_Alltoallv, sizes known", bytes, {}, {}};
    result.ours = [&comm, send, received] { *received = comm.all_to_all_ragged(*send, "ours"); };
    result.theirs = [&comm, cut, counts, starts, peer] {
        check(MPI_Alltoallv(cut->full.data(), cut->counts.data(), cut->starts.data(), MPI_FLOAT, peer->data(), counts->data(),
                            starts->data(), MPI_FLOAT, plain(comm)));
    };
    result.equal = [received, counts, starts, peer] {
        bool same = true;
        for (std::size_t r = 0; r < counts->size(); ++r)
            same = same && (*received)[r].size() == static_cast<std::size_t>((*counts)[r]) * sizeof(float)
                && ((*received)[r].empty()
                    || std::memcmp((*received)[r].data(), peer->data() + (*starts)[r], (*received)[r].size()) == 0);
        return same;
    };
    return result;
}

Case broadcast(Communicator& comm, std::size_t bytes)
{
    const auto data = std::make_shared<std::vector<float>>(values<float>(bytes / sizeof(float), comm.rank()));
    const auto peer = std::make_shared<std::vector<float>>(*data);
    Case result{"broadcast", "MPI_Bcast", bytes, {}, {}};
    result.ours = [&comm, data] { comm.broadcast(std::as_writable_bytes(std::span(*data)), 0, "ours"); };
    result.theirs = [&comm, peer] {
        check(MPI_Bcast(peer->data(), static_cast<int>(peer->size()), MPI_FLOAT, 0, plain(comm)));
    };
    result.equal = [data, peer] { return *data == *peer; };
    return result;
}

Case all_reduce(Communicator& comm, std::size_t bytes)
{
    const auto data = std::make_shared<std::vector<double>>(values<double>(bytes / sizeof(double), comm.rank()));
    const auto peer = std::make_shared<std::vector<double>>(*data);
    Case result{"all_reduce (fp64 sum)", "MPI_Allreduce", bytes, {}, {}};
    result.ours = [&comm, data] { comm.all_reduce(std::span<double>(*data), selm::ReduceOp::sum, "ours"); };
    result.theirs = [&comm, peer] {
        check(MPI_Allreduce(MPI_IN_PLACE, peer->data(), static_cast<int>(peer->size()), MPI_DOUBLE, MPI_SUM, plain(comm)));
    };
    result.equal = [data, peer] { return *data == *peer; };
    return result;
}

/// Every rank sends to the next one.
Case exchange(Communicator& comm, std::size_t bytes)
{
    const auto data = std::make_shared<std::vector<float>>(values<float>(bytes / sizeof(float), comm.rank()));
    const auto received = std::make_shared<std::vector<float>>(data->size());
    const auto peer = std::make_shared<std::vector<float>>(data->size());
    const int to = (comm.rank() + 1) % comm.size(), from = (comm.rank() + comm.size() - 1) % comm.size();
    Case result{"start_exchange", "MPI_Irecv, MPI_Isend", bytes, {}, {}};
    result.ours = [&comm, data, received, to, from] {
        const Communicator::Outgoing outgoing{to, std::as_bytes(std::span(std::as_const(*data)))};
        const Communicator::Incoming incoming{from, std::as_writable_bytes(std::span(*received))};
        comm.start_exchange(std::span(&outgoing, 1), std::span(&incoming, 1), "ours")->wait();
    };
    result.theirs = [&comm, data, peer, to, from] {
        std::vector<MPI_Request> requests(2, MPI_REQUEST_NULL);
        const auto count = static_cast<int>(data->size());
        check(MPI_Irecv(peer->data(), count, MPI_FLOAT, from, 0, plain(comm), requests.data()));
        check(MPI_Isend(data->data(), count, MPI_FLOAT, to, 0, plain(comm), requests.data() + 1));
        check(MPI_Waitall(2, requests.data(), MPI_STATUSES_IGNORE));
    };
    result.equal = [received, peer] { return *received == *peer; };
    return result;
}

Case barrier(Communicator& comm, bool under_way)
{
    Case result{under_way ? "start_barrier" : "barrier", under_way ? "MPI_Ibarrier" : "MPI_Barrier", 0, {}, {}};
    if (under_way) {
        result.ours = [&comm] { comm.start_barrier("ours")->wait(); };
        result.theirs = [&comm] {
            MPI_Request request = MPI_REQUEST_NULL;
            check(MPI_Ibarrier(plain(comm), &request));
            check(MPI_Wait(&request, MPI_STATUS_IGNORE));
        };
    } else {
        result.ours = [&comm] { comm.barrier("ours"); };
        result.theirs = [&comm] { check(MPI_Barrier(plain(comm))); };
    }
    return result;
}

/// Seconds of one call on the slowest rank; short calls are repeated within a sample.
double seconds(Communicator& comm, const std::function<void()>& call, std::size_t bytes)
{
    constexpr std::size_t enough = std::size_t{1} << 22;
    const std::size_t calls = std::clamp<std::size_t>(enough / std::max<std::size_t>(bytes, 1), 1, 50);
    check(MPI_Barrier(plain(comm)));
    const double start = MPI_Wtime();
    for (std::size_t i = 0; i < calls; ++i)
        call();
    double taken = (MPI_Wtime() - start) / static_cast<double>(calls);
    check(MPI_Allreduce(MPI_IN_PLACE, &taken, 1, MPI_DOUBLE, MPI_MAX, plain(comm)));
    return taken;
}

std::string json(const std::vector<double>& values)
{
    std::ostringstream out;
    out.precision(6);
    for (std::size_t i = 0; i < values.size(); ++i)
        out << (i == 0 ? "[" : ", ") << values[i];
    out << "]";
    return out.str();
}

void measure(Communicator& comm, const Case& one, int repetitions)
{
    one.ours();
    one.theirs();
    const bool equal = selm::all_reduce_value(comm, std::int64_t{one.equal() ? 1 : 0}, selm::ReduceOp::min, "equal") == 1;
    if (!equal)
        throw selm::internal_error(selm::cat(one.name, " and ", one.peer, " differ at ", one.bytes, " bytes"));
    Bytes from(one.bytes, std::byte{1}), to(one.bytes, std::byte{2});
    const std::function<void()> copy = [&] {
        std::memcpy(to.data(), from.data(), one.bytes);
        from.front() = to.back(); // so that no copy is left out
    };
    std::vector<double> ours, theirs, copies;
    for (int i = 0; i < repetitions; ++i) {
        if (i % 2 == 0)
            ours.push_back(seconds(comm, one.ours, one.bytes));
        theirs.push_back(seconds(comm, one.theirs, one.bytes));
        if (i % 2 != 0)
            ours.push_back(seconds(comm, one.ours, one.bytes));
        if (one.bytes > 0)
            copies.push_back(seconds(comm, copy, one.bytes));
    }
    if (comm.is_root())
        std::cout << "{\"operation\": \"" << one.name << "\", \"peer\": \"" << one.peer << "\", \"ranks\": " << comm.size()
                  << ", \"bytes\": " << one.bytes << ", \"ours_s\": " << json(ours) << ", \"peer_s\": " << json(theirs)
                  << ", \"copy_s\": " << (copies.empty() ? "[]" : json(copies)) << "}" << std::endl;
}

std::vector<std::size_t> sizes_of(const std::string& words)
{
    std::vector<std::size_t> sizes;
    std::istringstream in(words);
    for (std::string word; std::getline(in, word, ',');) {
        const unsigned long long size = std::stoull(word);
        SELM_VALIDATE(size >= 64 && size % 64 == 0 && size < (1ULL << 31), selm::ExitCode::usage,
                      "--sizes: " << word << " bytes cannot be cut evenly or counted by plain MPI. Use multiples of 64 below 2 GiB");
        sizes.push_back(size);
    }
    return sizes;
}

void run(Communicator& comm, const std::vector<std::string>& words)
{
    std::vector<std::size_t> sizes{1024};
    int repetitions = 3;
    for (std::size_t i = 0; i + 1 < words.size(); i += 2) {
        if (words[i] == "--sizes")
            sizes = sizes_of(words[i + 1]);
        else if (words[i] == "--repetitions")
            repetitions = std::stoi(words[i + 1]);
        else
            throw selm::usage_error(selm::cat(words[i], " is not known. Use --sizes BYTES,... or --repetitions R"));
    }
    measure(comm, barrier(comm, false), repetitions);
    measure(comm, barrier(comm, true), repetitions);
    for (const std::size_t size : sizes) {
        // One case's memory at a time.
        measure(comm, reduce_scatter(comm, size, false), repetitions);
        measure(comm, reduce_scatter(comm, size, true), repetitions);
        measure(comm, all_gather(comm, size, false), repetitions);
        measure(comm, all_gather(comm, size, true), repetitions);
        measure(comm, all_to_all(comm, size), repetitions);
        measure(comm, broadcast(comm, size), repetitions);
        measure(comm, all_reduce(comm, size), repetitions);
        measure(comm, exchange(comm, size), repetitions);
    }
}

} // namespace

int main(int argc, char** argv)
{
    selm::MpiSession session(argc, argv);
    try {
        run(session.world(), {argv + 1, argv + argc});
    } catch (const std::exception& error) {
        std::cerr << "selm_comm_benchmark: " << error.what() << "\n";
        session.abort(70);
    }
    return 0;
}
