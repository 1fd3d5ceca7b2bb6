#pragma once

#include <cstddef>

namespace selm::comm {

/// Free bytes of /dev/shm that a window must leave untouched; tests set it to force the mapped file.
void set_shared_memory_reserve(std::size_t bytes);

} // namespace selm::comm
