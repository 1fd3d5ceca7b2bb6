#include "selm/phases/run_status.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>

#include <fcntl.h>
#include <sys/stat.h>

#include <nlohmann/json.hpp>

#include "run_directory.hpp"
#include "run_status_jobs.hpp"
#include "selm/algo/schedule.hpp"
#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/data/journal.hpp"
#include "selm/h5/file.hpp"
#include "selm/phases/iterate.hpp"
#include "training_output.hpp"

namespace selm {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr double silent_at_least_s = 120;      // what says nothing for less is taken to be at work
constexpr double silent_intervals = 20;        // and so is what says nothing for less than so many rows or steps
constexpr std::size_t newest_steps = 50;       // whose mean gives the rate of training
constexpr std::streamoff metrics_tail = 1 << 18; // bytes: more than newest_steps lines

std::optional<double> statx_time(const std::string& path, unsigned mask, statx_timestamp(*of)(const struct statx&))
{
    struct statx found {};
    if (::statx(AT_FDCWD, path.c_str(), 0, mask, &found) != 0 || (found.stx_mask & mask) == 0)
        return std::nullopt;
    const statx_timestamp time = of(found);
    return static_cast<double>(time.tv_sec) + 1e-9 * time.tv_nsec;
}

bool exists(const std::string& path)
{
    std::error_code ignored;
    return fs::exists(path, ignored);
}

/// Keys of a recipe as users write it (sections, comments, quotes) or as selm_iter keeps it ("section.key = value").
class RecipeValues {
  public:
    explicit RecipeValues(const std::string& text)
    {
        std::istringstream in(text);
        std::string section;
        for (std::string line; std::getline(in, line);) {
            line = trimmed(line);
            if (line.starts_with('[')) {
                section = trimmed(line.substr(1, line.find(']') - 1)) + ".";
                continue;
            }
            const std::size_t equals = line.find('=');
            if (equals == std::string::npos || line.starts_with('#') || line.starts_with(';'))
                continue;
            values_[section + trimmed(line.substr(0, equals))] = plain(trimmed(line.substr(equals + 1)));
        }
    }

    std::string text(const std::string& key, const std::string& otherwise) const
    {
        const auto found = values_.find(key);
        return found == values_.end() ? otherwise : found->second;
    }
    std::int64_t count(const std::string& key, std::int64_t otherwise) const
    {
        try {
            return std::stoll(text(key, std::to_string(otherwise)));
        } catch (const std::logic_error&) {
            return otherwise;
        }
    }

  private:
    static std::string trimmed(const std::string& text)
    {
        const std::size_t begin = text.find_first_not_of(" \t\r");
        return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(" \t\r") - begin + 1);
    }
    static std::string plain(const std::string& value)
    {
        if (value.starts_with('"'))
            return value.substr(1, value.find('"', 1) - 1);
        const std::size_t comment = value.find_first_of("#;");
        const bool apart = comment == 0 || (comment != std::string::npos && (value[comment - 1] == ' ' || value[comment - 1] == '\t'));
        return apart ? trimmed(value.substr(0, comment)) : value;
    }
    std::map<std::string, std::string> values_;
};

/// What is known of an HDF5 file without reading its data.
struct DataFile {
    bool there = false;
    std::optional<std::int64_t> rows;
    bool ranked = false;
    bool has_pairs = false;
    bool has_logprobs = false;
    std::string problem;
};

DataFile look_into(const std::string& path)
{
    DataFile found;
    found.there = exists(path);
    if (!found.there)
        return found;
    try {
        const h5::File file = h5::File::open(path);
        found.rows = file.info("/prompts/row").rows();
        found.ranked = file.exists("/ranking");
        found.has_pairs = file.exists("/pairs");
        found.has_logprobs = file.exists("/logprobs/" + LogProbOptions().name);
    } catch (const Error& error) {
        found.problem = error.what();
    }
    return found;
}

json read_json(const std::string& path, std::vector<std::string>& problems)
{
    if (!exists(path))
        return json::object();
    json content = json::parse(read_file(path), nullptr, false);
    if (content.is_object())
        return content;
    problems.push_back(path + " is not JSON");
    return json::object();
}

std::optional<double> number(const json& object, const char* key)
{
    const auto found = object.find(key);
    return found != object.end() && found->is_number() ? std::optional(found->get<double>()) : std::nullopt;
}

/// Lines of a JSONL file's end. A torn last line is left out; other lines that are no objects are counted.
std::vector<json> last_lines(const std::string& path, std::size_t& unreadable)
{
    std::ifstream in(path, std::ios::binary | std::ios::ate);
    const std::streamoff size = in ? static_cast<std::streamoff>(in.tellg()) : 0;
    const std::streamoff begin = std::max<std::streamoff>(0, size - metrics_tail);
    std::string text(static_cast<std::size_t>(size - begin), '\0');
    in.seekg(begin);
    in.read(text.data(), static_cast<std::streamsize>(text.size()));
    text.resize(static_cast<std::size_t>(std::max<std::streamsize>(0, in.gcount())));
    if (begin > 0)
        text.erase(0, text.find('\n') + 1); // the first is cut
    std::vector<json> lines;
    for (std::size_t at = 0, end = text.find('\n'); end != std::string::npos; at = end + 1, end = text.find('\n', at)) {
        json line = json::parse(text.begin() + static_cast<std::ptrdiff_t>(at), text.begin() + static_cast<std::ptrdiff_t>(end), nullptr, false);
        if (line.is_object() && number(line, "step"))
            lines.push_back(std::move(line));
        else
            ++unreadable;
    }
    return lines;
}

/// Reads one run directory.
class Reader {
  public:
    Reader(const std::string& run, const FileTimes& times) : paths_(run), run_(run), times_(times), now_(times.now())
    {
        std::error_code ignored;
        SELM_VALIDATE(fs::is_directory(run, ignored), ExitCode::bad_data,
                      run << " does not exist (no run can be looked at). Pass --run PATH of a run; a job that has not started yet has none");
        const std::string chain_recipe = run + "/slurm/recipe.cfg";
        const std::string& recipe = exists(paths_.recipe()) ? paths_.recipe() : chain_recipe;
        const bool started = exists(recipe) || exists(run + "/slurm/provenance.txt");
        SELM_VALIDATE(started, ExitCode::bad_data,
                      run << " is no run directory of selm_iter or submit_chain.sh (it has neither recipe.cfg nor slurm/). Pass --run PATH of a run");
        recipe_ = RecipeValues(exists(recipe) ? read_file(recipe) : "");
    }

    RunStatus read()
    {
        RunStatus status;
        status.run = run_;
        status.iterations = recipe_.count("run.iterations", IterateOptions().iterations);
        status.stop_file = exists(paths_.stop_file());
        status.jobs = jobs_of_run(run_);
        for (const JobStatus& job : status.jobs)
            if (job.started)
                newest_start_ = std::max(newest_start_.value_or(*job.started), *job.started);
        manifest_ = read_json(paths_.manifest(), problems_);
        const std::int64_t rows = add_import(status).value_or(-1);
        add_held_out(status, 0);
        for (std::int64_t t = 1; t <= status.iterations; ++t) {
            add_iteration(status, t, rows < 0 ? std::nullopt : std::optional(rows / std::max<std::int64_t>(1, status.iterations)));
            status.iterations_done += status.phases.back().state == PhaseState::done;
            add_held_out(status, t);
        }
        status.phases.front().problems.insert(status.phases.front().problems.end(), problems_.begin(), problems_.end());
        return status;
    }

  private:
    static bool is_hdf5(const std::string& path) { return path.ends_with(".h5") || path.ends_with(".hdf5"); }

    /// A phase, done where the manifest has it.
    PhaseStatus make_phase(std::int64_t t, const char* name) const
    {
        PhaseStatus phase;
        phase.iteration = t;
        phase.phase = name;
        const auto iteration = manifest_.find("iter" + std::to_string(t));
        if (iteration == manifest_.end() || !iteration->is_object() || !iteration->contains(name))
            return phase;
        const json& report = (*iteration)[name];
        phase.state = PhaseState::done;
        phase.unit = std::string(name) == "train" ? "steps" : "rows";
        if (const auto done = number(report, phase.unit.c_str()))
            phase.done = phase.total = static_cast<std::int64_t>(*done);
        const auto seconds = number(report, "seconds");
        if (seconds && *seconds > 0) {
            phase.seconds = seconds;
            if (const auto tokens = number(report, "tokens"))
                phase.tokens_per_s = *tokens / *seconds;
            const double fresh = static_cast<double>(phase.done.value_or(0)) - number(report, "resumed_rows").value_or(0);
            if (phase.unit == "rows" && fresh > 0)
                phase.rate = fresh / *seconds;
        }
        return phase;
    }

    void finish(PhaseStatus& phase, std::optional<std::int64_t> rows) const
    {
        phase.state = PhaseState::done;
        if (rows)
            phase.done = phase.total = rows;
        phase.seconds_left = phase.silent_s = std::nullopt;
    }

    /// Rate and what follows from it: silence and the time left.
    void judge(PhaseStatus& phase, std::optional<double> last) const
    {
        if (last)
            phase.silent_s = std::max(0.0, now_ - *last);
        if (!phase.rate || !phase.total || !phase.done)
            return;
        if (phase.silent_s.value_or(0) <= std::max(silent_at_least_s, silent_intervals / *phase.rate))
            phase.seconds_left = static_cast<double>(std::max<std::int64_t>(0, *phase.total - *phase.done)) / *phase.rate;
    }

    /// Rows that journals hold; the rate is that of the journal written last.
    void add_journals(PhaseStatus& phase, const std::vector<std::string>& outputs, std::optional<std::int64_t> total) const
    {
        std::optional<double> last;
        for (const std::string& output : outputs) {
            JournalSurvey survey;
            try {
                survey = Journal::survey(output);
            } catch (const Error& error) {
                phase.problems.emplace_back(error.what());
            }
            for (const std::string& path : survey.damaged)
                phase.problems.push_back(path + " is damaged: rows behind the damage are made again");
            if (survey.attempt == 0)
                continue;
            phase.state = PhaseState::under_way;
            phase.done = phase.done.value_or(0) + survey.rows;
            const auto [first_row, last_row] = span_of(survey.attempt_files);
            if (last_row && last && *last_row < *last)
                continue;
            last = last_row;
            phase.attempt = survey.attempt;
            phase.rate = rate_of(survey, first_row, last_row);
        }
        if (phase.state == PhaseState::pending)
            return;
        phase.total = total;
        judge(phase, last);
    }

    /// When the first of these files was made and the last written.
    std::pair<std::optional<double>, std::optional<double>> span_of(const std::vector<std::string>& files) const
    {
        std::optional<double> first, last;
        for (const std::string& path : files) {
            if (const auto born = times_.born(path))
                first = std::min(first.value_or(*born), *born);
            if (const auto modified = times_.modified(path))
                last = std::max(last.value_or(*modified), *modified);
        }
        return {first, last};
    }

    /// A rank makes its file when its first row is done: that one says nothing. Without times of making, from the job's start.
    std::optional<double> rate_of(const JournalSurvey& survey, std::optional<double> first, std::optional<double> last) const
    {
        if (!last)
            return std::nullopt;
        auto rows = static_cast<double>(survey.attempt_rows);
        if (first)
            rows -= static_cast<double>(survey.attempt_files.size());
        else
            first = newest_start_;
        if (!first || *last <= *first || rows <= 0)
            return std::nullopt;
        return rows / (*last - *first);
    }

    std::optional<std::int64_t> add_import(RunStatus& status)
    {
        const std::string train = recipe_.text("run.train", "");
        const bool imports = !is_hdf5(train);
        PhaseStatus phase = make_phase(0, "import");
        const DataFile data = look_into(imports ? paths_.train_data() : train);
        if (data.there)
            finish(phase, data.rows);
        if (!data.problem.empty())
            phase.problems.push_back(data.problem);
        status.phases.push_back(std::move(phase));
        return data.rows;
    }

    void add_iteration(RunStatus& status, std::int64_t t, std::optional<std::int64_t> portion)
    {
        const std::string path = paths_.rows(t);
        PhaseStatus generate = make_phase(t, "generate"), rank = make_phase(t, "rank"), logprob = make_phase(t, "logprob");
        // Journals first: they vanish once the file is there.
        if (generate.state != PhaseState::done)
            add_journals(generate, {path}, portion);
        const std::vector<std::string> ranked = journals_beside(path, ".rank-");
        const std::string logprobs = path + ".logprobs-" + LogProbOptions().name;
        if (rank.state != PhaseState::done)
            add_journals(rank, ranked, std::nullopt);
        if (logprob.state != PhaseState::done)
            add_journals(logprob, {logprobs}, std::nullopt);
        const DataFile file = look_into(path);
        settle(generate, file.there, file.rows, file.rows ? file.rows : portion);
        settle(rank, file.has_pairs, file.rows, total_of_rankers(file.rows ? file.rows : portion));
        settle(logprob, file.has_logprobs, file.rows, file.rows ? file.rows : portion);
        if (!file.problem.empty())
            generate.problems.push_back(file.problem);
        status.phases.insert(status.phases.end(), {generate, rank, logprob, train_phase(t, file.rows ? file.rows : portion)});
    }

    void add_held_out(RunStatus& status, std::int64_t t)
    {
        const std::string test = recipe_.text("run.test", "");
        const std::string path = paths_.test_rows(t);
        PhaseStatus generate = make_phase(t, "test_generate"), rank = make_phase(t, "test_rank");
        if (test.empty() && !exists(path))
            return;
        if (!held_out_rows_)
            held_out_rows_ = look_into(is_hdf5(test) ? test : paths_.test_data()).rows;
        if (generate.state != PhaseState::done)
            add_journals(generate, {path}, held_out_rows_);
        if (rank.state != PhaseState::done)
            add_journals(rank, journals_beside(path, ".rank-"), std::nullopt);
        const DataFile file = look_into(path);
        settle(generate, file.there, file.rows, held_out_rows_);
        settle(rank, file.ranked, file.rows, total_of_rankers(file.rows ? file.rows : held_out_rows_));
        if (!file.problem.empty())
            generate.problems.push_back(file.problem);
        status.phases.push_back(std::move(generate));
        if (!recipe_.text("rank.ranker", "").empty() || rank.state != PhaseState::pending)
            status.phases.push_back(std::move(rank));
    }

    /// Outputs whose journal stands beside `path` under a name that begins with its own and `infix`.
    static std::vector<std::string> journals_beside(const std::string& path, const std::string& infix)
    {
        std::vector<std::string> outputs;
        std::error_code error;
        const std::string prefix = fs::path(path).filename().string() + infix, suffix = ".journal";
        for (fs::directory_iterator entry(fs::path(path).parent_path(), error), end; !error && entry != end; entry.increment(error))
            if (const std::string name = entry->path().filename().string(); name.starts_with(prefix) && name.ends_with(suffix))
                outputs.push_back(entry->path().parent_path().string() + "/" + name.substr(0, name.size() - suffix.size()));
        std::sort(outputs.begin(), outputs.end());
        return outputs;
    }

    std::optional<std::int64_t> total_of_rankers(std::optional<std::int64_t> rows) const
    {
        const std::string rankers = recipe_.text("rank.ranker", "");
        return rows ? std::optional(*rows * (1 + std::count(rankers.begin(), rankers.end(), ','))) : std::nullopt;
    }

    void settle(PhaseStatus& phase, bool complete, std::optional<std::int64_t> rows, std::optional<std::int64_t> total) const
    {
        if (phase.state == PhaseState::done)
            return;
        if (complete) {
            finish(phase, rows);
            return;
        }
        phase.total = total;
        if (phase.state == PhaseState::pending)
            return;
        phase.seconds_left = std::nullopt;
        judge(phase, phase.silent_s ? std::optional(now_ - *phase.silent_s) : std::nullopt);
    }

    PhaseStatus train_phase(std::int64_t t, std::optional<std::int64_t> rows) const
    {
        PhaseStatus phase = make_phase(t, "train");
        phase.unit = "steps";
        const std::string policy = paths_.policy(t);
        add_metrics(phase, policy + "/metrics.jsonl", rows);
        if (phase.state == PhaseState::done)
            return phase;
        add_checkpoint(phase, policy + "/checkpoints");
        if (exists(policy + "/" + training_record_name) && exists(policy + "/config.json"))
            finish(phase, std::nullopt);
        return phase;
    }

    void add_metrics(PhaseStatus& phase, const std::string& path, std::optional<std::int64_t> rows) const
    {
        const std::int64_t epochs = recipe_.count("train.epochs", TrainOptions().epochs);
        const std::int64_t batch = std::max<std::int64_t>(1, recipe_.count("train.global-batch", TrainOptions().global_batch));
        std::size_t unreadable = 0;
        const std::vector<json> lines = last_lines(path, unreadable);
        if (unreadable > 0)
            phase.problems.push_back(cat(path, ": ", unreadable, " lines cannot be read"));
        const std::optional<double> last = times_.modified(path);
        if (phase.state == PhaseState::done) {
            phase.rate = steps_per_second(lines, std::nullopt);
            return;
        }
        if (rows)
            phase.total = steps_per_epoch(*rows, batch) * epochs;
        if (!last)
            return;
        phase.state = PhaseState::under_way;
        phase.done = lines.empty() ? 0 : static_cast<std::int64_t>(*number(lines.back(), "step"));
        if (!lines.empty())
            if (const double epoch = number(lines.back(), "epoch").value_or(0); epoch > 0)
                phase.total = std::llround(static_cast<double>(*phase.done) / epoch) * epochs;
        // The file is made anew when an attempt begins, with the lines of the steps that it goes on from.
        const auto born = times_.born(path);
        phase.rate = steps_per_second(lines, born ? std::optional(*last - *born) : std::nullopt);
        judge(phase, last);
    }

    /// @param within seconds that the present attempt has lasted: older steps do not count; nothing: unknown
    static std::optional<double> steps_per_second(const std::vector<json>& lines, std::optional<double> within)
    {
        double seconds = 0;
        std::int64_t steps = 0;
        for (auto line = lines.rbegin(); line != lines.rend() && steps < static_cast<std::int64_t>(newest_steps); ++line) {
            const double step = number(*line, "step_s").value_or(0);
            if (within && seconds + step > *within)
                break;
            seconds += step;
            ++steps;
        }
        return seconds > 0 ? std::optional(static_cast<double>(steps) / seconds) : std::nullopt;
    }

    void add_checkpoint(PhaseStatus& phase, const std::string& directory) const
    {
        std::error_code error;
        for (fs::directory_iterator entry(directory, error), end; !error && entry != end; entry.increment(error)) {
            const std::string path = entry->path().string();
            if (!path.ends_with(".json"))
                continue;
            json manifest;
            try {
                manifest = json::parse(read_file(path), nullptr, false);
            } catch (const Error&) {
                continue; // a newer one has taken its place
            }
            const auto step = manifest.is_object() ? number(manifest, "step") : std::nullopt;
            if (!step || !exists(path.substr(0, path.size() - 5) + ".h5")) {
                phase.problems.push_back(path + " is damaged");
                continue;
            }
            phase.state = PhaseState::under_way;
            if (phase.checkpoint && *phase.checkpoint >= static_cast<std::int64_t>(*step))
                continue;
            phase.checkpoint = static_cast<std::int64_t>(*step);
            if (const auto saved = times_.modified(path))
                phase.checkpoint_age_s = std::max(0.0, now_ - *saved);
        }
    }

    RunPaths paths_;
    std::string run_;
    const FileTimes& times_;
    double now_;
    RecipeValues recipe_{""};
    json manifest_;
    std::optional<double> newest_start_; ///< of a job
    std::optional<std::int64_t> held_out_rows_;
    std::vector<std::string> problems_;
};

} // namespace

FileTimes FileTimes::real()
{
    return {.now = [] { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); },
            .born = [](const std::string& path) { return statx_time(path, STATX_BTIME, [](const struct statx& s) { return s.stx_btime; }); },
            .modified = [](const std::string& path) { return statx_time(path, STATX_MTIME, [](const struct statx& s) { return s.stx_mtime; }); }};
}

RunStatus read_run_status(const std::string& run, const FileTimes& times)
{
    return Reader(run, times).read();
}

} // namespace selm
