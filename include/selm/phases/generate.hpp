#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "selm/base/options.hpp"
#include "selm/comm/communicator.hpp"

namespace selm {

/// How a phase ended. `stopped`: a stop was requested, everything so far is saved, exit code 75.
enum class Outcome { done, already_complete, stopped };

/// Options of selm_gen ([gen]).
struct GenerateOptions {
    CommonOptions common;
    EncodingOptions encoding;
    std::string data;                      ///< prefs.h5
    std::string policy;                    ///< Hugging Face model directory
    std::string output;                    ///< iter.h5
    std::int64_t iteration = 0;            ///< 0: = portion
    std::int64_t portion = 1, portions = 1;
    std::int64_t max_new_tokens = 1024;
    double temperature = 0;                ///< 0: greedy
    double top_p = 1;
    std::int64_t top_k = 0;                ///< 0: off
    std::int64_t slots = 16;               ///< sequences decoded together per rank
    std::string on_long_prompt = "stop";   ///< stop | skip
    std::string responses;                 ///< F.jsonl with answers made elsewhere, or "none"; empty: generate
    std::string stop_file;                 ///< polled on rank 0

    void describe(OptionVisitor& visitor);
    void validate() const;
};

struct GenerateReport {
    Outcome outcome = Outcome::done;
    std::int64_t rows = 0;                 ///< of the portion
    std::int64_t generated_rows = 0;       ///< by this run
    std::int64_t resumed_rows = 0;         ///< taken from the journal
    std::int64_t skipped_rows = 0;         ///< on_long_prompt = skip (stored with finish_reason 3)
    std::int64_t prompt_tokens = 0, new_tokens = 0; ///< of this run, all ranks
    std::int64_t stopped_by_end = 0, stopped_by_length = 0;
    double seconds = 0;                    ///< wall time, slowest rank
    double idle_fraction = 0;              ///< mean over ranks of idle / wall
};

/// One response per prompt from the policy, written to `output`. Collective over comm.
GenerateReport run_generate(const GenerateOptions& options, Communicator& comm);

} // namespace selm
