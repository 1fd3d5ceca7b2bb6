#pragma once

#include <functional>

#include "selm/comm/communicator.hpp"
#include "selm/model/safetensors_writer.hpp"

namespace selm {

/**
 * @brief Writes a model's weights from all ranks, none of which holds more than its own: rank 0 makes the files, every rank
 * writes its elements, and when all is on the disk rank 0 gives the files their names.
 *
 * Collective over comm. @p writer is made with the same arguments on every rank, for a directory that all of them see.
 * @param write_own writes this rank's elements; every element belongs to exactly one rank. It must not communicate.
 * @throws Error on every rank (io, naming the file: disk full), with no file left behind.
 */
void write_model_collectively(SafetensorsWriter& writer, Communicator& comm, const std::function<void()>& write_own);

} // namespace selm
