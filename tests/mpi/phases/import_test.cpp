#include "selm/phases/import.hpp"

#include <filesystem>
#include <fstream>

#include <gtest/gtest.h>

#include "mpi_test.hpp"
#include "selm/base/error.hpp"
#include "selm/comm/agree.hpp"
#include "shared_directory.hpp"

namespace selm {
namespace {

using test::SharedDirectory;
using test::test_world;

std::string row_of(int i)
{
    return cat("{\"prompt\":\"p", i, "\",\"chosen\":\"", std::string(static_cast<std::size_t>(i % 9) + 1, 'c'), "\",\"rejected\":\"r\"}\n");
}

TEST(ImportOnRanks, EqualToOneRankAndReportedOnAll)
{
    Communicator& comm = test_world();
    const SharedDirectory directory(comm);
    ImportOptions options{.input = directory.path("in.jsonl"), .output = directory.path("out.h5"), .on_bad_row = "skip", .rows = ""};
    agree(comm, "input", [&] {
        if (!comm.is_root())
            return;
        std::ofstream out(options.input);
        for (int i = 0; i < 50; ++i)
            out << (i == 7 ? "{\n" : row_of(i));
    });
    const ImportReport report = run_import(options, comm);
    EXPECT_EQ(report.rows, 49);
    EXPECT_EQ(report.rows_read, 50);
    EXPECT_EQ(report.skipped.at("not JSON"), 1);
    EXPECT_FALSE(report.already_complete);
    EXPECT_EQ(report.digest, root_string(comm, "one rank", [&] {
        ImportOptions alone = options;
        alone.output = directory.path("alone.h5");
        const auto single = make_single_communicator();
        return run_import(alone, *single).digest;
    }));
    const ImportReport again = run_import(options, comm);
    EXPECT_TRUE(again.already_complete);
    EXPECT_EQ(again.digest, report.digest);
    EXPECT_EQ(again.rows, 49);
}

TEST(ImportOnRanks, ABadRowIsAnErrorOnEveryRankAndLeavesNothing)
{
    Communicator& comm = test_world();
    const SharedDirectory directory(comm);
    const ImportOptions options{.input = directory.path("in.jsonl"), .output = directory.path("out.h5"), .rows = ""};
    agree(comm, "input", [&] {
        if (comm.is_root())
            std::ofstream(options.input) << row_of(0) << "{\"prompt\":\"p\"}\n";
    });
    ExitCode code = ExitCode::done;
    std::string message;
    try {
        run_import(options, comm);
    } catch (const Error& error) {
        code = error.code();
        message = error.what();
    }
    EXPECT_EQ(code, ExitCode::bad_data);
    EXPECT_NE(message.find("line 2: \"chosen\" is missing"), std::string::npos) << message;
    EXPECT_FALSE(std::filesystem::exists(options.output));
}

} // namespace
} // namespace selm
