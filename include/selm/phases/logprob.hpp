#pragma once

#include <cstdint>
#include <string>

#include "selm/base/options.hpp"
#include "selm/comm/communicator.hpp"
#include "selm/phases/generate.hpp"

namespace selm {

/// Options of selm_logp ([logp]).
struct LogProbOptions {
    CommonOptions common;
    EncodingOptions encoding;
    std::string iter;                      ///< iter.h5 with /pairs
    std::string model;                     ///< Hugging Face model directory
    std::string name = "reference";        ///< group under /logprobs
    std::int64_t tokens_per_microbatch = 2048;
    std::string stop_file;

    void describe(OptionVisitor& visitor);
    void validate() const;
};

struct LogProbReport {
    Outcome outcome = Outcome::done;
    std::int64_t rows = 0, resumed_rows = 0;
    std::int64_t tokens = 0;               ///< packed tokens computed by this run, all ranks
    std::int64_t scored_tokens = 0;
    double seconds = 0;
};

/// Sums of response-token log-probs of best, worst and generated answers by one packed pass per row; writes
/// /logprobs/NAME. Collective over comm.
LogProbReport run_logprob(const LogProbOptions& options, Communicator& comm);

} // namespace selm
