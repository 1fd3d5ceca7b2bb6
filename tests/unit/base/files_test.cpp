#include "selm/base/files.hpp"

#include <filesystem>
#include <string>

#include <gtest/gtest.h>

#include "selm/base/attempt.hpp"
#include "selm/base/error.hpp"
#include "temporary_directory.hpp"

namespace selm {
namespace {

template<typename Body>
Error expect_error(Body&& body)
{
    try {
        body();
    } catch (const Error& error) {
        return error;
    }
    ADD_FAILURE() << "no error";
    return internal_error("no error");
}

std::size_t count_files(const std::string& directory)
{
    return static_cast<std::size_t>(
        std::distance(std::filesystem::directory_iterator(directory), std::filesystem::directory_iterator{}));
}

TEST(Files, AtomicWriteReadsBack)
{
    const test::TemporaryDirectory directory;
    const std::string path = directory.path("a.txt");
    std::string content(700000, '\0');
    content[699999] = 'z';
    write_file_atomically(path, content);
    EXPECT_EQ(read_file(path), content);
    write_file_atomically(path, "second");
    EXPECT_EQ(read_file(path), "second");
    EXPECT_EQ(count_files(directory.path("")), 1U) << "a partial file stayed";
}

TEST(Files, FailedWriteLeavesTheOldFileAndNoPartialOne)
{
    const test::TemporaryDirectory directory;
    std::filesystem::create_directory(directory.path("taken"));
    directory.write("taken/file", "keep"); // a directory that is not empty cannot be replaced by rename
    const Error error = expect_error([&] { write_file_atomically(directory.path("taken"), "new"); });
    EXPECT_EQ(error.code(), ExitCode::io);
    EXPECT_EQ(count_files(directory.path("")), 1U);
    EXPECT_EQ(read_file(directory.path("taken/file")), "keep");
}

TEST(Files, FullDiskIsAnIoError)
{
    if (!std::filesystem::exists("/dev/full"))
        GTEST_SKIP() << "no /dev/full here";
    const test::TemporaryDirectory directory;
    // The partial file's name is known, so it can be made to lead to a full device.
    const std::string path = directory.path("x");
    std::filesystem::create_symlink("/dev/full", path + ".partial-" + process_tag());
    const Error error = expect_error([&] { write_file_atomically(path, "data"); });
    EXPECT_EQ(error.code(), ExitCode::io);
    EXPECT_NE(std::string(error.what()).find("No space left"), std::string::npos) << error.what();
    EXPECT_FALSE(std::filesystem::exists(path));
}

TEST(Files, ErrorsNameThePath)
{
    const test::TemporaryDirectory directory;
    const std::string absent = directory.path("absent");
    const Error missing = expect_error([&] { read_file(absent); });
    EXPECT_EQ(missing.code(), ExitCode::bad_data);
    EXPECT_NE(std::string(missing.what()).find(absent), std::string::npos);
    EXPECT_EQ(expect_error([&] { read_file(directory.path("")); }).code(), ExitCode::bad_data);
    EXPECT_EQ(expect_error([&] { sync_path(absent); }).code(), ExitCode::io);
    EXPECT_EQ(expect_error([&] { publish_file(absent, directory.path("b")); }).code(), ExitCode::io);
    EXPECT_EQ(expect_error([&] { write_file_atomically(directory.path("no/such/directory"), ""); }).code(), ExitCode::io);
}

TEST(Files, PublishRenames)
{
    const test::TemporaryDirectory directory;
    directory.write("a.partial", "whole");
    publish_file(directory.path("a.partial"), directory.path("a"));
    EXPECT_EQ(read_file(directory.path("a")), "whole");
    EXPECT_FALSE(std::filesystem::exists(directory.path("a.partial")));
    sync_path(directory.path("")); // a directory syncs too
}

} // namespace
} // namespace selm
