#include "selm/comm/stop_condition.hpp"

#include <csignal>
#include <cstdlib>
#include <ctime>
#include <optional>

#include <gtest/gtest.h>

#include "mpi_test.hpp"
#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/base/stop.hpp"
#include "shared_directory.hpp"

namespace selm {
namespace {

using test::test_world;

/// The variables by which a job says when it ends, on this rank; unset again afterwards.
class StopConditionTest : public ::testing::Test {
  protected:
    void TearDown() override
    {
        for (const char* name : {"SLURM_JOB_END_TIME", "SELM_JOB_END_TIME"})
            ::unsetenv(name);
    }
    static void set(const char* name, std::int64_t seconds_from_now)
    {
        ::setenv(name, std::to_string(std::time(nullptr) + seconds_from_now).c_str(), 1);
    }
};

TEST_F(StopConditionTest, WithoutAReasonThereIsNone)
{
    StopCondition stop("", 0, test_world());
    EXPECT_FALSE(stop.here());
    EXPECT_FALSE(stop.agreed(1e9));
}

TEST_F(StopConditionTest, TheFileIsSeenByRankZeroForAll)
{
    const test::SharedDirectory directory(test_world());
    StopCondition stop(directory.path("STOP"), 0, test_world());
    EXPECT_FALSE(stop.agreed());
    test_world().barrier("nobody has seen it");
    if (test_world().is_root())
        write_file_atomically(directory.path("STOP"), "");
    EXPECT_TRUE(stop.agreed());
    EXPECT_EQ(stop.here(), test_world().is_root());
    test_world().barrier("all have seen it");
}

TEST_F(StopConditionTest, RankZerosClockDecidesForAll)
{
    if (test_world().is_root()) // as where a launcher passes no environment on
        set("SELM_JOB_END_TIME", 1000);
    StopCondition stop("", 600, test_world());
    EXPECT_FALSE(stop.agreed());
    EXPECT_FALSE(stop.agreed(test_world().is_root() ? 350 : 1e9)) << "rank 0's need counts";
    EXPECT_TRUE(stop.agreed(test_world().is_root() ? 450 : 0)) << "the next piece would end within the margin";
    EXPECT_FALSE(stop.agreed());
    EXPECT_TRUE(StopCondition("", 1001, test_world()).agreed());
    EXPECT_EQ(StopCondition("", 1001, test_world()).here(), test_world().is_root());
    EXPECT_FALSE(StopCondition("", 0, test_world()).agreed(1e9)) << "off";
}

TEST_F(StopConditionTest, WhatSlurmSaysGoesFirst)
{
    set("SELM_JOB_END_TIME", 1000);
    set("SLURM_JOB_END_TIME", 10);
    EXPECT_TRUE(StopCondition("", 100, test_world()).agreed());
    set("SLURM_JOB_END_TIME", 1000);
    set("SELM_JOB_END_TIME", 10);
    EXPECT_FALSE(StopCondition("", 100, test_world()).agreed());
    set("SLURM_JOB_END_TIME", -std::time(nullptr)); // 0: SLURM does not know
    EXPECT_TRUE(StopCondition("", 100, test_world()).agreed());
}

TEST_F(StopConditionTest, AMarginWithoutAnEndIsRefusedOnEveryRank)
{
    for (const char* value : {"", "soon", "12x", "-5"}) {
        if (*value != '\0')
            ::setenv("SLURM_JOB_END_TIME", value, 1);
        std::optional<Error> error;
        try {
            StopCondition("", 60, test_world());
        } catch (const Error& caught) {
            error.emplace(caught);
        }
        ASSERT_TRUE(error.has_value()) << value;
        EXPECT_EQ(error->code(), ExitCode::usage);
        EXPECT_NE(std::string(error->what()).find("--walltime-margin"), std::string::npos) << error->what();
        EXPECT_NE(std::string(error->what()).find("SLURM_JOB_END_TIME"), std::string::npos) << error->what();
    }
}

TEST_F(StopConditionTest, ASignalToAnyRankStopsAll) // the last of these tests: the flag stays set
{
    StopCondition stop("", 0, test_world());
    install_stop_handlers();
    const bool last = test_world().rank() == test_world().size() - 1;
    if (last)
        std::raise(SIGUSR1);
    EXPECT_EQ(stop.here(), last);
    EXPECT_TRUE(stop.agreed());
}

} // namespace
} // namespace selm
