#include "selm/base/error.hpp"

namespace selm {

void contract_failed(const char* kind, const char* condition, const char* file, int line)
{
    throw internal_error(cat("internal error: the ", kind, " ", condition, " does not hold at ", file, ":", line,
                             ". Please report it with the command line"));
}

} // namespace selm
