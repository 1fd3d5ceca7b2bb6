#include "selm/data/work_queue.hpp"

#include <chrono>
#include <thread>

#include <gtest/gtest.h>

#include "mpi_test.hpp"
#include "selm/base/error.hpp"

namespace selm {
namespace {

using Clock = std::chrono::steady_clock;
using test::test_world;

constexpr std::chrono::seconds patience(20);

/// Works on one item for as long as nobody stops it; true: it was stopped.
bool work_until_stopped(WorkQueue& queue)
{
    const Clock::time_point start = Clock::now();
    while (!queue.stopped() && Clock::now() - start < patience) {
        queue.poll();
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return queue.stopped();
}

/// All queues so far are through; the barriers keep those of later ones away.
void expect_no_message()
{
    test_world().barrier("after the queue");
    EXPECT_FALSE(test_world().try_receive(1) || test_world().try_receive(2)) << "a message is left";
    test_world().barrier("before the next queue");
}

/// A rank with full hands asks for nothing, and hears of a stop all the same.
void expect_stop_reaches_busy_ranks(int stopping_rank, std::int64_t item_count)
{
    Communicator& world = test_world();
    std::vector<std::int64_t> items(static_cast<std::size_t>(item_count));
    for (std::size_t i = 0; i < items.size(); ++i)
        items[i] = static_cast<std::int64_t>(i);
    WorkQueue queue(world, items, {.initial_per_rank = 1, .prefetch = 1});
    bool heard = false;
    const bool stopped = run_queue(world, queue, "busy ranks", [&](WorkQueue& work) {
        while (work.try_next().state == WorkQueue::State::waiting)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        if (world.rank() == stopping_rank) {
            const Clock::time_point start = Clock::now();
            while (Clock::now() - start < std::chrono::milliseconds(100)) {
                work.poll();
                std::this_thread::sleep_for(std::chrono::milliseconds(1));
            }
            work.stop();
        }
        heard = work_until_stopped(work);
    });
    EXPECT_TRUE(heard) << "rank " << world.rank();
    EXPECT_TRUE(stopped);
    expect_no_message();
}

TEST(WorkQueueStop, ReachesRanksThatAskForNothing)
{
    for (const int rank : {0, test_world().size() - 1}) {
        expect_stop_reaches_busy_ranks(rank, 100);                 // more work is there
        expect_stop_reaches_busy_ranks(rank, test_world().size()); // each rank has its last item
    }
}

TEST(WorkQueueStop, AnErrorOfOneRankEndsTheOthers)
{
    Communicator& world = test_world();
    const int failing = world.size() - 1;
    std::vector<std::int64_t> items(40, 0);
    WorkQueue queue(world, items, {.initial_per_rank = 1, .prefetch = 1});
    bool stopped = false;
    try {
        run_queue(world, queue, "failing", [&](WorkQueue& work) {
            if (world.rank() == failing)
                throw data_error("this rank fails");
            stopped = work_until_stopped(work);
        });
        FAIL() << "no error";
    } catch (const Error& error) {
        EXPECT_STREQ(error.what(), "this rank fails");
    }
    EXPECT_TRUE(stopped || world.rank() == failing);
    expect_no_message();
}

TEST(WorkQueueStop, AQuietEndLeavesNoMessage)
{
    Communicator& world = test_world();
    for (int repeat = 0; repeat < 20; ++repeat) {
        std::vector<std::int64_t> items(static_cast<std::size_t>(repeat), 5);
        WorkQueue queue(world, items, {.initial_per_rank = 1, .prefetch = 3});
        std::int64_t mine = 0;
        EXPECT_FALSE(run_queue(world, queue, "quiet", [&](WorkQueue& work) {
            while (work.next())
                ++mine;
        }));
        EXPECT_EQ(all_reduce_value(world, mine, ReduceOp::sum, "items"), repeat);
        expect_no_message();
    }
}

} // namespace
} // namespace selm
