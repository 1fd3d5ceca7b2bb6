#include <cstdlib>
#include <numeric>
#include <vector>

#include <gtest/gtest.h>

#include "selm/comm/agree.hpp"
#include "selm/comm/communicator.hpp"
#include "selm/comm/session.hpp"
#include "selm/comm/stop_condition.hpp"

namespace selm {
namespace {

std::vector<std::byte> bytes(std::initializer_list<int> values)
{
    std::vector<std::byte> result;
    for (const int value : values)
        result.push_back(static_cast<std::byte>(value));
    return result;
}

TEST(Session, KnowsWhetherALauncherStartedIt)
{
    if (was_launched())
        GTEST_SKIP() << "started by mpirun or in a batch job";
    for (const char* variable : {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID", "PALS_RANKID"}) {
        ::setenv(variable, "0", 1);
        EXPECT_TRUE(was_launched()) << variable;
        ::unsetenv(variable);
    }
    ::setenv("OMPI_MCA_for_this_test", "1", 1); // a user's settings are no launcher's
    EXPECT_FALSE(was_launched());
    ::unsetenv("OMPI_MCA_for_this_test");
}

TEST(SingleCommunicator, IsAWholeWorldOfOne)
{
    const auto comm = make_single_communicator();
    EXPECT_EQ(comm->rank(), 0);
    EXPECT_EQ(comm->size(), 1);
    EXPECT_EQ(comm->native_handle(), nullptr);
    EXPECT_EQ(all_reduce_value(*comm, 2.5, ReduceOp::sum, "sum"), 2.5);
    EXPECT_EQ(comm->all_gather_ragged(bytes({1, 2}), "ragged").at(0), bytes({1, 2}));
    EXPECT_EQ(comm->all_to_all_ragged({bytes({3})}, "all to all").at(0), bytes({3}));
    const std::vector<float> full{1, 2, 3};
    const std::vector<std::size_t> offsets{0, 3};
    std::vector<float> shard(3);
    comm->reduce_scatter_sum(full, offsets, shard, "reduce scatter");
    EXPECT_EQ(shard, full);
    std::vector<float> back(3);
    comm->all_gather_shards(shard, offsets, back, "gather shards");
    EXPECT_EQ(back, full);
    EXPECT_FALSE(StopCondition("", 0, *comm).agreed());
    EXPECT_THROW(agree(*comm, "label", [] { throw data_error("bad"); }), Error);
}

TEST(SingleCommunicator, DeliversMessagesToItself)
{
    const auto comm = make_single_communicator();
    comm->send(0, 1, bytes({1}));
    comm->send(0, 2, bytes({2}));
    comm->send(0, 1, bytes({3}));
    EXPECT_EQ(comm->try_receive(1)->data, bytes({1}));
    EXPECT_EQ(comm->try_receive(1)->data, bytes({3}));
    EXPECT_FALSE(comm->try_receive(1).has_value());
    EXPECT_EQ(comm->try_receive(2)->data, bytes({2}));
}

TEST(DryRunCommunicator, ShowsOneRanksViewOfAnyNumber)
{
    const int size = 4096;
    const int rank = 4000;
    const auto comm = make_dry_run_communicator(rank, size);
    EXPECT_EQ(comm->rank(), rank);
    EXPECT_EQ(comm->size(), size);
    const auto all = all_gather_value(*comm, 7, "values");
    EXPECT_EQ(std::accumulate(all.begin(), all.end(), 0), 7) << "the others contribute zeros";
    EXPECT_EQ(all[rank], 7);
    std::vector<std::size_t> offsets(size + 1);
    for (std::size_t r = 0; r <= size; ++r)
        offsets[r] = 2 * r;
    std::vector<float> full(2 * size);
    std::iota(full.begin(), full.end(), 0.0F);
    std::vector<float> shard(2);
    comm->reduce_scatter_sum(full, offsets, shard, "reduce scatter");
    EXPECT_EQ(shard, (std::vector<float>{2.0F * rank, 2.0F * rank + 1}));
    comm->send(3, 1, bytes({1})); // vanishes
    EXPECT_FALSE(comm->try_receive(1).has_value());
}

TEST(DryRunCommunicator, RejectsARankOutsideTheSize)
{
    EXPECT_THROW(make_dry_run_communicator(4, 4), Error);
    EXPECT_THROW(make_dry_run_communicator(-1, 4), Error);
}

TEST(NodeSharedMemory, AloneIsPrivateZeroMemory)
{
    const auto comm = make_single_communicator();
    NodeSharedMemory memory(*comm, 5000, "memory");
    for (std::size_t i = 0; i < memory.bytes(); ++i)
        ASSERT_EQ(memory.data()[i], std::byte{0});
    memory.data()[4999] = std::byte{1};
    memory.fence();
}

} // namespace
} // namespace selm
