#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "selm/comm/agree.hpp"
#include "selm/data/journal.hpp"

namespace selm {

/// First of the contiguous positions of rank r when n positions are cut over np ranks.
inline std::int64_t block_begin(std::int64_t n, int np, int r)
{
    return n * r / np;
}

/// Rank whose block holds the position.
inline int block_owner(std::int64_t n, int np, std::int64_t position)
{
    return static_cast<int>(((position + 1) * np - 1) / n);
}

/**
 * @brief Sends records, which lie on any rank in any order, to the ranks of their blocks. Collective.
 * @param mine (position, payload) of this rank's records.
 * @returns the payloads of this rank's block in order of position.
 * @throws Error internal on every rank: a position out of range, without a record or with two.
 */
inline std::vector<std::vector<std::byte>> to_blocks(std::int64_t n, std::vector<std::pair<std::int64_t, std::vector<std::byte>>> mine,
                                                     const std::string& what, Communicator& comm)
{
    const int np = comm.size();
    std::vector<PayloadWriter> outgoing(static_cast<std::size_t>(np));
    agree(comm, what, [&] {
        for (const auto& [position, payload] : mine) {
            if (position < 0 || position >= n)
                throw internal_error(cat(what, ": position ", position, " does not exist (the file has ", n, " rows)"));
            PayloadWriter& out = outgoing[static_cast<std::size_t>(block_owner(n, np, position))];
            out.value(position);
            out.array(std::span<const std::byte>(payload));
        }
    });
    std::vector<std::vector<std::byte>> send;
    send.reserve(outgoing.size());
    for (const PayloadWriter& out : outgoing)
        send.push_back(out.bytes());
    const auto received = comm.all_to_all_ragged(send, what);

    const std::int64_t begin = block_begin(n, np, comm.rank());
    const std::int64_t count = block_begin(n, np, comm.rank() + 1) - begin;
    std::vector<std::vector<std::byte>> block(static_cast<std::size_t>(count));
    std::vector<char> filled(static_cast<std::size_t>(count), 0);
    agree(comm, what, [&] {
        for (const auto& bytes : received) {
            PayloadReader in(bytes);
            while (!in.at_end()) {
                const std::int64_t position = in.value<std::int64_t>();
                const auto place = static_cast<std::size_t>(position - begin);
                if (filled[place]++ != 0)
                    throw internal_error(cat(what, ": position ", position, " was recorded twice"));
                block[place] = in.array<std::byte>();
            }
        }
        for (std::size_t i = 0; i < filled.size(); ++i)
            if (filled[i] == 0)
                throw internal_error(cat(what, ": position ", begin + static_cast<std::int64_t>(i), " has no record"));
    });
    return block;
}

} // namespace selm
