#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "selm/algo/schedule.hpp"
#include "selm/comm/communicator.hpp"
#include "selm/data/preferences.hpp"
#include "selm/phases/config_text.hpp"
#include "selm/phases/generate.hpp"

namespace selm {

/// What an output is made from; equal for two runs exactly when they give the same data.
struct GenerationSource {
    ConfigText config;
    std::string data_digest, policy_digest, responses_digest;
};

/// The rows of the portion and where they come from.
struct GenerationInput {
    std::unique_ptr<PreferencesReader> prefs;
    PortionRange range;
    GenerationSource source;

    std::int64_t rows() const { return range.end - range.begin; }
    std::vector<std::int64_t> keys() const
    {
        std::vector<std::int64_t> keys(static_cast<std::size_t>(rows()));
        for (std::size_t i = 0; i < keys.size(); ++i)
            keys[i] = range.begin + static_cast<std::int64_t>(i);
        return keys;
    }
};

/// Opens the prompts, checks that the output can be written, and computes the digests. Collective over comm.
GenerationInput open_input(const GenerateOptions& options, Communicator& comm);

/// The report of an output that is complete already; nothing when there is no file. Collective over comm.
/// @throws Error bad_data when it was made from something else.
std::optional<GenerateReport> existing_output(const GenerateOptions& options, const GenerationInput& input, Communicator& comm);

} // namespace selm
