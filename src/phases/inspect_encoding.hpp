#pragma once

#include <iosfwd>

#include "selm/phases/inspect.hpp"

namespace selm {

/// Writes one line of JSON per row of prefs.h5 (its chosen and rejected answers) or of a ranked iter.h5 (best and
/// worst, and the generated answer):
/// {"row", "chosen": {"ids", "label_start", "pieces"}, "rejected": {...}, "generated": {...}}.
/// Token ids as options.encoding makes them of the tokenizer in options.encode; pieces are the tokens' texts in its
/// alphabet. @throws Error bad_data, configuration, usage.
void print_encoded_rows(const InspectOptions& options, std::ostream& out);

} // namespace selm
