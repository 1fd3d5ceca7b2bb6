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
    std::int64_t prefill_tokens = 256;     ///< of prompts read per step beside the decoding sequences
    bool cuda_graphs = true;               ///< on CUDA devices, steps of single tokens are repeated as CUDA graphs
    bool share_prefixes = true;            ///< what prompts begin with alike is read once (the data do not depend on it)
    std::string on_long_prompt = "stop";   ///< stop | skip
    std::string responses;                 ///< F.jsonl with answers made elsewhere, or "none"; empty: generate
    std::string stop_file;                 ///< polled on rank 0

    void describe(OptionVisitor& visitor);
    void validate() const; ///< @throws Error usage, configuration
};

struct GenerateReport {
    Outcome outcome = Outcome::done;
    std::int64_t rows = 0;                 ///< of the portion
    std::int64_t generated_rows = 0;       ///< by this run
    std::int64_t resumed_rows = 0;         ///< taken from the journal
    std::int64_t skipped_rows = 0;         ///< on_long_prompt = skip (stored with finish_reason 3)
    std::int64_t prompt_tokens = 0, new_tokens = 0; ///< of this run, all ranks
    std::int64_t copied_tokens = 0;        ///< of the prompts' tokens: not computed, see share_prefixes
    std::int64_t stopped_by_end = 0, stopped_by_length = 0;
    double seconds = 0;                    ///< wall time, slowest rank
    double idle_fraction = 0;              ///< mean over ranks of idle / wall
    double first_token_s = 0;              ///< from the start of its process to the first token of the rank that was first; 0: none
};

/**
 * @brief One response per prompt of the portion from the policy, written to `output` (selm-iteration). Collective over comm.
 *
 * The data depend on neither the number of ranks nor slots (where the engine is row invariant; else a warning is logged).
 * Finished rows are journalled beside `output`: a rerun after any end, on any number of ranks, does only the others.
 * A generated answer ends at the chat format's end-of-turn token (with the recipe's encoding at EOS instead), at an
 * eos_token_id of the model directory (generation_config.json, else config.json), or by length.
 *
 * @throws Error configuration: no such policy, tokenizer and model that do not belong together, unknown chat format;
 * bad_data: unreadable data, a prompt that leaves no room in the model's context, responses that do not match the rows, an
 * output that is there and was made otherwise, logits that are not finite; usage: portion out of range; io: disk full.
 */
GenerateReport run_generate(const GenerateOptions& options, Communicator& comm);

} // namespace selm
