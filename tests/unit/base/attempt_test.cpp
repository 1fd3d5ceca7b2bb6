#include "selm/base/attempt.hpp"

#include <cstdlib>
#include <filesystem>
#include <string>

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "temporary_directory.hpp"

namespace selm {
namespace {

/// Runs body in another process, which holds the claims of this one and its own.
template<typename Body>
void in_another_process(Body&& body)
{
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
        int code = 1;
        try {
            body();
            code = 0;
        } catch (const Error&) {
        }
        ::_exit(code);
    }
    int status = -1;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_EQ(status, 0);
}

ExitCode code_of_writing(const std::string& path)
{
    try {
        write_file_atomically(path, "new");
    } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()).find("newer attempt, 2, has taken over"), std::string::npos) << error.what();
        return error.code();
    }
    return ExitCode::done;
}

TEST(Attempt, OfAnOutputIsTakenOverByANewerOne)
{
    const test::TemporaryDirectory directory;
    const std::string path = directory.path("iter.h5");
    claim_output(path);
    EXPECT_TRUE(std::filesystem::exists(directory.path(".attempts/iter.h5-000001")));
    EXPECT_EQ(newer_attempt(), "");
    EXPECT_FALSE(told_to_stop(directory.path("STOP")));
    write_file_atomically(path, "old");

    in_another_process([&] {
        claim_output(path);
        write_file_atomically(path, "newest");
    });
    EXPECT_NE(newer_attempt().find("newer attempt, 2, has taken over " + path), std::string::npos) << newer_attempt();
    EXPECT_TRUE(told_to_stop({}));
    EXPECT_EQ(code_of_writing(path), ExitCode::stopped);
    EXPECT_EQ(read_file(path), "newest");
    EXPECT_FALSE(std::filesystem::exists(path + ".partial-" + process_tag()));
    EXPECT_EQ(code_of_writing(directory.path("another.h5")), ExitCode::done);

    claim_output(path); // this process begins anew
    EXPECT_TRUE(std::filesystem::exists(directory.path(".attempts/iter.h5-000003")));
    EXPECT_EQ(code_of_writing(path), ExitCode::done);
}

TEST(Attempt, OfARunCoversWhatLiesInIt)
{
    const test::TemporaryDirectory directory;
    const std::string run = directory.path("run");
    claim_run(run + "/");
    EXPECT_TRUE(std::filesystem::exists(run + "/attempts/000001"));
    claim_output(run + "/iter1/iter.h5");
    EXPECT_FALSE(std::filesystem::exists(run + "/iter1/.attempts"));
    claim_output(directory.path("runner.h5")); // not in it, although its path begins so
    EXPECT_TRUE(std::filesystem::exists(directory.path(".attempts/runner.h5-000001")));

    in_another_process([&] { claim_run(run); });
    EXPECT_THROW(claim_output(run + "/iter1/iter.h5"), Error);
    EXPECT_THROW(check_newest_attempt(run + "/iter1/iter.h5"), Error);
    EXPECT_NO_THROW(check_newest_attempt(directory.path("runner.h5")));
}

TEST(Attempt, OfAScriptIsSharedByItsPrograms)
{
    const test::TemporaryDirectory directory;
    const std::string run = directory.path("run");
    std::filesystem::create_directories(run + "/attempts");
    directory.write("run/attempts/000004", "");
    hold_attempt(run + "/attempts/000004");
    claim_run(run);
    EXPECT_FALSE(std::filesystem::exists(run + "/attempts/000005"));
    directory.write("run/attempts/000005", "the newer one\n");
    EXPECT_THROW(claim_run(run), Error);
    EXPECT_NE(newer_attempt().find("the newer one"), std::string::npos);
    EXPECT_THROW(hold_attempt(run + "/attempts/000006"), Error);
    EXPECT_THROW(hold_attempt(run), Error);
}

TEST(Attempt, OfARelativePath)
{
    const test::TemporaryDirectory directory;
    const std::filesystem::path before = std::filesystem::current_path();
    std::filesystem::current_path(directory.path(""));
    claim_output("iter.h5");
    in_another_process([] {
        claim_output("iter.h5");
        write_file_atomically("iter.h5", "newest");
    });
    EXPECT_EQ(code_of_writing("iter.h5"), ExitCode::stopped);
    EXPECT_EQ(code_of_writing(directory.path("iter.h5")), ExitCode::stopped);
    std::filesystem::current_path(before);
}

TEST(Attempt, ThatWasRemovedIsNotTheNewest)
{
    const test::TemporaryDirectory directory;
    const std::string path = directory.path("iter.h5");
    claim_output(path);
    std::filesystem::remove_all(directory.path(".attempts"));
    EXPECT_THROW(check_newest_attempt(path), Error);
}

TEST(Attempt, CannotBeClaimedWhereNothingCanBeWritten)
{
    const test::TemporaryDirectory directory;
    directory.write("file", "");
    try {
        claim_output(directory.path("file/iter.h5"));
        FAIL();
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::io);
    }
}

} // namespace
} // namespace selm
