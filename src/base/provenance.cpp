#include "selm/base/provenance.hpp"

#include <ctime>
#include <fstream>

#include <unistd.h>

#include "selm_build_info.hpp"

namespace selm {

std::string software_version()
{
    return "selm " SELM_BUILD_VERSION " (git " SELM_BUILD_COMMIT ")";
}

std::string build_description()
{
    return SELM_BUILD_COMPILER "; " SELM_BUILD_FLAGS "; " SELM_BUILD_LIBRARIES;
}

std::string host_name()
{
    char name[256] = {};
    if (::gethostname(name, sizeof name - 1) != 0)
        return "unknown";
    return name;
}

std::string cpu_model()
{
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);) {
        if (line.starts_with("model name")) {
            const std::size_t start = line.find_first_not_of(" \t", line.find(':') + 1);
            return start == std::string::npos ? "unknown" : line.substr(start);
        }
    }
    return "unknown";
}

std::string utc_timestamp()
{
    const std::time_t now = std::time(nullptr);
    std::tm parts{};
    ::gmtime_r(&now, &parts);
    char text[32];
    std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &parts);
    return text;
}

} // namespace selm
