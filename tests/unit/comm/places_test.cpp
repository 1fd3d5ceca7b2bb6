#include "selm/comm/places.hpp"

#include <thread>

#include <gtest/gtest.h>
#include <sched.h>

namespace {

using namespace selm;
using Lines = std::vector<std::string>;

/// The only line, without its advice in brackets and behind.
std::string finding(const Lines& lines)
{
    return lines.size() == 1 ? lines[0].substr(0, lines[0].find(" (they")) : std::to_string(lines.size()) + " lines";
}

TEST(NumberRanges, JoinNeighbours)
{
    EXPECT_EQ(number_ranges(std::vector<int>{}), "");
    EXPECT_EQ(number_ranges(std::vector<int>{3}), "3");
    EXPECT_EQ(number_ranges(std::vector<int>{0, 1}), "0,1");
    EXPECT_EQ(number_ranges(std::vector<int>{0, 1, 2, 3, 8, 10, 11, 12}), "0-3,8,10-12");
}

TEST(Places, OfThisProcess)
{
    cpu_set_t set;
    ASSERT_EQ(sched_getaffinity(0, sizeof set, &set), 0);
    const auto alone = make_single_communicator();
    const auto places = find_places(*alone, false);
    ASSERT_EQ(places.size(), 1u);
    EXPECT_EQ(places[0].device, "cpu");
    EXPECT_FALSE(places[0].host.empty());
    EXPECT_EQ(static_cast<int>(places[0].cores.size()), CPU_COUNT(&set));
    for (const int core : places[0].cores)
        EXPECT_TRUE(CPU_ISSET(core, &set)) << core;
}

TEST(Places, OfABoundThread)
{
    std::thread([] { // affinity belongs to the thread: the others keep theirs
        cpu_set_t set;
        ASSERT_EQ(sched_getaffinity(0, sizeof set, &set), 0);
        int last = CPU_SETSIZE - 1;
        while (!CPU_ISSET(last, &set))
            --last;
        CPU_ZERO(&set);
        CPU_SET(last, &set);
        ASSERT_EQ(sched_setaffinity(0, sizeof set, &set), 0);
        EXPECT_EQ(find_places(*make_single_communicator(), false)[0].cores, std::vector<int>{last});
    }).join();
}

std::vector<RankPlace> two_hosts(std::vector<int> first, std::vector<int> second)
{
    return {{"n1", first, "cpu"}, {"n1", second, "cpu"}, {"n2", first, "cpu"}, {"n2", second, "cpu"}};
}

TEST(DescribePlaces, GroupsHostsThatAreAlike)
{
    EXPECT_EQ(describe_places(two_hosts({0, 1}, {2, 3})), (Lines{"ranks 0-3: 2 hosts (n1, n2), on each cores 0,1 | 2,3, device cpu"}));
    EXPECT_EQ(describe_places(two_hosts({0, 1, 2, 3}, {0, 1, 2, 3})), (Lines{"ranks 0-3: 2 hosts (n1, n2), on each cores 0-3 (all of them each), device cpu"}));
    auto different = two_hosts({0}, {1});
    different[3].cores = {7};
    EXPECT_EQ(describe_places(different), (Lines{"ranks 0,1: n1, cores 0 | 1, device cpu", "ranks 2,3: n2, cores 0 | 7, device cpu"}));
}

TEST(DescribePlaces, NamesGpusAndFoldsManyHosts)
{
    std::vector<RankPlace> places;
    for (int host = 0; host < 64; ++host)
        for (int rank = 0; rank < 2; ++rank)
            places.push_back({"nid" + std::to_string(100 + host), {rank}, "cuda:" + std::to_string(rank) + " H100 (bus " + std::to_string(host) + ")"});
    EXPECT_EQ(describe_places(places), (Lines{"ranks 0-127: 64 hosts (nid100 ... nid163), on each cores 0 | 1, device cuda:0 H100 | cuda:1 H100"}));
    EXPECT_EQ(describe_places(std::span(places).first(1)), (Lines{"rank 0: nid100, cores 0, device cuda:0 H100 (bus 0)"}));
}

TEST(SharedCores, AreWarnedOf)
{
    EXPECT_TRUE(warn_of_shared_cores(two_hosts({0}, {1}), 1).empty());
    EXPECT_TRUE(warn_of_shared_cores(two_hosts({0, 1}, {0, 1}), 1).empty());
    EXPECT_EQ(finding(warn_of_shared_cores(two_hosts({5}, {5}), 1)), "2 hosts (n1, n2): 2 ranks x 1 thread on core 5");
    EXPECT_EQ(finding(warn_of_shared_cores(two_hosts({0, 1}, {1, 2}), 2)), "2 hosts (n1, n2): 2 ranks x 2 threads on cores 0-2");
    EXPECT_EQ(finding(warn_of_shared_cores(two_hosts({0}, {1, 2}), 2)), "2 hosts (n1, n2): 1 rank x 2 threads on core 0");
    // The wide mask does not help the two that are bound to one core.
    const std::vector<RankPlace> mixed{{"n", {0, 1, 2, 3}, "cpu"}, {"n", {2}, "cpu"}, {"n", {2}, "cpu"}};
    EXPECT_EQ(finding(warn_of_shared_cores(mixed, 1)), "n: 2 ranks x 1 thread on core 2");
}

TEST(SharedCores, NothingIsSaidWhereTheSystemDoesNotTell)
{
    EXPECT_TRUE(warn_of_shared_cores(two_hosts({}, {}), 4).empty());
}

} // namespace
