#include "run_directory.hpp"

#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>

#include "selm/base/attempt.hpp"
#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/comm/agree.hpp"

namespace selm {
namespace {

std::map<std::string, std::string> recipe_lines(const std::string& text)
{
    std::map<std::string, std::string> lines;
    std::istringstream in(text);
    for (std::string line; std::getline(in, line);) {
        const auto equals = line.find(" = ");
        if (equals != std::string::npos)
            lines[line.substr(0, equals)] = line.substr(equals + 3);
    }
    return lines;
}

std::string key_of(std::int64_t iteration)
{
    return "iter" + std::to_string(iteration);
}

} // namespace

std::string recipe_difference(const std::string& stored, const std::string& given)
{
    const auto before = recipe_lines(stored);
    const auto now = recipe_lines(given);
    std::string difference;
    auto add = [&](const std::string& key, const std::string& was, const std::string& is) {
        difference += cat(difference.empty() ? "" : "; ", key, " was ", was, ", now ", is);
    };
    for (const auto& [key, value] : before) {
        const auto found = now.find(key);
        if (found == now.end())
            add(key, value, "absent");
        else if (found->second != value)
            add(key, value, found->second);
    }
    for (const auto& [key, value] : now)
        if (!before.count(key))
            add(key, "absent", value);
    return difference;
}

void claim_run_directory(const RunPaths& paths, const std::string& run, const std::string& recipe_text, Communicator& comm)
{
    agree(comm, "run directory", [&] {
        if (!comm.is_root())
            return;
        std::error_code error;
        std::filesystem::create_directories(run, error);
        SELM_VALIDATE(!error, ExitCode::io, "cannot create run directory " << run << " (" << error.message() << "). Pass --run PATH");
        if (!std::filesystem::exists(paths.recipe())) {
            SELM_VALIDATE(!std::filesystem::exists(paths.manifest()), ExitCode::configuration,
                          run << " has a manifest.json but no recipe.cfg (what its results were made with is unknown). Use a new --run");
            claim_run(run);
            write_file_atomically(paths.recipe(), recipe_text);
            return;
        }
        const std::string difference = recipe_difference(read_file(paths.recipe()), recipe_text);
        SELM_VALIDATE(difference.empty(), ExitCode::configuration,
                      run << " was made with another recipe (mixing two recipes would spoil its results): " << difference
                          << ". Use a new --run, or the recipe of " << paths.recipe());
        claim_run(run); // after the checks: a wrong command must not stop a run that is under way
    });
}

RunManifest::RunManifest(const RunPaths& paths, Communicator& comm) : paths_(paths)
{
    const std::string text = root_string(comm, "read manifest", [&]() -> std::string {
        return std::filesystem::exists(paths_.manifest()) ? read_file(paths_.manifest()) : std::string("{}");
    });
    try {
        json_ = nlohmann::json::parse(text);
    } catch (const nlohmann::json::exception& error) {
        throw data_error(cat(paths_.manifest(), " is not JSON (", error.what(),
                             "). Remove it: finished phases are found again from their files"));
    }
}

const nlohmann::json* RunManifest::phase(std::int64_t iteration, const std::string& name) const
{
    const auto entry = json_.find(key_of(iteration));
    if (entry == json_.end())
        return nullptr;
    const auto found = entry->find(name);
    return found == entry->end() ? nullptr : &*found;
}

void RunManifest::record(std::int64_t iteration, const std::string& name, const nlohmann::json& report, Communicator& comm)
{
    json_[key_of(iteration)][name] = report;
    agree(comm, "write manifest", [&] {
        if (!comm.is_root())
            return;
        write_file_atomically(paths_.manifest(), json_.dump(2) + "\n");
        std::filesystem::create_directories(paths_.log(iteration));
        std::ofstream log(paths_.log(iteration) + "/phases.jsonl", std::ios::app);
        nlohmann::json line = report;
        line["phase"] = name;
        log << line.dump() << '\n';
    });
}

} // namespace selm
