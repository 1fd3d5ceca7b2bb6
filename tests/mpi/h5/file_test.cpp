#include "selm/h5/file.hpp"

#include <csignal>
#include <filesystem>
#include <numeric>

#include <gtest/gtest.h>
#include <sys/resource.h>

#include "mpi_test.hpp"
#include "selm/comm/agree.hpp"
#include "selm/h5/publish.hpp"
#include "shared_directory.hpp"

namespace selm {
namespace {

using test::SharedDirectory;
using test::test_world;

std::size_t entries(const std::string& directory)
{
    std::size_t count = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(directory))
        ++count;
    return count;
}

/// A limit on the size of files that this process writes: what a full disk looks like to a program.
class FileSizeLimit {
  public:
    explicit FileSizeLimit(std::uint64_t bytes)
    {
        ::getrlimit(RLIMIT_FSIZE, &before_);
        handler_ = std::signal(SIGXFSZ, SIG_IGN);
        const struct rlimit lowered { .rlim_cur = bytes, .rlim_max = before_.rlim_max };
        ::setrlimit(RLIMIT_FSIZE, &lowered);
    }
    ~FileSizeLimit()
    {
        ::setrlimit(RLIMIT_FSIZE, &before_);
        std::signal(SIGXFSZ, handler_);
    }

  private:
    struct rlimit before_ {};
    void (*handler_)(int) = nullptr;
};

TEST(ParallelFile, BlocksOfAllRanksInRankOrderAndReallyCollective)
{
    Communicator& comm = test_world();
    const SharedDirectory directory(comm);
    const std::string path = directory.path("a.h5");
    // Rank r brings r rows of 3: rank 0 takes part with nothing.
    std::vector<double> mine(static_cast<std::size_t>(comm.rank()) * 3);
    std::iota(mine.begin(), mine.end(), 100.0 * comm.rank());
    std::vector<std::string> texts(static_cast<std::size_t>(comm.rank()), std::string(static_cast<std::size_t>(comm.rank()), 'a'));
    h5::File file = h5::File::create(path, comm);
    file.write_blocks("/d", mine, {3});
    file.write_texts("/t/text", texts);
    file.set_attribute("/t", "long", std::string(100000, 'x')); // beyond what fits in an object header
    file.create_dataset("/slab", h5::ElementType::int32, {10});
    const std::vector<std::int32_t> values{7, 8};
    file.write_slab<std::int32_t>("/slab", 4, comm.rank() == comm.size() - 1 ? std::span<const std::int32_t>(values)
                                                                             : std::span<const std::int32_t>{});
    const h5::TransferCount transfers = file.transfers();
    file.close();
    EXPECT_EQ(transfers.fallbacks, 0) << transfers.cause;
    EXPECT_EQ(transfers.collective, comm.size() > 1 ? 4 : 0);

    EXPECT_LT(std::filesystem::file_size(path), 120000U) << "reserved space was not given back";
    const h5::File read = h5::File::open(path);
    std::vector<double> expected;
    std::int64_t bytes = 0;
    std::vector<std::int64_t> offsets{0};
    for (int rank = 0; rank < comm.size(); ++rank) {
        for (int i = 0; i < 3 * rank; ++i)
            expected.push_back(100.0 * rank + i);
        for (int i = 0; i < rank; ++i)
            offsets.push_back(bytes += rank);
    }
    EXPECT_EQ(read.read<double>("/d"), expected);
    EXPECT_EQ(read.read_text("/t/text", 0, bytes), std::string(static_cast<std::size_t>(bytes), 'a'));
    EXPECT_EQ(read.read<std::int64_t>("/t/text_offsets"), offsets);
    EXPECT_EQ(read.read_rows<std::int32_t>("/slab", 4, 2), values);
    EXPECT_EQ(read.string_attribute("/t", "long").size(), 100000U);
}

TEST(ParallelFile, LargeBlocksAreCollectiveTooAndNotCollected)
{
    // From 4 MiB a rank on, blocks go to the file from where they lie; blocks of other lengths, one of them empty.
    Communicator& comm = test_world();
    const SharedDirectory directory(comm);
    const std::int64_t bytes = std::int64_t{9} << 20;
    std::vector<std::uint8_t> mine(static_cast<std::size_t>(comm.rank() == 1 ? 0 : bytes));
    for (std::size_t i = 0; i < mine.size(); ++i)
        mine[i] = static_cast<std::uint8_t>(i * 7 + i / 1000 + static_cast<std::size_t>(comm.rank()));
    h5::File file = h5::File::create(directory.path("a.h5"), comm);
    file.write_blocks("/large", mine);
    const h5::TransferCount transfers = file.transfers();
    file.close();
    EXPECT_EQ(transfers.fallbacks, 0) << transfers.cause;
    const h5::File read = h5::File::open(directory.path("a.h5"));
    const std::int64_t first = comm.rank() > 1 ? (comm.rank() - 1) * bytes : 0;
    EXPECT_EQ(read.read_rows<std::uint8_t>("/large", first, static_cast<std::int64_t>(mine.size())), mine);
}

TEST(ParallelFile, CopiesATree)
{
    Communicator& comm = test_world();
    const SharedDirectory directory(comm);
    std::vector<std::int64_t> mine(1000);
    std::iota(mine.begin(), mine.end(), 1000 * comm.rank());
    h5::write_and_publish(directory.path("a.h5"), comm, [&](h5::File& file) {
        file.write_blocks("/g/x", mine, {10});
        file.write_blocks("/one", comm.is_root() ? std::vector<float>{1} : std::vector<float>{});
        file.set_attribute("/g", "n", std::int64_t{3});
    });
    h5::write_and_publish(directory.path("b.h5"), comm, [&](h5::File& file) {
        const h5::File source = h5::File::open(directory.path("a.h5"));
        file.copy_tree(source, "/");
        EXPECT_EQ(file.transfers().fallbacks, 0);
    });
    const h5::File a = h5::File::open(directory.path("a.h5"));
    const h5::File b = h5::File::open(directory.path("b.h5"));
    EXPECT_EQ(a.datasets(), b.datasets());
    EXPECT_EQ(a.read<std::int64_t>("/g/x"), b.read<std::int64_t>("/g/x"));
    EXPECT_EQ(b.read<float>("/one"), std::vector<float>{1});
    EXPECT_EQ(b.int_attribute("/g", "n"), 3);
}

TEST(ParallelFile, AnErrorOfOneRankLeavesNothing)
{
    Communicator& comm = test_world();
    const SharedDirectory directory(comm);
    std::string message;
    try {
        h5::write_and_publish(directory.path("a.h5"), comm, [&](h5::File& file) {
            file.write_blocks("/x", std::vector<double>{1});
            if (comm.rank() == comm.size() - 1)
                throw data_error("the last rank failed");
        });
    } catch (const Error& error) {
        message = error.what();
        EXPECT_EQ(error.code(), ExitCode::bad_data);
    }
    EXPECT_NE(message.find("the last rank failed"), std::string::npos);
    comm.barrier("looked");
    EXPECT_EQ(entries(directory.path("")), 0U);
}

/// Writes more than the limit allows over an older file; the limit holds on all ranks or on one.
void check_full_disk(Communicator& comm, bool on_this_rank)
{
    const SharedDirectory directory(comm);
    const std::string path = directory.path("a.h5");
    h5::write_and_publish(path, comm, [](h5::File& file) { file.write_blocks("/x", std::vector<double>{1}); });
    ExitCode code = ExitCode::done;
    std::string message;
    {
        std::optional<FileSizeLimit> limit;
        if (on_this_rank)
            limit.emplace(256 << 10);
        try {
            h5::write_and_publish(path, comm, [](h5::File& file) {
                file.write_blocks("/small", std::vector<double>(1000, 2.0));
                file.write_blocks("/x", std::vector<double>(100000, 2.0));
            });
        } catch (const Error& error) {
            code = error.code();
            message = error.what();
        }
    }
    EXPECT_EQ(code, ExitCode::io);
    EXPECT_NE(message.find("cannot grow to"), std::string::npos) << message;
    comm.barrier("looked");
    EXPECT_EQ(h5::File::open(path).read<double>("/x").front(), 1);
    EXPECT_EQ(entries(directory.path("")), 1U);
}

TEST(ParallelFile, AFullDiskIsAnIoErrorOnEveryRankAndLeavesTheOldFile)
{
    check_full_disk(test_world(), true);
}

TEST(ParallelFile, AFullDiskThatOneRankAloneSeesIsAnIoErrorOnEveryRank)
{
    check_full_disk(test_world(), test_world().is_root());
    check_full_disk(test_world(), test_world().rank() == test_world().size() - 1);
}

} // namespace
} // namespace selm
