#pragma once

#include <string>

namespace selm {

std::string software_version();   ///< "selm 0.1.0 (git abcdef)"
std::string build_description();  ///< compiler, flags, library versions
std::string host_name();
std::string cpu_model();
std::string utc_timestamp();      ///< 2026-01-31T12:00:00Z

} // namespace selm
