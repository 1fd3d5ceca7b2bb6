#pragma once

#include "option_table.hpp"

namespace selm::apps {

/// The keys of all programs.
KnownKeys all_known_keys();

} // namespace selm::apps
