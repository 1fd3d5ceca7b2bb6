#pragma once

#include <string>

#include "selm/comm/communicator.hpp"

namespace selm {

/// Rank 0 claims what a phase is about to write (base/attempt.hpp: claim_output). Collective over comm.
/// @throws Error on every rank: io; stopped when a newer attempt has it.
void claim_phase_output(const std::string& path, Communicator& comm);

} // namespace selm
