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

} // namespace selm::h5
