#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "selm/base/options.hpp"
#include "selm/comm/communicator.hpp"

namespace selm {

/// Options of selm_import ([import]).
struct ImportOptions {
    std::string input;                  ///< .jsonl or .parquet
    std::string output;                 ///< prefs.h5
    std::string on_bad_row = "stop";    ///< stop | skip
    std::string on_empty_answer = "stop"; ///< stop | skip | keep
    std::int64_t limit = 0;             ///< rows to import at most; 0: all
    std::string rows;                   ///< "A:B": lines [A, B) of the source, 0-based; empty: all

    void describe(OptionVisitor& visitor);
    void validate() const; ///< @throws Error usage
};

struct ImportReport {
    bool already_complete = false; ///< the output was there, made from the same input with the same options
    std::int64_t rows = 0;         ///< rows in the output
    std::int64_t rows_read = 0;    ///< rows looked at
    std::map<std::string, std::int64_t> skipped; ///< reason -> rows
    std::int64_t empty_answers = 0; ///< rows kept with an empty chosen or rejected answer
    std::string digest;             ///< data digest of the output
    std::string text() const;       ///< a few readable lines
};

/**
 * @brief Reads preference pairs (`prompt`, `prompt_id`, `chosen`, `rejected` as message lists or plain strings,
 * `score_chosen`, `score_rejected` optional) and writes a selm-prefs file. Rank 0 reads; writing is collective. Collective.
 *
 * @throws Error bad_data on every rank, with no output left: a bad row, as "FILE line N: problem (why). What to do" (on_bad_row
 * stop); no rows at all; an existing output made otherwise. io: disk full.
 */
ImportReport run_import(const ImportOptions& options, Communicator& comm);

} // namespace selm
