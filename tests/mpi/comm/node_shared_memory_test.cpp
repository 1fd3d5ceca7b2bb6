#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include <gtest/gtest.h>

#include "mpi_test.hpp"
#include "node_shared_memory.hpp"
#include "selm/base/error.hpp"
#include "selm/comm/communicator.hpp"

namespace selm {
namespace {

/// false: where MPI puts it; true: /dev/shm is declared full, so the file in TMPDIR is used.
class SharedMemory : public testing::TestWithParam<bool> {
  protected:
    void SetUp() override
    {
        comm::set_shared_memory_reserve(GetParam() ? std::numeric_limits<std::size_t>::max() : 0);
    }
    void TearDown() override { comm::set_shared_memory_reserve(std::size_t{16} << 20); }
};

TEST_P(SharedMemory, IsZeroAndSharedByAllRanks)
{
    const auto node = test::test_world().split_node("node");
    constexpr std::size_t per_rank = 100000;
    const std::size_t bytes = per_rank * static_cast<std::size_t>(node->size());
    NodeSharedMemory memory(*node, bytes, "test memory");
    ASSERT_EQ(memory.bytes(), bytes);
    ASSERT_NE(memory.data(), nullptr);
    EXPECT_EQ(std::count(memory.data(), memory.data() + bytes, std::byte{0}), static_cast<std::ptrdiff_t>(bytes));
    memory.fence(); // all have looked
    std::memset(memory.data() + per_rank * static_cast<std::size_t>(node->rank()), node->rank() + 1, per_rank);
    memory.fence();
    for (int r = 0; r < node->size(); ++r) {
        const auto* const begin = memory.data() + per_rank * static_cast<std::size_t>(r);
        EXPECT_EQ(std::count(begin, begin + per_rank, static_cast<std::byte>(r + 1)), static_cast<std::ptrdiff_t>(per_rank));
    }
    memory.fence();
}

TEST_P(SharedMemory, EmptyIsAllowed)
{
    const auto node = test::test_world().split_node("node");
    NodeSharedMemory memory(*node, 0, "nothing");
    EXPECT_EQ(memory.bytes(), 0U);
    memory.fence();
}

INSTANTIATE_TEST_SUITE_P(WindowAndFile, SharedMemory, testing::Bool(),
                         [](const auto& info) { return info.param ? std::string("File") : std::string("Window"); });

TEST(SharedMemoryErrors, NoRoomAnywhereIsAnIoErrorOnAllRanks)
{
    const auto node = test::test_world().split_node("node");
    const std::size_t absurd = std::size_t{1} << 60;
    try {
        const NodeSharedMemory memory(*node, absurd, "weights");
        FAIL() << "an exbibyte was given out";
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::io);
        EXPECT_NE(std::string(error.what()).find("weights"), std::string::npos);
    }
}

} // namespace
} // namespace selm
