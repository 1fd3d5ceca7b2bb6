#include <algorithm>
#include <iomanip>
#include <sstream>
#include <string>
#include <vector>

#include "dry_run.hpp"

namespace selm {
namespace {

using nlohmann::ordered_json;

std::string gib(const ordered_json& bytes)
{
    constexpr double mebibyte = 1024.0 * 1024;
    const double value = bytes.get<double>();
    std::ostringstream out;
    out << std::fixed;
    if (value < 1024 * mebibyte)
        out << std::setprecision(1) << value / mebibyte << " MiB";
    else
        out << std::setprecision(2) << value / (1024 * mebibyte) << " GiB";
    return out.str();
}

std::string joined(const ordered_json& words)
{
    std::string text;
    for (const auto& word : words)
        text += (text.empty() ? "" : ", ") + word.get<std::string>();
    return text;
}

void print_head(std::ostream& out, const ordered_json& plan)
{
    const auto& model = plan["model"];
    out << "dry run: nothing is computed or written\n"
        << "ranks       " << plan["ranks"] << " on " << plan["nodes"] << " node(s), " << plan["ranks_per_node"] << " a node\n"
        << "model       " << model["directory"].get<std::string>() << ": " << model["type"].get<std::string>() << ", " << model["layers"]
        << " layers, hidden " << model["hidden"] << ", vocabulary " << model["vocabulary"] << ", context " << model["context"] << ", "
        << model["parameters"] << " parameters\n"
        << "rows        " << plan["rows"] << " in " << plan["iterations"].size() << " portion(s) of " << plan["rows_per_iteration"] << " ("
        << plan["rows_unused"] << " unused), " << plan["test_rows"] << " held out\n"
        << "writes      " << joined(plan["writes"]) << "\n";
    for (const auto& one : plan["inputs"])
        if (!one["present"].get<bool>())
            out << "missing     " << one["what"].get<std::string>() << ": " << one["path"].get<std::string>()
                << " (the run needs it)\n";
}

/// Steps (from 1) that show the shape of a schedule.
std::vector<std::int64_t> telling_steps(std::int64_t steps, std::int64_t warmup)
{
    std::vector<std::int64_t> list{1, 2, warmup, warmup + 1, (warmup + 1 + steps) / 2, steps};
    std::sort(list.begin(), list.end());
    list.erase(std::unique(list.begin(), list.end()), list.end());
    std::erase_if(list, [&](std::int64_t step) { return step < 1 || step > steps; });
    return list;
}

void print_training(std::ostream& out, const ordered_json& train)
{
    const auto steps = train["steps"].get<std::int64_t>();
    out << "    " << steps << " optimizer steps of " << train["global_batch"] << " rows, " << train["warmup_steps"] << " of them warm-up";
    if (train["rows_unused_per_epoch"].get<std::int64_t>() > 0)
        out << "; " << train["rows_unused_per_epoch"] << " rows of an incomplete last batch are not used";
    out << "\n    alpha " << train["alpha"] << ", beta " << train["beta"] << ", " << train["schedule"].get<std::string>()
        << " learning rate, by step:";
    for (const std::int64_t step : telling_steps(steps, train["warmup_steps"].get<std::int64_t>()))
        out << "  " << step << ": " << std::setprecision(4) << train["learning_rates"][static_cast<std::size_t>(step - 1)].get<double>();
    out << "\n";
}

void print_phases(std::ostream& out, const ordered_json& phases)
{
    for (const auto& phase : phases) {
        out << "  " << std::left << std::setw(14) << phase["phase"].get<std::string>() << std::right << std::setw(8) << phase["rows"]
            << " rows  -> " << joined(phase["writes"]);
        if (phase.contains("answers"))
            out << " (no new answers)";
        if (phase.contains("update_rule"))
            out << " (" << phase["update_rule"].get<std::string>() << ")";
        out << "\n";
        if (phase.contains("steps"))
            print_training(out, phase);
    }
}

void print_memory(std::ostream& out, const ordered_json& plan)
{
    out << "memory\n";
    for (const auto& phase : plan["memory"]) {
        out << "  " << std::left << std::setw(10) << phase["phase"].get<std::string>() << std::right << gib(phase["rank_bytes"])
            << " a rank, " << gib(phase["node_bytes"]) << " a node\n";
        for (const auto& [name, bytes] : phase["per_rank"].items())
            out << "    a rank  " << std::left << std::setw(18) << name << std::right << gib(bytes) << "\n";
        for (const auto& [name, bytes] : phase["per_node"].items())
            out << "    a node  " << std::left << std::setw(18) << name << std::right << gib(bytes) << " (shared by its ranks)\n";
        if (!phase["not_counted"].empty())
            out << "    not counted (not at hand): " << joined(phase["not_counted"]) << "\n";
    }
    const auto& shards = plan["shards"];
    out << "shards      " << shards["elements"] << " elements, each with one owner among " << shards["ranks"] << " ranks; "
        << shards["smallest"] << " to " << shards["largest"] << " a rank\n"
        << "a policy    " << gib(plan["model"]["saved_bytes"]) << " on disk\n";
}

} // namespace

std::string plan_table(const ordered_json& plan)
{
    std::ostringstream out;
    print_head(out, plan);
    if (!plan["before_training"].empty()) {
        out << "before training\n";
        print_phases(out, plan["before_training"]);
    }
    for (const auto& iteration : plan["iterations"]) {
        out << "iteration " << iteration["iteration"] << ": rows " << iteration["rows"][0] << ":" << iteration["rows"][1] << ", policy "
            << iteration["policy"].get<std::string>() << "\n";
        print_phases(out, iteration["phases"]);
    }
    print_memory(out, plan);
    return out.str();
}

} // namespace selm
