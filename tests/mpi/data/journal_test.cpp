#include "selm/data/journal.hpp"

#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include <gtest/gtest.h>

#include "mpi_test.hpp"
#include "selm/base/files.hpp"
#include "selm/comm/agree.hpp"
#include "shared_directory.hpp"

namespace selm {
namespace {

using test::SharedDirectory;
using test::test_world;

const JournalBinding binding{{"recipe", "r1"}, {"policy", "p1"}};

std::vector<std::byte> payload_of(std::int64_t row, int attempt)
{
    PayloadWriter out;
    out.value(row * 10);
    out.text(cat("attempt ", attempt, std::string(static_cast<std::size_t>(row % 50), 'x')));
    return out.bytes();
}

/// All recovered records over all ranks: row -> text of the payload. Fails when a row is on two ranks.
std::map<std::int64_t, std::string> recovered_everywhere(Journal& journal, Communicator& comm)
{
    PayloadWriter mine;
    for (const Journal::Record& record : journal.recovered()) {
        PayloadReader in(record.payload);
        EXPECT_EQ(in.value<std::int64_t>(), record.row * 10);
        mine.value(record.row);
        mine.text(in.text());
        EXPECT_TRUE(in.at_end());
    }
    std::map<std::int64_t, std::string> all;
    for (const auto& bytes : comm.all_gather_ragged(mine.bytes(), "recovered")) {
        PayloadReader in(bytes);
        while (!in.at_end()) {
            const auto row = in.value<std::int64_t>();
            EXPECT_TRUE(all.emplace(row, in.text()).second) << "row " << row << " was kept by two ranks";
        }
    }
    return all;
}

std::vector<std::string> files_of(const std::string& directory)
{
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(directory))
        names.insert(entry.path().string());
    return {names.begin(), names.end()};
}

/// Three ranks of an earlier attempt, played by one process: files as three ranks would leave them.
void earlier_attempt(const std::string& output, int attempt, const std::vector<std::vector<std::int64_t>>& rows_of_ranks)
{
    const auto single = make_single_communicator();
    for (const auto& rows : rows_of_ranks) {
        Journal journal(output, binding, *single);
        for (const std::int64_t row : rows)
            journal.append(row, payload_of(row, attempt));
    }
}

TEST(JournalOfRanks, ContinuesWithAnyNumberOfRanks)
{
    Communicator& comm = test_world();
    const SharedDirectory directory(comm);
    const std::string output = directory.path("iter.h5");
    agree(comm, "earlier attempt", [&] {
        if (comm.is_root())
            earlier_attempt(output, 1, {{5, 1}, {}, {7, 1, 300}});
    });
    {
        Journal journal(output, binding, comm);
        EXPECT_EQ(journal.done_rows(), (std::vector<std::int64_t>{1, 5, 7, 300}));
        EXPECT_TRUE(journal.is_done(7));
        EXPECT_FALSE(journal.is_done(6));
        EXPECT_EQ(recovered_everywhere(journal, comm).size(), 4U);
        journal.append(1000 + comm.rank(), payload_of(1000 + comm.rank(), 2));
        if (comm.is_root())
            journal.append(5, payload_of(5, 2)); // done before: the first record stays
        EXPECT_EQ(journal.appended(), comm.is_root() ? 2 : 1);
    }
    comm.barrier("attempt 2 ended");
    Journal journal(output, binding, comm);
    const auto all = recovered_everywhere(journal, comm);
    EXPECT_EQ(all.size(), 4U + static_cast<std::size_t>(comm.size()));
    EXPECT_EQ(journal.done_rows().size(), all.size());
    EXPECT_EQ(all.at(5), "attempt 1xxxxx");
    EXPECT_EQ(all.at(1000), "attempt 2");
    journal.remove();
    comm.barrier("removed");
    EXPECT_FALSE(std::filesystem::exists(output + ".journal"));
}

TEST(JournalOfRanks, IgnoresTornTailsOfAnyLength)
{
    Communicator& comm = test_world();
    const SharedDirectory directory(comm);
    const std::string output = directory.path("iter.h5");
    std::string file;
    agree(comm, "earlier attempt", [&] {
        if (!comm.is_root())
            return;
        earlier_attempt(output, 1, {{1, 2, 3}});
        file = files_of(output + ".journal").front();
    });
    const std::string whole = root_string(comm, "journal file", [&] { return read_file(file); });
    const std::size_t record = (whole.size() - 90) / 3; // about one record; every length from here on is tried
    for (std::size_t cut = 1; cut < record + 60; cut += 7) {
        agree(comm, "cut", [&] {
            if (comm.is_root())
                std::ofstream(file, std::ios::binary) << whole.substr(0, whole.size() - cut);
        });
        const Journal journal(output, binding, comm);
        const auto done = journal.done_rows();
        ASSERT_LT(done.size(), 3U) << cut;
        ASSERT_EQ(done, std::vector<std::int64_t>({1, 2}) ) << cut;
        if (whole.size() - cut < whole.size() - record + 8)
            break; // the next cut would reach into the record before
    }
    agree(comm, "flip", [&] {
        if (!comm.is_root())
            return;
        std::string flipped = whole;
        flipped[flipped.size() - 12] = static_cast<char>(flipped[flipped.size() - 12] ^ 1); // in the last payload
        std::ofstream(file, std::ios::binary) << flipped;
    });
    const Journal journal(output, binding, comm);
    EXPECT_EQ(journal.done_rows(), (std::vector<std::int64_t>{1, 2}));
    agree(comm, "torn header", [&] {
        if (comm.is_root())
            std::ofstream(file, std::ios::binary) << whole.substr(0, 20);
    });
    EXPECT_TRUE(Journal(output, binding, comm).done_rows().empty());
}

TEST(JournalOfRanks, RefusesRowsOfAnotherRunAndSaysWhatDiffers)
{
    Communicator& comm = test_world();
    const SharedDirectory directory(comm);
    const std::string output = directory.path("iter.h5");
    agree(comm, "earlier attempt", [&] {
        if (comm.is_root())
            earlier_attempt(output, 1, {{1}});
    });
    std::string message;
    try {
        Journal journal(output, {{"recipe", "r1"}, {"policy", "p2"}}, comm);
    } catch (const Error& error) {
        message = error.what();
        EXPECT_EQ(error.code(), ExitCode::bad_data);
    }
    EXPECT_NE(message.find("the policy was p1 and is p2 now"), std::string::npos) << message;
    EXPECT_EQ(message.find("the recipe"), std::string::npos) << message;
    EXPECT_NE(message.find(output + ".journal"), std::string::npos) << message;
}

TEST(JournalOfRanks, OtherFilesInItsDirectoryStay)
{
    Communicator& comm = test_world();
    const SharedDirectory directory(comm);
    const std::string output = directory.path("iter.h5");
    EXPECT_FALSE(Journal::exists(output));
    Journal journal(output, binding, comm);
    journal.append(comm.rank(), payload_of(comm.rank(), 1));
    comm.barrier("appended");
    EXPECT_TRUE(Journal::exists(output));
    agree(comm, "foreign file", [&] {
        if (comm.is_root())
            std::ofstream(output + ".journal/notes.txt") << "mine";
    });
    journal.remove();
    comm.barrier("removed");
    EXPECT_EQ(files_of(output + ".journal"), (std::vector<std::string>{output + ".journal/notes.txt"}));
    EXPECT_FALSE(Journal::exists(output));
}

} // namespace
} // namespace selm
