#include "selm/comm/claim.hpp"

#include "selm/base/attempt.hpp"
#include "selm/comm/agree.hpp"

namespace selm {

void claim_phase_output(const std::string& path, Communicator& comm)
{
    agree(comm, "attempt", [&] {
        if (comm.is_root())
            claim_output(path);
    });
}

} // namespace selm
