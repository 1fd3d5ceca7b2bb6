#include "run_status_jobs.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include "selm/base/error.hpp"

extern char** environ;

namespace selm {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

bool is_job_id(const std::string& text)
{
    return !text.empty() && text.find_first_not_of("0123456789_") == std::string::npos;
}

/// "2026-01-31T12:00:00Z" in seconds since 1970.
std::optional<double> utc_seconds(const std::string& text)
{
    std::tm time{};
    const char* const end = ::strptime(text.c_str(), "%Y-%m-%dT%H:%M:%SZ", &time);
    if (end == nullptr || *end != '\0')
        return std::nullopt;
    return static_cast<double>(::timegm(&time));
}

JobStatus& job_named(std::vector<JobStatus>& jobs, const std::string& id)
{
    const auto found = std::find_if(jobs.begin(), jobs.end(), [&](const JobStatus& job) { return job.id == id; });
    if (found != jobs.end())
        return *found;
    jobs.push_back({.id = id, .what = {}, .started = {}, .state = {}, .elapsed = {}, .left = {}, .reason = {}});
    return jobs.back();
}

/// A process that writes into two pipes.
class Child {
  public:
    Child() = default;
    ~Child()
    {
        for (const int descriptor : {out[0], out[1], err[0], err[1]})
            if (descriptor >= 0)
                ::close(descriptor);
    }
    Child(const Child&) = delete;
    Child& operator=(const Child&) = delete;

    bool start(const std::vector<std::string>& words)
    {
        if (::pipe2(out.data(), O_CLOEXEC) != 0 || ::pipe2(err.data(), O_CLOEXEC) != 0)
            return false;
        std::vector<char*> arguments;
        for (const std::string& word : words)
            arguments.push_back(const_cast<char*>(word.c_str()));
        arguments.push_back(nullptr);
        posix_spawn_file_actions_t actions;
        posix_spawnattr_t attributes;
        posix_spawn_file_actions_init(&actions);
        posix_spawnattr_init(&attributes);
        posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
        posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
        posix_spawn_file_actions_adddup2(&actions, err[1], STDERR_FILENO);
        posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP); // to be killed with its children
        const int status = ::posix_spawnp(&pid, arguments[0], &actions, &attributes, arguments.data(), environ);
        posix_spawn_file_actions_destroy(&actions);
        posix_spawnattr_destroy(&attributes);
        for (int* const descriptor : {&out[1], &err[1]})
            ::close(std::exchange(*descriptor, -1));
        return status == 0;
    }

    /// Reads until both pipes end. False when the time is over.
    bool read(CommandResult& result, Clock::time_point deadline)
    {
        std::array<pollfd, 2> waiting{pollfd{out[0], POLLIN, 0}, pollfd{err[0], POLLIN, 0}};
        while (waiting[0].fd >= 0 || waiting[1].fd >= 0) {
            const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
            if (left <= 0)
                return false;
            if (::poll(waiting.data(), waiting.size(), static_cast<int>(left)) < 0 && errno != EINTR)
                return false;
            for (std::size_t i = 0; i < waiting.size(); ++i)
                if (waiting[i].fd >= 0 && waiting[i].revents != 0)
                    take(waiting[i], i == 0 ? result.output : result.errors);
        }
        return true;
    }

    pid_t pid = -1;

  private:
    static void take(pollfd& from, std::string& text)
    {
        std::array<char, 4096> buffer{};
        const ssize_t count = ::read(from.fd, buffer.data(), buffer.size());
        if (count > 0)
            text.append(buffer.data(), static_cast<std::size_t>(count));
        else if (count == 0 || errno != EINTR)
            from.fd = -1; // poll passes over it
    }

    std::array<int, 2> out{-1, -1}, err{-1, -1};
};

std::vector<std::string> fields_of(const std::string& line)
{
    std::vector<std::string> fields;
    std::istringstream in(line);
    for (std::string field; std::getline(in, field, '|');) {
        while (field.ends_with(' '))
            field.pop_back();
        fields.push_back(std::move(field));
    }
    return fields;
}

/// Starts of the run that say by which job they were, in RUN/attempts: pairs of a word and its value.
void add_attempts(std::vector<JobStatus>& jobs, const std::string& run)
{
    std::map<std::string, std::map<std::string, std::string>> starts; // by the name of their file: in order
    std::error_code error;
    for (fs::directory_iterator entry(run + "/attempts", error), end; !error && entry != end; entry.increment(error)) {
        std::ifstream in(entry->path());
        for (std::string word, value; in >> word >> value;)
            starts[entry->path().filename().string()][word] = value;
    }
    for (auto& [name, start] : starts) {
        if (!is_job_id(start["job"]))
            continue;
        JobStatus& job = job_named(jobs, start["job"]);
        if (const auto at = utc_seconds(start["at"]))
            job.started = std::max(job.started.value_or(*at), *at);
    }
}

std::string first_line(const std::string& text)
{
    return text.substr(0, text.find('\n'));
}

/// Why SLURM's program gave no answer; empty where it did.
std::string no_answer(const std::string& program, const CommandResult& result, double seconds)
{
    switch (result.end) {
    case CommandResult::End::not_found: return program + " is not installed here";
    case CommandResult::End::timed_out: return cat(program, " did not answer within ", seconds, " s");
    case CommandResult::End::exited: break;
    }
    // One id that has left the queue is an error to squeue, one among several is not.
    if (result.exit_code == 0 || result.errors.find("Invalid job id") != std::string::npos)
        return {};
    return cat(program, " says: ", result.errors.empty() ? cat("exit code ", result.exit_code) : first_line(result.errors));
}

/// Takes the rows of `output` whose first field is the id of one of the jobs.
void take_states(std::vector<JobStatus>& jobs, const std::string& output, bool queued)
{
    std::istringstream in(output);
    for (std::string line; std::getline(in, line);) {
        const std::vector<std::string> fields = fields_of(line);
        if (fields.size() < 3)
            continue;
        const auto job = std::find_if(jobs.begin(), jobs.end(), [&](const JobStatus& j) { return j.id == fields[0]; });
        if (job == jobs.end())
            continue;
        job->state = fields[1];
        job->elapsed = fields[2];
        if (queued && fields.size() > 3)
            job->left = fields[3];
        if (queued && fields.size() > 4)
            job->reason = fields[4];
    }
}

std::string ids_without_state(const std::vector<JobStatus>& jobs)
{
    std::string ids;
    for (const JobStatus& job : jobs)
        if (job.state.empty())
            ids += (ids.empty() ? "" : ",") + job.id;
    return ids;
}

} // namespace

std::vector<JobStatus> jobs_of_run(const std::string& run)
{
    std::vector<JobStatus> jobs;
    std::ifstream chain(run + "/slurm/jobs");
    for (std::string line; std::getline(chain, line);) {
        std::istringstream words(line);
        std::string id, phase, iteration;
        if (words >> id >> phase >> iteration && is_job_id(id))
            job_named(jobs, id).what = cat(phase, " of iteration ", iteration);
    }
    std::ifstream starts(run + "/slurm/provenance.txt");
    std::string id;
    for (std::string line; std::getline(starts, line);) {
        std::istringstream words(line);
        std::string word, date, job;
        words >> word >> date >> job;
        if (word == "---" && job == "job" && words >> id && is_job_id(id)) {
            if (const auto started = utc_seconds(date))
                job_named(jobs, id).started = started;
        } else if (word == "script" && is_job_id(id)) {
            JobStatus& named = job_named(jobs, id);
            if (named.what.empty())
                named.what = date.substr(0, date.find(','));
            id.clear();
        }
    }
    add_attempts(jobs, run);
    return jobs;
}

CommandResult run_command(const std::vector<std::string>& words, double timeout_s)
{
    CommandResult result;
    const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout_s));
    Child child;
    if (!child.start(words)) {
        result.end = CommandResult::End::not_found;
        return result;
    }
    if (!child.read(result, deadline)) {
        ::kill(-child.pid, SIGKILL);
        result.end = CommandResult::End::timed_out;
    }
    int status = 0;
    while (::waitpid(child.pid, &status, 0) < 0 && errno == EINTR) {
    }
    result.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return result;
}

void ask_slurm(RunStatus& status, double timeout_s)
{
    if (status.jobs.empty())
        return;
    const auto start = Clock::now();
    const CommandResult queue = run_command(
        {"squeue", "--noheader", "--states=all", "--jobs=" + ids_without_state(status.jobs), "--format=%A|%T|%M|%L|%R"}, timeout_s);
    status.slurm = no_answer("squeue", queue, timeout_s);
    if (queue.end != CommandResult::End::exited)
        return;
    take_states(status.jobs, queue.output, true);
    const std::string gone = ids_without_state(status.jobs);
    const double left = timeout_s - std::chrono::duration<double>(Clock::now() - start).count();
    if (gone.empty() || !status.slurm.empty())
        return;
    const CommandResult past = run_command({"sacct", "--noheader", "--parsable2", "--allocations", "--jobs=" + gone,
                                            "--format=JobIDRaw,State,Elapsed"}, std::max(left, 0.1));
    take_states(status.jobs, past.output, false);
    if (const std::string still = ids_without_state(status.jobs); !still.empty()) {
        const std::string why = no_answer("sacct", past, timeout_s);
        status.slurm = cat("not in the queue any more: ", still, why.empty() ? "" : " (" + why + ")");
    }
}

} // namespace selm
