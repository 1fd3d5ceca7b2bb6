// Main of the MPI tests: every rank runs all tests; the exit code is the largest of all ranks, a failing rank tells its
// failures with its number in front, and a watchdog ends a rank that hangs (the name of the test is printed).

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>

#include <gtest/gtest.h>
#include <unistd.h>

#include "selm/comm/session.hpp"

#ifdef SELM_TEST_WITH_KOKKOS
#include <Kokkos_Core.hpp>
#endif

#include "mpi_test.hpp"

namespace {

selm::Communicator* world = nullptr;
char current_test[256] = "(start)"; // read by the signal handler
char rank_prefix[48] = "";

void write_stderr(const char* text)
{
    [[maybe_unused]] const auto written = ::write(STDERR_FILENO, text, std::strlen(text));
}

extern "C" void on_watchdog(int)
{
    write_stderr(rank_prefix);
    write_stderr("watchdog: the time is over in test ");
    write_stderr(current_test);
    write_stderr("\n");
    ::_exit(124);
}

void start_watchdog()
{
    const char* text = std::getenv("SELM_TEST_WATCHDOG_S");
    const int seconds = text != nullptr ? std::atoi(text) : 100;
    if (seconds > 0) {
        std::signal(SIGALRM, on_watchdog);
        ::alarm(static_cast<unsigned>(seconds));
    }
}

/// Quiet where all is well (rank 0 lists the tests), each failure with the rank's prefix.
class RankListener : public ::testing::EmptyTestEventListener {
  public:
    void OnTestStart(const ::testing::TestInfo& info) override
    {
        std::snprintf(current_test, sizeof current_test, "%s.%s", info.test_suite_name(), info.name());
    }
    void OnTestPartResult(const ::testing::TestPartResult& result) override
    {
        if (!result.failed() && !result.skipped())
            return;
        std::ostringstream out;
        std::istringstream lines(result.message());
        out << rank_prefix << current_test << (result.failed() ? " FAILED " : " skipped ")
            << (result.file_name() != nullptr ? result.file_name() : "?") << ":" << result.line_number() << "\n";
        for (std::string line; std::getline(lines, line);)
            out << rank_prefix << "  " << line << "\n";
        write_stderr(out.str().c_str());
    }
    void OnTestEnd(const ::testing::TestInfo& info) override
    {
        if (world->is_root() && info.result()->Passed())
            std::printf("passed on rank 0: %s (%lld ms)\n", current_test,
                        static_cast<long long>(info.result()->elapsed_time()));
    }
};

} // namespace

namespace selm::test {

Communicator& test_world()
{
    return *world;
}

} // namespace selm::test

int main(int argc, char** argv)
{
    ::testing::InitGoogleTest(&argc, argv);
    start_watchdog();
    int code = 70;
    {
        selm::MpiSession session(argc, argv);
        world = &session.world();
        std::snprintf(rank_prefix, sizeof rank_prefix, "[rank %d/%d] ", world->rank(), world->size());
        try {
#ifdef SELM_TEST_WITH_KOKKOS
            Kokkos::ScopeGuard kokkos(argc, argv);
#endif
            auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
            delete listeners.Release(listeners.default_result_printer());
            listeners.Append(new RankListener);
            const int own_code = RUN_ALL_TESTS();
            const auto largest = selm::all_reduce_value(*world, static_cast<std::int64_t>(own_code), selm::ReduceOp::max,
                                                        "result of the tests");
            const auto tests = ::testing::UnitTest::GetInstance()->test_to_run_count();
            if (world->is_root())
                std::printf("%d tests on %d ranks: %s\n", tests, world->size(), largest == 0 ? "passed" : "FAILED");
            code = tests == 0 ? 1 : static_cast<int>(largest);
        } catch (const std::exception& error) {
            std::fprintf(stderr, "%sunexpected: %s\n", rank_prefix, error.what());
            session.abort(70);
        }
    }
    return code;
}
