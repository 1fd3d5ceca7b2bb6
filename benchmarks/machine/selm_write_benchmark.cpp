#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <iostream>
#include <numeric>
#include <string>
#include <vector>

#include "selm/base/error.hpp"
#include "selm/comm/communicator.hpp"
#include "selm/comm/session.hpp"
#include "selm/data/iteration.hpp"
#include "selm/data/preferences.hpp"
#include "timed.hpp"

// The collective write of an iteration file beside a plain write of as many bytes by one process, in turns; both end with the data
// on the disk (fsync). Every rank holds the generated answers of a block of rows; the rest of a row is read from prefs.h5 while
// writing. One line of JSON. Usage: selm_write_benchmark PREFS DIRECTORY [REPETITIONS]
namespace {

namespace fs = std::filesystem;
using selm::Communicator;
using selm::benchmark::seconds_of;

void plain_write(const std::string& path, const std::vector<char>& bytes)
{
    const int file = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    SELM_VALIDATE(file >= 0, selm::ExitCode::io, path << " cannot be created");
    std::size_t done = 0;
    while (done < bytes.size()) {
        const ssize_t written = ::write(file, bytes.data() + done, std::min<std::size_t>(bytes.size() - done, 8 << 20));
        SELM_VALIDATE(written > 0, selm::ExitCode::io, path << " cannot be written");
        done += static_cast<std::size_t>(written);
    }
    SELM_VALIDATE(::fsync(file) == 0, selm::ExitCode::io, path << " cannot be synced");
    ::close(file);
}

/// Answers of this rank's block: the chosen answer's text, and a token and a log-prob for each four bytes of it.
std::vector<selm::GeneratedAnswer> answers_of(const selm::PreferencesReader& prefs, const Communicator& comm)
{
    const std::int64_t rows = prefs.rows(), begin = rows * comm.rank() / comm.size(), end = rows * (comm.rank() + 1) / comm.size();
    std::vector<selm::GeneratedAnswer> answers;
    for (selm::PreferenceRow& row : prefs.range(begin, end)) {
        const std::size_t tokens = row.chosen.size() / 4 + 1;
        answers.push_back({.row = row.row,
                           .text = std::move(row.chosen),
                           .tokens = std::vector<std::int32_t>(tokens, 7),
                           .logprobs = std::vector<float>(tokens, -1.0f),
                           .finish_reason = selm::FinishReason::stop});
    }
    return answers;
}

std::string json(const std::vector<double>& values)
{
    std::string out;
    for (const double value : values)
        out += (out.empty() ? "[" : ", ") + std::to_string(value);
    return out + "]";
}

void run(Communicator& comm, const std::string& prefs_path, const std::string& directory, int repetitions)
{
    const selm::PreferencesReader prefs(prefs_path);
    const std::vector<selm::GeneratedAnswer> answers = answers_of(prefs, comm);
    std::vector<std::int64_t> rows(static_cast<std::size_t>(prefs.rows()));
    std::iota(rows.begin(), rows.end(), 0);
    const std::string ours = directory + "/iter.h5", plain = directory + "/plain";
    const auto write_ours = [&] {
        selm::write_iteration(ours, prefs, rows, answers, {}, {}, comm);
    };
    write_ours();
    std::vector<char> bytes(comm.is_root() ? fs::file_size(ours) : 0, 'x');
    std::vector<double> ours_s, plain_s;
    for (int i = 0; i < repetitions; ++i) {
        if (comm.is_root())
            fs::remove(ours);
        ours_s.push_back(seconds_of(comm, write_ours));
        if (comm.is_root())
            fs::remove(plain);
        plain_s.push_back(seconds_of(comm, [&] {
            if (comm.is_root())
                plain_write(plain, bytes);
        }));
    }
    if (comm.is_root())
        std::cout << "{\"bytes\": " << bytes.size() << ", \"rows\": " << rows.size() << ", \"ranks\": " << comm.size()
                  << ", \"ours_s\": " << json(ours_s) << ", \"peer_s\": " << json(plain_s) << "}" << std::endl;
}

} // namespace

int main(int argc, char** argv)
{
    selm::MpiSession session(argc, argv);
    try {
        SELM_VALIDATE(argc >= 3, selm::ExitCode::usage, "usage: selm_write_benchmark PREFS DIRECTORY [REPETITIONS]");
        run(session.world(), argv[1], argv[2], argc > 3 ? std::max(1, std::atoi(argv[3])) : 10);
    } catch (const std::exception& error) {
        std::cerr << "selm_write_benchmark: " << error.what() << "\n";
        session.abort(70);
    }
    return 0;
}
