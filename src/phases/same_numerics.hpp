#pragma once

#include <string>

#include "selm/comm/communicator.hpp"

namespace selm {

/**
 * @brief Do all ranks multiply alike? Rows go to whichever rank is free, so a job over two kinds of CPU, of which one multiplies
 * bf16 numbers and the other does not, would give results that depend on the hand-out. Collective.
 * @param own Engine::numerics() of this rank.
 * @throws Error configuration on all ranks, naming a rank and host of each kind.
 */
void check_same_numerics(const std::string& own, Communicator& comm);

} // namespace selm
