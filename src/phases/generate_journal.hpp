#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "selm/data/journal.hpp"
#include "selm/phases/generate_scheduler.hpp"

namespace selm {

/// What rows of generation are bound to: a journal's rows are taken over only when this run would make them too. Engines
/// round differently, so their rows do not mix. @param engine_key SharedModel::engine_key().
JournalBinding generation_binding(const std::string& recipe_hash, const std::string& policy_digest,
                                  const std::string& data_digest, const std::string& engine_key);

std::vector<std::byte> to_payload(const SampledAnswer& answer);
SampledAnswer from_payload(const Journal::Record& record); ///< @throws Error bad_data: damaged

} // namespace selm
