#include "selm/data/work_queue.hpp"

#include <algorithm>
#include <numeric>

#include <gtest/gtest.h>
#include <unistd.h>

#include "mpi_test.hpp"
#include "selm/base/error.hpp"

namespace selm {
namespace {

using test::test_world;

std::vector<std::int64_t> items_of(std::int64_t n)
{
    std::vector<std::int64_t> items(static_cast<std::size_t>(n));
    std::iota(items.begin(), items.end(), 500);
    return items;
}

/// What all ranks took, sorted.
std::vector<std::int64_t> taken_everywhere(const std::vector<std::int64_t>& mine, Communicator& comm)
{
    std::vector<std::int64_t> all;
    for (const auto& bytes : comm.all_gather_ragged(std::as_bytes(std::span<const std::int64_t>(mine)), "taken")) {
        const auto* values = reinterpret_cast<const std::int64_t*>(bytes.data());
        all.insert(all.end(), values, values + bytes.size() / sizeof(std::int64_t));
    }
    std::sort(all.begin(), all.end());
    return all;
}

void expect_no_message_left(Communicator& comm, int tag)
{
    comm.barrier("all have drained");
    EXPECT_FALSE(comm.try_receive(tag).has_value());
    EXPECT_FALSE(comm.try_receive(tag + 1).has_value());
    comm.barrier("all have looked"); // before the next queue sends
}

TEST(Queue, EveryItemGoesToExactlyOneRank)
{
    Communicator& comm = test_world();
    for (const std::int64_t n : {0, 1, 3, 40})
        for (const std::int64_t prefetch : {1, 3})
            for (const std::int64_t initial : {0, 1, 4}) {
                WorkQueue queue(comm, items_of(n), {.tag = 11, .initial_per_rank = initial, .prefetch = prefetch});
                std::vector<std::int64_t> mine;
                const bool stopped = run_queue(comm, queue, "test", [&](WorkQueue& work) {
                    while (const auto item = work.next())
                        mine.push_back(*item);
                });
                EXPECT_FALSE(stopped);
                EXPECT_EQ(queue.taken(), static_cast<std::int64_t>(mine.size()));
                ASSERT_EQ(taken_everywhere(mine, comm), items_of(n)) << n << ' ' << prefetch << ' ' << initial;
                expect_no_message_left(comm, 11);
            }
}

TEST(Queue, FastRanksTakeMore)
{
    Communicator& comm = test_world();
    WorkQueue queue(comm, items_of(60), {.tag = 11, .initial_per_rank = 1, .prefetch = 1});
    std::int64_t mine = 0;
    run_queue(comm, queue, "test", [&](WorkQueue& work) {
        for (;;) {
            const auto next = work.try_next();
            if (next.state == WorkQueue::State::finished)
                return;
            if (next.state == WorkQueue::State::item) {
                ++mine;
                ::usleep(comm.rank() == comm.size() - 1 ? 30000 : 1000);
            } else {
                ::usleep(200);
            }
            work.poll();
        }
    });
    const auto all = all_gather_value(comm, mine, "taken");
    EXPECT_EQ(std::accumulate(all.begin(), all.end(), std::int64_t{0}), 60);
    if (comm.size() > 1) {
        EXPECT_LT(all.back(), 60 / comm.size()) << "the slow rank got an even share";
    }
}

TEST(Queue, TheLastItemsGoToWhoIsOutOfWork)
{
    // The last rank works on its first item until the others have found no more: it may have asked for none meanwhile.
    Communicator& comm = test_world();
    if (comm.size() == 1)
        GTEST_SKIP() << "needs ranks";
    constexpr int done_tag = 21;
    const int slow = comm.size() - 1;
    WorkQueue queue(comm, items_of(2 * comm.size()), {.tag = 11, .initial_per_rank = 1, .prefetch = 1});
    run_queue(comm, queue, "test", [&](WorkQueue& work) {
        for (WorkQueue::State state = WorkQueue::State::item; state != WorkQueue::State::finished;) {
            state = work.try_next().state;
            if (state == WorkQueue::State::waiting)
                ::usleep(200);
            for (int done = 0; comm.rank() == slow && state == WorkQueue::State::item && done < slow;) {
                work.poll();
                if (comm.try_receive(done_tag))
                    ++done;
                else
                    ::usleep(200);
            }
        }
        if (comm.rank() != slow)
            comm.send(slow, done_tag, {});
    });
    const auto all = all_gather_value(comm, queue.taken(), "taken");
    EXPECT_EQ(all.back(), 1);
    EXPECT_EQ(std::accumulate(all.begin(), all.end(), std::int64_t{0}), 2 * comm.size());
    expect_no_message_left(comm, 11);
}

TEST(Queue, StartsWithARoundRobinDeal)
{
    Communicator& comm = test_world();
    WorkQueue queue(comm, items_of(100), {.tag = 11, .initial_per_rank = 2, .prefetch = 1});
    const auto first = queue.next();
    const auto second = queue.next();
    EXPECT_EQ(first, 500 + comm.rank());
    EXPECT_EQ(second, 500 + comm.rank() + comm.size());
    comm.barrier("all have taken");
    queue.stop();
    queue.drain();
    expect_no_message_left(comm, 11);
}

TEST(Queue, StoppingOnOneRankEndsTheHandOutOnAll)
{
    Communicator& comm = test_world();
    WorkQueue queue(comm, items_of(100000), {.tag = 11, .initial_per_rank = 1, .prefetch = 2});
    std::int64_t mine = 0;
    const bool stopped = run_queue(comm, queue, "test", [&](WorkQueue& work) {
        while (work.next()) {
            ++mine;
            ::usleep(500);
            if (comm.rank() == comm.size() - 1 && mine == 5)
                work.stop();
        }
    });
    EXPECT_TRUE(stopped);
    EXPECT_LT(all_reduce_value(comm, mine, ReduceOp::sum, "taken"), 100000);
    expect_no_message_left(comm, 11);
}

TEST(Queue, AnErrorOfOneRankIsThrownByAll)
{
    Communicator& comm = test_world();
    WorkQueue queue(comm, items_of(100000), {.tag = 11, .initial_per_rank = 1, .prefetch = 1});
    std::string message;
    try {
        run_queue(comm, queue, "test", [&](WorkQueue& work) {
            while (work.next()) {
                ::usleep(300);
                if (comm.rank() == comm.size() - 1)
                    throw io_error("the journal is full");
            }
        });
    } catch (const Error& error) {
        message = error.what();
        EXPECT_EQ(error.code(), ExitCode::io);
    }
    EXPECT_NE(message.find("the journal is full"), std::string::npos);
    expect_no_message_left(comm, 11);
}

TEST(Queue, InitialShare)
{
    EXPECT_EQ(initial_share(1000, 4, 16), 16);
    EXPECT_EQ(initial_share(24, 4, 16), 4); // three quarters of 6
    EXPECT_EQ(initial_share(24, 64, 16), 1);
    EXPECT_EQ(initial_share(0, 1, 16), 1);
}

} // namespace
} // namespace selm
