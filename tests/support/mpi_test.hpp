#pragma once

#include "selm/comm/communicator.hpp"

namespace selm::test {

/// All ranks of this test run.
Communicator& test_world();

} // namespace selm::test
