#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>

#include "selm/base/options.hpp"
#include "selm/comm/communicator.hpp"

namespace selm {

/// Options of selm_inspect ([inspect]).
struct InspectOptions {
    std::string file;
    std::int64_t row = -1;  ///< position in the file to print; -1: none
    bool verify = false;    ///< check every dataset
    bool digest = false;    ///< print the hexadecimal data digest and nothing else
    std::string encode = {}; ///< directory of a tokenizer: print the rows as its token ids, one line of JSON each
    std::string rows = {};  ///< encode: positions A:B; empty: all
    EncodingOptions encoding = {}; ///< encode; rows of any length are shown as they are (on_long_row needs a model)

    void describe(OptionVisitor& visitor);
    void validate() const; ///< @throws Error usage
};

/**
 * @brief Prints what is in a file that SELM wrote: kind, provenance, counts, lengths, ranking statistics; or one row; or its
 * digest; or its rows as token ids; or checks it. Root works and writes to @p out; collective (the other ranks share its success or error).
 * @throws Error bad_data: not such a file, no such row, or the first problem found by verify.
 */
void run_inspect(const InspectOptions& options, Communicator& comm, std::ostream& out);

/// Checks every dataset of a selm-prefs or selm-iteration file: offsets monotone and matching, ranges, finiteness and the NaN
/// rule, counts, ranks and pairs consistent with the scores, valid UTF-8. @throws Error bad_data: the first problem.
void verify_file(const std::string& path);

} // namespace selm
