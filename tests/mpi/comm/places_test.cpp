#include "selm/comm/places.hpp"

#include <gtest/gtest.h>
#include <sched.h>

#include "mpi_test.hpp"

namespace selm {
namespace {

TEST(Places, OfAllRanksInRankOrder)
{
    Communicator& world = test::test_world();
    cpu_set_t before, now;
    ASSERT_EQ(sched_getaffinity(0, sizeof before, &before), 0);
    // Even ranks may use their first core, odd ones all.
    std::vector<int> own;
    CPU_ZERO(&now);
    for (int core = 0; core < CPU_SETSIZE; ++core)
        if (CPU_ISSET(core, &before) && (own.empty() || world.rank() % 2 == 1)) {
            own.push_back(core);
            CPU_SET(core, &now);
        }
    ASSERT_EQ(sched_setaffinity(0, sizeof now, &now), 0);
    const std::vector<RankPlace> places = find_places(world, false);
    ASSERT_EQ(sched_setaffinity(0, sizeof before, &before), 0);

    ASSERT_EQ(places.size(), static_cast<std::size_t>(world.size()));
    EXPECT_EQ(places[static_cast<std::size_t>(world.rank())].cores, own);
    for (std::size_t rank = 0; rank < places.size(); ++rank) {
        EXPECT_EQ(places[rank].host, places[0].host);
        EXPECT_EQ(places[rank].device, "cpu");
        EXPECT_TRUE(rank % 2 == 1 || places[rank].cores.size() == 1) << rank;
    }
}

} // namespace
} // namespace selm
