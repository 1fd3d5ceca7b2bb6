#pragma once

#include <functional>
#include <string>

#include "selm/base/options.hpp"

namespace selm {

/// The effective configuration of a phase, as stored in what it writes.
struct ConfigText {
    std::string ini; ///< all keys, by section, in the order of their description
    /// Over "section.key = value" of the recipe's keys, sorted: operational keys do not matter.
    std::string recipe_hash;
};

ConfigText config_text(const std::function<void(OptionVisitor&)>& describe);

/// Of an options struct with describe(); works on a copy.
template<typename Options>
    requires requires(Options options, OptionVisitor& visitor) { options.describe(visitor); }
ConfigText config_text(Options options)
{
    return config_text(std::function<void(OptionVisitor&)>([&](OptionVisitor& visitor) { options.describe(visitor); }));
}

} // namespace selm
