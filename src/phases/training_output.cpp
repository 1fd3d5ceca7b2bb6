#include "training_output.hpp"

#include <algorithm>
#include <filesystem>
#include <sstream>
#include <utility>

#include "selm/base/attempt.hpp"
#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/base/provenance.hpp"
#include "selm/comm/agree.hpp"
#include "selm/comm/claim.hpp"

namespace selm {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

namespace {

constexpr const char* record_format = "selm-training";

/// Lines of a metrics file up to `step`; a torn last line and everything after it are dropped.
std::vector<ordered_json> lines_until(const std::string& text, std::int64_t step)
{
    std::vector<ordered_json> lines;
    std::istringstream in(text);
    for (std::string line; std::getline(in, line);) {
        ordered_json json = ordered_json::parse(line, nullptr, false);
        if (!json.is_object() || !json.contains("step") || json["step"].get<std::int64_t>() > step)
            break;
        lines.push_back(std::move(json));
    }
    return lines;
}

void create_directories(const std::string& path)
{
    std::error_code error;
    fs::create_directories(path, error);
    SELM_VALIDATE(!error, ExitCode::io, "cannot create '" << path << "' (" << error.message() << ")");
}

double number(const ordered_json& json, const char* key)
{
    const auto found = json.find(key);
    return found != json.end() && found->is_number() ? found->get<double>() : 0;
}

} // namespace

TrainingOutput::TrainingOutput(std::string directory, Communicator& comm)
    : directory_(std::move(directory)), comm_(comm)
{
    while (directory_.size() > 1 && directory_.ends_with('/'))
        directory_.pop_back(); // "policy/" would put the partial directory inside
}

std::optional<ordered_json> TrainingOutput::finished(const CheckpointBinding& binding)
{
    const std::string path = directory_ + "/" + training_record_name;
    const std::string text = root_string(comm_, "training record", [&] {
        return fs::exists(path) && fs::exists(directory_ + "/config.json") ? read_file(path) : std::string();
    });
    if (text.empty())
        return std::nullopt;
    ordered_json record = ordered_json::parse(text, nullptr, false);
    SELM_VALIDATE(record.is_object() && record.value("format", "") == record_format && record.contains("binding"),
                  ExitCode::bad_data, path << " is damaged. Remove the directory, or pass another --output");
    for (const auto& [name, value] : binding) {
        const std::string found = record["binding"].value(name, std::string("(nothing)"));
        SELM_VALIDATE(found == value, ExitCode::bad_data,
                      directory_ << " holds a model that another run trained: its " << name << " is " << found
                                 << ", this run's is " << value
                                 << " (it is not replaced: it may be needed). Remove it, or pass another --output");
    }
    return record;
}

void TrainingOutput::claim()
{
    agree(comm_, "output directory", [&] {
        if (!comm_.is_root())
            return;
        create_directories(directory_);
        SELM_VALIDATE(
            !fs::exists(directory_ + "/config.json") || fs::exists(metrics_path()), ExitCode::bad_data,
            directory_
                << " holds a model that selm_train did not make (it would be overwritten). Pass another --output");
    });
    claim_phase_output(directory_, comm_);
    agree(comm_, "leftovers", [&] {
        if (comm_.is_root())
            remove_leftovers();
    });
}

void TrainingOutput::remove_leftovers() const
{
    const fs::path path(directory_);
    const std::string prefix = path.filename().string() + ".partial-";
    const fs::path parent = path.parent_path().empty() ? fs::path(".") : path.parent_path();
    std::error_code ignored; // what cannot be removed does no harm
    for (const auto& entry : fs::directory_iterator(parent, ignored))
        if (entry.path().filename().string().starts_with(prefix))
            fs::remove_all(entry.path(), ignored);
    for (const auto& entry : fs::directory_iterator(path, ignored))
        if (entry.path().filename().string().find(".partial-") != std::string::npos)
            fs::remove(entry.path(), ignored);
}

void TrainingOutput::start_anew()
{
    agree(comm_, "starting anew", [&] {
        if (!comm_.is_root())
            return;
        check_newest_attempt(checkpoints());
        std::error_code error;
        fs::remove_all(checkpoints(), error);
        SELM_VALIDATE(!error, ExitCode::io, "cannot remove '" << checkpoints() << "' (" << error.message() << ")");
    });
}

std::vector<ordered_json> TrainingOutput::cut_metrics(std::int64_t step)
{
    const std::string kept = root_string(comm_, "metrics of earlier steps", [&] {
        std::string text;
        if (fs::exists(metrics_path()))
            for (const ordered_json& line : lines_until(read_file(metrics_path()), step))
                text += line.dump() + "\n";
        const std::string partial = metrics_path() + ".partial-" + process_tag();
        metrics_ = std::ofstream(partial, std::ios::trunc);
        metrics_ << text << std::flush;
        SELM_VALIDATE(!metrics_.fail(), ExitCode::io, "writing '" << partial << "' failed. Free some space, then run again");
        publish_file(partial, metrics_path());
        return text;
    });
    return lines_until(kept, step);
}

void TrainingOutput::append_metrics(const ordered_json& line)
{
    agree(comm_, "writing metrics", [&] {
        if (!comm_.is_root())
            return;
        metrics_ << line.dump() << '\n' << std::flush;
        SELM_VALIDATE(!metrics_.fail(), ExitCode::io,
                      "writing '" << metrics_path() << "' failed. Free some space, then run again");
    });
}

void TrainingOutput::publish(const std::function<void(const std::string&)>& write_files,
                             const std::function<void(const std::string&)>& write_weights, ordered_json record,
                             const CheckpointBinding& binding)
{
    const std::string partial = root_string(comm_, "name of the partial model",
                                            [&] { return cat(directory_, ".partial-", process_tag()); });
    const auto on_root = [&](const char* label, const std::function<void()>& body) {
        agree(comm_, label, [&] {
            try {
                if (comm_.is_root())
                    body();
            } catch (const fs::filesystem_error& error) {
                throw io_error(cat("writing the model failed (", error.what(), ")"));
            }
        });
    };
    try {
        on_root("files of the model", [&] {
            create_directories(partial);
            write_files(partial);
        });
        write_weights(partial);
        on_root("naming the model's files", [&] { move_model(partial); });
    } catch (...) {
        std::error_code ignored; // the error that is under way says more
        if (comm_.is_root())
            fs::remove_all(partial, ignored);
        throw;
    }
    on_root("training record", [&] {
        record["format"] = record_format;
        record["binding"] = ordered_json::object();
        for (const auto& [name, value] : binding)
            record["binding"][name] = value;
        record["created"] = utc_timestamp();
        record["software"] = software_version();
        write_file_atomically(cat(directory_, "/", training_record_name), record.dump(2) + "\n");
    });
}

/// Puts the files of a whole model into the output, config.json last: a directory without it is no model.
void TrainingOutput::move_model(const std::string& partial) const
{
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(partial))
        names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    std::stable_partition(names.begin(), names.end(), [](const std::string& name) { return name != "config.json"; });
    for (const std::string& name : names)
        publish_file(partial + "/" + name, directory_ + "/" + name);
    std::error_code ignored; // what cannot be removed does no harm
    fs::remove_all(partial, ignored);
}

ordered_json report_to_json(const TrainReport& report)
{
    return {{"rows", report.rows},
            {"steps", report.steps},
            {"loss", report.loss},
            {"loss_dpo", report.loss_dpo},
            {"loss_optimism", report.loss_optimism},
            {"reward_margin", report.reward_margin},
            {"reward_accuracy", report.reward_accuracy},
            {"first_loss", report.first_loss},
            {"last_loss", report.last_loss},
            {"tokens", report.tokens},
            {"seconds", report.seconds}};
}

TrainReport report_from_json(const ordered_json& record)
{
    TrainReport report;
    report.rows = static_cast<std::int64_t>(number(record, "rows"));
    report.steps = static_cast<std::int64_t>(number(record, "steps"));
    report.loss = number(record, "loss");
    report.loss_dpo = number(record, "loss_dpo");
    report.loss_optimism = number(record, "loss_optimism");
    report.reward_margin = number(record, "reward_margin");
    report.reward_accuracy = number(record, "reward_accuracy");
    report.first_loss = number(record, "first_loss");
    report.last_loss = number(record, "last_loss");
    report.tokens = static_cast<std::int64_t>(number(record, "tokens"));
    report.seconds = number(record, "seconds");
    return report;
}

} // namespace selm
