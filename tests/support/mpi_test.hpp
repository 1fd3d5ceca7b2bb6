#pragma once

#include <cstddef>

#include "selm/comm/communicator.hpp"

namespace selm::test {

/// All ranks of this test run.
Communicator& test_world();
inline std::size_t rank_count() { return static_cast<std::size_t>(test_world().size()); }
inline std::size_t own_rank() { return static_cast<std::size_t>(test_world().rank()); }

} // namespace selm::test
