#pragma once

#include <string>

#include "selm/base/options.hpp"

namespace selm::apps {

/**
 * @brief Options of a program whose phase computes nothing on a model: its own and those that all programs share, so that one
 * command line or [run] section fits all. They are no part of what the phase stores: its results do not depend on them.
 */
template<typename Options>
struct WithCommonOptions {
    Options own;
    CommonOptions common;

    void describe(OptionVisitor& visitor)
    {
        own.describe(visitor);
        common.describe(visitor);
    }
    void validate() const
    {
        common.validate();
        own.validate();
    }
};

} // namespace selm::apps
