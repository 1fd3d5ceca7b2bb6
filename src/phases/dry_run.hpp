#pragma once

#include <string>

#include <nlohmann/json.hpp>

#include "selm/phases/iterate.hpp"

namespace selm {

/**
 * @brief What a recipe would do, without weights, ranks or writing: rows, steps, learning rates, files and memory of every
 * phase; the shard map is checked for the planned number of ranks. Reads config.json of the policy, counts the rows of the
 * data files that are at hand, and checks all that can be checked (docs/FORMATS.md describes the keys).
 * @param ranks_here ranks of the plan where options.ranks is 0. Not collective.
 * @throws Error as the phases would: a recipe that cannot run.
 */
nlohmann::ordered_json plan_run(const IterateOptions& options, int ranks_here);

/// The plan for people.
std::string plan_table(const nlohmann::ordered_json& plan);

/// plan_run() in options.format.
std::string dry_run_text(const IterateOptions& options, int ranks_here);

} // namespace selm
