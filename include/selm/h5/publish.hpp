#pragma once

#include <functional>
#include <string>

#include "selm/comm/communicator.hpp"
#include "selm/h5/file.hpp"

namespace selm::h5 {

/**
 * @brief Makes @p path as a whole or not at all: creates "<path>.partial-<tag>" on all ranks, runs @p write, closes,
 * opens it again to check that it is whole, syncs and renames. Collective.
 *
 * Nothing with the final name changes before the rename; on an error the partial file is removed and every rank throws.
 * Local work of @p write that may fail on one rank alone must go through agree() (the other ranks would wait in the next
 * collective write); throwing on any rank after the last collective call is fine.
 * The partial file is this process's own (process_tag() of rank 0); partial files that killed attempts left are removed once
 * the new one is in place. @throws Error stopped when a newer attempt has claimed @p path (base/attempt.hpp).
 * @param inspect run on rank 0 with the closed file, opened for reading, while the disk already takes what was written.
 */
void write_and_publish(const std::string& path, Communicator& comm, const std::function<void(File&)>& write,
                       const std::function<void(const File&)>& inspect = {});

} // namespace selm::h5
