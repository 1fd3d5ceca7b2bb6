#pragma once

#include <gtest/gtest.h>

#include "message_limit.hpp"

namespace selm::test {

/// Runs each test with a limit of bytes for one MPI call: with a small one every transfer is cut into pieces, as those
/// above 2^31 bytes are.
class WithMessageLimit : public ::testing::TestWithParam<std::size_t> {
  protected:
    void SetUp() override
    {
        normal_ = comm::max_message_bytes();
        comm::set_max_message_bytes(GetParam());
    }
    void TearDown() override { comm::set_max_message_bytes(normal_); }

  private:
    std::size_t normal_ = 0;
};

} // namespace selm::test
