#pragma once

namespace selm::comm {

/// Tags that comm uses on a communicator of the user; users' tags lie below. MPI guarantees tags up to 32767.
constexpr int first_own_tag = 32000;
constexpr int piece_tag = first_own_tag;        ///< blocking all-to-all in pieces
constexpr int exchange_tag = first_own_tag + 1; ///< start_exchange
constexpr int gather_tag = first_own_tag + 2;   ///< start_all_gather_shards beyond the message limit
constexpr int sleep_tag = first_own_tag + 3;    ///< sleeping_barrier
constexpr int first_reduce_tag = first_own_tag + 4;
constexpr int reduce_tags = 512; ///< one per reduce-scatter in flight

} // namespace selm::comm
