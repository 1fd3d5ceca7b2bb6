#pragma once

#include <string>
#include <vector>

#include "selm/h5/file.hpp"

namespace selm {

/// Digest of the named datasets in the given order: path, type, shape, bytes of each.
std::string digest_of_datasets(const h5::File& file, const std::vector<std::string>& paths);

} // namespace selm
