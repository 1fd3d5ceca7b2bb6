#include "selm/base/attempt.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <sstream>

#include <fcntl.h>
#include <unistd.h>

#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/base/hash.hpp"
#include "selm/base/provenance.hpp"

namespace selm {

namespace {

namespace fs = std::filesystem;

constexpr int digits = 6;

struct Claim {
    std::string prefix; ///< path of a claim's file without its number
    long number = 0;
    bool of_script = false; ///< the job script made it, for all programs that it starts

    std::string file(long of) const
    {
        std::array<char, 32> text{};
        std::snprintf(text.data(), text.size(), "%0*ld", digits, of);
        return prefix + text.data();
    }
};

/// By the claimed place, an absolute path. One claim a place: a process that claims again goes on with the newer.
std::map<std::string, Claim>& claims()
{
    static std::map<std::string, Claim> held;
    return held;
}

std::string absolute(const std::string& path)
{
    std::error_code error;
    fs::path whole = fs::weakly_canonical(fs::absolute(path), error); // absolute: a path that does not exist stays as it is
    if (error)
        whole = fs::absolute(path).lexically_normal();
    std::string text = whole.string();
    while (text.size() > 1 && text.ends_with('/'))
        text.pop_back();
    return text;
}

bool covers(const std::string& place, const std::string& path)
{
    return path.starts_with(place) && (path.size() == place.size() || path[place.size()] == '/');
}

bool exists(const std::string& file)
{
    return ::access(file.c_str(), F_OK) == 0;
}

/// Number at the end of a claim's file name; 0: none.
long number_of(const std::string& name, const std::string& prefix)
{
    if (!name.starts_with(prefix) || name.size() < prefix.size() + digits)
        return 0;
    const std::string number = name.substr(prefix.size());
    return number.find_first_not_of("0123456789") == std::string::npos ? std::atol(number.c_str()) : 0;
}

std::string environment(const char* name)
{
    const char* const value = std::getenv(name);
    return value != nullptr ? value : "";
}

std::string who_claims()
{
    std::string text = cat("host ", host_name(), " pid ", ::getpid(), " at ", utc_timestamp());
    if (const std::string job = environment("SLURM_JOB_ID"); !job.empty())
        text += cat(" job ", job, " restart ", environment("SLURM_RESTART_COUNT").empty() ? "0" : environment("SLURM_RESTART_COUNT"));
    return text + "\n";
}

/// Makes the file of the next number, which only one process can.
Claim make_claim(const std::string& prefix)
{
    const fs::path directory = fs::path(prefix + "0").parent_path();
    const std::string name = prefix.substr(directory.string().size() + 1);
    std::error_code error;
    fs::create_directories(directory, error);
    Claim claim{.prefix = prefix, .number = 0, .of_script = false};
    for (fs::directory_iterator entry(directory, error), end; !error && entry != end; entry.increment(error))
        claim.number = std::max(claim.number, number_of(entry->path().filename().string(), name));
    if (error)
        throw io_error(cat(directory.string(), " cannot be used (", error.message(), "). Check the directory and its permissions"));
    int descriptor = -1;
    do {
        ++claim.number;
        descriptor = ::open(claim.file(claim.number).c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    } while (descriptor < 0 && errno == EEXIST);
    const std::string text = who_claims();
    const bool written = descriptor >= 0 && ::write(descriptor, text.data(), text.size()) == static_cast<ssize_t>(text.size());
    const int reason = errno;
    if (descriptor >= 0)
        ::close(descriptor);
    if (!written)
        throw io_error(cat("cannot write '", claim.file(claim.number), "' (", std::strerror(reason),
                           "). Free some space or check the permissions of the directory, then run again"));
    sync_path(directory.string());
    return claim;
}

std::string newer_than(const std::string& place, const Claim& claim)
{
    long newest = claim.number;
    while (exists(claim.file(newest + 1)))
        ++newest;
    if (newest == claim.number)
        return {};
    std::string who;
    try {
        who = read_file(claim.file(newest));
    } catch (const Error&) {
        who = "unknown"; // it is there; by whom is of less interest
    }
    while (who.ends_with('\n'))
        who.pop_back();
    return cat("a newer attempt, ", newest, ", has taken over ", place, " (", who, ")");
}

Error superseded(const std::string& reason)
{
    return {ExitCode::stopped, cat(reason, "; this one stops and changes nothing there")};
}

void claim(const std::string& place, const std::string& prefix)
{
    for (const auto& [held, one] : claims())
        if (covers(held, place) && held != place) {
            check_newest_attempt(place);
            return;
        }
    claims().insert_or_assign(place, make_claim(prefix));
}

} // namespace

void claim_run(const std::string& run)
{
    const std::string place = absolute(run);
    if (const auto held = claims().find(place); held != claims().end() && held->second.of_script) {
        check_newest_attempt(place);
        return;
    }
    claim(place, place + "/attempts/");
}

void claim_output(const std::string& path)
{
    const std::string place = absolute(path);
    const fs::path whole(place);
    claim(place, (whole.parent_path() / ".attempts" / (whole.filename().string() + "-")).string());
}

void hold_attempt(const std::string& file)
{
    SELM_VALIDATE(exists(file), ExitCode::configuration,
                  "SELM_ATTEMPT names " << file << ", which is not there (only job scripts set it). Unset it");
    const fs::path whole(absolute(file));
    const std::string prefix = whole.parent_path().string() + "/";
    const long number = number_of(whole.string(), prefix);
    SELM_VALIDATE(number > 0, ExitCode::configuration,
                  "SELM_ATTEMPT names " << file << ", which is no attempt (only job scripts set it). Unset it");
    claims().insert_or_assign(whole.parent_path().parent_path().string(), Claim{.prefix = prefix, .number = number, .of_script = true});
}

std::string newer_attempt()
{
    for (const auto& [place, claim] : claims())
        if (std::string newer = newer_than(place, claim); !newer.empty())
            return newer;
    return {};
}

bool told_to_stop(const std::string& stop_file)
{
    return (!stop_file.empty() && exists(stop_file)) || !newer_attempt().empty();
}

void check_newest_attempt(const std::string& path)
{
    if (claims().empty())
        return;
    const std::string whole = absolute(path);
    for (const auto& [place, claim] : claims())
        if (covers(place, whole)) {
            if (const std::string newer = newer_than(place, claim); !newer.empty())
                throw superseded(newer);
            if (!exists(claim.file(claim.number))) // numbers begin anew: nobody can say who is the newest
                throw superseded(cat(claim.file(claim.number), " was removed"));
        }
}

const std::string& process_tag()
{
    static const std::string tag = hash_hex(cat(host_name(), ' ', ::getpid(), ' ',
                                                std::chrono::system_clock::now().time_since_epoch().count()))
                                       .substr(0, 12);
    return tag;
}

} // namespace selm
