#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>

#include "selm/base/options.hpp"
#include "selm/comm/communicator.hpp"
#include "selm/phases/generate.hpp"
#include "selm/phases/import.hpp"
#include "selm/phases/logprob.hpp"
#include "selm/phases/rank.hpp"
#include "selm/phases/train.hpp"

namespace selm {

/// Options of selm_iter: every section of the recipe; [run] holds what only the driver needs.
struct IterateOptions {
    std::string run;                       ///< run directory
    std::string train;                     ///< jsonl, parquet or h5
    std::string train_rows;                ///< A:B lines of train; empty: all
    std::string test;                      ///< held-out prompts; empty: none
    std::string test_rows;
    std::string policy;                    ///< model directory of iteration 0
    std::int64_t iterations = 3;           ///< = portions
    std::string first_iteration = "selm";  ///< selm | dpo
    bool status = false;                   ///< print where RUN stands and exit; reads only
    bool dry_run = false;                  ///< print what would be done and exit; writes nothing
    std::int64_t ranks = 0;                ///< of the dry run; 0: those of the communicator
    std::int64_t ranks_per_node = 0;       ///< of the dry run; 0: all ranks on one node
    double node_memory = 0;                ///< GiB; a dry run that needs more on a node is refused; 0: not checked
    std::int64_t rows_total = 0;           ///< rows of train for a dry run without the file; 0: counted
    std::string format = "table";          ///< of dry run and status: table | json
    ImportOptions import;
    GenerateOptions generate;
    RankOptions rank;
    LogProbOptions logprob;
    TrainOptions train_options;
    std::string recipe_text;               ///< canonical text of the effective recipe (apps fill it), compared on resume

    void describe(OptionVisitor& visitor);
    void validate() const;
};

struct IterateReport {
    Outcome outcome = Outcome::done;
    std::int64_t iterations_done = 0;
    std::string status;                    ///< text of --status or --dry-run, on rank 0
};

/// All phases of all iterations, resuming where the run directory stands. Rank 0 writes a block of results to @p out as each
/// iteration is complete (also those of earlier runs). Collective over comm.
IterateReport run_iterate(const IterateOptions& options, Communicator& comm, std::ostream& out);

} // namespace selm
