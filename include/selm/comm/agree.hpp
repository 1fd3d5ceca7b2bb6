#pragma once

#include <functional>
#include <string_view>

#include "selm/base/error.hpp"
#include "selm/comm/communicator.hpp"

namespace selm {

/**
 * @brief Runs fallible local work and lets all ranks leave together: when it throws on any rank, every rank throws the
 * Error of the lowest failing rank (other exceptions become `internal`). Collective over comm, also for ranks whose
 * work is empty. @p body must not communicate over comm.
 */
void agree(Communicator& comm, std::string_view label, const std::function<void()>& body);

/// Runs @p body on rank 0 only, agrees, and broadcasts its string result. Collective over comm.
std::string root_string(Communicator& comm, std::string_view label, const std::function<std::string()>& body);

} // namespace selm
