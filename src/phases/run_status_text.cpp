#include <array>
#include <cmath>
#include <cstdio>

#include <nlohmann/json.hpp>

#include "selm/base/error.hpp"
#include "selm/phases/run_status.hpp"

namespace selm {
namespace {

using nlohmann::ordered_json;

constexpr double mention_silence_s = 120;

std::string padded(std::string text, std::size_t width)
{
    text.append(text.size() < width ? width - text.size() : 0, ' ');
    return text;
}

/// Three digits that matter: 12.3, 0.0123.
std::string rate_text(double value)
{
    std::array<char, 32> text{};
    std::snprintf(text.data(), text.size(), value >= 100 ? "%.0f" : "%.3g", value);
    return text.data();
}

/// 1:02:03, 2:03
std::string duration(double seconds)
{
    const long long total = std::llround(seconds);
    std::array<char, 32> text{};
    if (total >= 3600)
        std::snprintf(text.data(), text.size(), "%lld:%02lld:%02lld", total / 3600, total / 60 % 60, total % 60);
    else
        std::snprintf(text.data(), text.size(), "%lld:%02lld", total / 60, total % 60);
    return text.data();
}

const char* word(PhaseState state)
{
    switch (state) {
    case PhaseState::pending: return "pending";
    case PhaseState::under_way: return "under way";
    case PhaseState::done: return "done";
    }
    return "?";
}

std::string amount(const PhaseStatus& phase)
{
    if (!phase.done && !phase.total)
        return {};
    const std::string of = phase.total ? cat("/", *phase.total) : std::string();
    if (phase.state == PhaseState::done)
        return cat(phase.done.value_or(0), " ", phase.unit);
    return cat(phase.done.value_or(0), of, " ", phase.unit);
}

std::string speed(const PhaseStatus& phase)
{
    std::string text = phase.rate ? cat(rate_text(*phase.rate), " ", phase.unit, "/s") : "";
    if (phase.tokens_per_s)
        text += cat(text.empty() ? "" : ", ", rate_text(*phase.tokens_per_s), " tokens/s");
    if (phase.seconds)
        text += cat(text.empty() ? "" : ", ", rate_text(*phase.seconds), " s");
    return text;
}

std::string remarks(const PhaseStatus& phase)
{
    std::string text;
    const auto add = [&](const std::string& remark) { text += (text.empty() ? "" : ", ") + remark; };
    if (phase.seconds_left)
        add(duration(*phase.seconds_left) + " left");
    else if (phase.state == PhaseState::under_way && phase.silent_s.value_or(0) > mention_silence_s)
        add(cat("nothing new for ", duration(*phase.silent_s)));
    if (phase.checkpoint && phase.state == PhaseState::under_way)
        add(cat("checkpoint of step ", *phase.checkpoint,
                phase.checkpoint_age_s ? cat(" (", duration(*phase.checkpoint_age_s), " ago)") : ""));
    if (phase.attempt > 1 && phase.state == PhaseState::under_way)
        add(cat("attempt ", phase.attempt));
    return text;
}

std::string phase_line(const PhaseStatus& phase)
{
    std::string line = padded("  " + phase.phase, 17) + padded(word(phase.state), 11) + padded(amount(phase), 22)
                       + padded(speed(phase), 36) + remarks(phase);
    line.erase(line.find_last_not_of(' ') + 1);
    line += '\n';
    for (const std::string& problem : phase.problems)
        line += "    problem: " + problem + "\n";
    return line;
}

std::string job_line(const JobStatus& job)
{
    std::string text = cat("job ", padded(job.id, 9), " ", padded(job.what, 22), " ", job.state.empty() ? "state not known" : job.state);
    if (!job.elapsed.empty())
        text += ", " + job.elapsed + " so far";
    if (!job.left.empty() && job.state == "RUNNING")
        text += ", " + job.left + " until its limit";
    if (job.reason.starts_with('(') && job.reason != "(None)") // else it is a list of nodes
        text += " " + job.reason;
    return text + "\n";
}

template<typename T>
ordered_json or_null(const std::optional<T>& value)
{
    return value ? ordered_json(*value) : ordered_json(nullptr);
}

} // namespace

std::string status_table(const RunStatus& status)
{
    std::string text = cat(status.run, ": ", status.iterations_done, " of ", status.iterations, " iterations trained\n");
    for (const JobStatus& job : status.jobs)
        text += job_line(job);
    if (!status.slurm.empty())
        text += "SLURM: " + status.slurm + "\n";
    std::int64_t iteration = -1;
    for (const PhaseStatus& phase : status.phases) {
        if (phase.iteration != iteration)
            text += phase.iteration == 0 ? std::string("before training\n") : cat("iteration ", phase.iteration, "\n");
        iteration = phase.iteration;
        text += phase_line(phase);
    }
    if (status.stop_file)
        text += cat("stopped by ", status.run, "/STOP: remove it to go on\n");
    return text;
}

std::string status_json(const RunStatus& status)
{
    ordered_json phases = ordered_json::array(), jobs = ordered_json::array();
    for (const PhaseStatus& p : status.phases)
        phases.push_back({{"iteration", p.iteration}, {"phase", p.phase}, {"state", word(p.state)}, {"unit", p.unit}, {"done", or_null(p.done)},
                          {"total", or_null(p.total)}, {"rate", or_null(p.rate)}, {"seconds_left", or_null(p.seconds_left)},
                          {"silent_s", or_null(p.silent_s)}, {"attempt", p.attempt}, {"checkpoint", or_null(p.checkpoint)},
                          {"checkpoint_age_s", or_null(p.checkpoint_age_s)}, {"tokens_per_s", or_null(p.tokens_per_s)},
                          {"seconds", or_null(p.seconds)}, {"problems", p.problems}});
    for (const JobStatus& j : status.jobs)
        jobs.push_back({{"id", j.id}, {"what", j.what}, {"started", or_null(j.started)}, {"state", j.state}, {"elapsed", j.elapsed},
                        {"left", j.left}, {"reason", j.reason}});
    return ordered_json{{"run", status.run}, {"iterations", status.iterations}, {"iterations_done", status.iterations_done},
                        {"stop_file", status.stop_file}, {"phases", phases}, {"jobs", jobs}, {"slurm", status.slurm}}
               .dump(2)
           + "\n";
}

} // namespace selm
