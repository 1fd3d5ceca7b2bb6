#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "selm/base/options.hpp"
#include "selm/comm/communicator.hpp"
#include "selm/phases/generate.hpp"

namespace selm {

/// Options of selm_rank ([rank]).
struct RankOptions {
    CommonOptions common;
    EncodingOptions encoding;              ///< max_length caps what a reward model reads
    std::string iter;                      ///< iter.h5
    std::vector<std::string> rankers;      ///< --ranker KIND:PATH (pairrm:DIR | reward:DIR | file:F.jsonl), repeatable; empty only with offline
    std::string update_rule = "best-worst"; ///< best-worst | replace | offline
    std::string rank_mode = "per-row";     ///< per-row | blender (pairrm only)
    std::string pairrm_dtype = "fp32";     ///< fp32 | bf16: as --dtype, of pairrm rankers; fp32 is what LLM-Blender uses on CPUs
    bool generated_only = false;           ///< score only the generated answers (held-out files): chosen and rejected NaN, no /pairs
    std::int64_t tokens_per_microbatch = 4096;
    std::string stop_file;

    void describe(OptionVisitor& visitor);
    void validate() const;
};

struct RankReport {
    Outcome outcome = Outcome::done;
    std::int64_t rows = 0;
    std::int64_t generated_best = 0, generated_middle = 0, generated_worst = 0; ///< by rank 1 / 2 / 3 among the existing three
    std::int64_t ties = 0;                 ///< rows with best == worst
    std::array<double, 3> mean_score{};    ///< generated, chosen, rejected (over rows where it exists)
    std::int64_t tokens = 0;
    double seconds = 0;
};

/// Scores {generated, chosen, rejected} and writes /ranking and /pairs. Collective over comm.
RankReport run_rank(const RankOptions& options, Communicator& comm);

} // namespace selm
