#pragma once

#include <cstdint>
#include <string>

namespace selm::h5 {

/// This process may not write files of any size (ulimit -f).
/// @throws Error io.
void check_size_limit(const std::string& path, std::int64_t bytes);

/// Takes the blocks of the first @p bytes of the file; where the file system cannot, looks for enough free space.
/// @throws Error io: it does not fit.
void reserve_space(const std::string& path, std::int64_t bytes);

/// Asks the system to begin to write a file's pages to disk, without waiting, so that syncing it later takes less long. Where
/// the system cannot, nothing happens.
void start_writing_back(const std::string& path);

} // namespace selm::h5
