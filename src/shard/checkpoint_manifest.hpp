#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "selm/shard/checkpoint.hpp"

namespace selm {

/// First byte and number of bytes.
using ByteRange = std::pair<std::int64_t, std::int64_t>;

/**
 * @brief The manifest of a checkpoint: what training needs besides the state, and checksums of every byte: of the tensors by
 * kind, of everything else in the state file (HDF5's own structures, which are not read before they are checked), and of
 * the manifest itself.
 */
struct CheckpointManifest {
    CheckpointState state;
    std::int64_t optimizer_steps = 0;
    std::string file;                             ///< name of the state file, beside the manifest
    std::int64_t bytes = 0;                       ///< of the state file
    std::int64_t elements = 0;                    ///< of all parameters
    std::map<std::string, std::string> checksums; ///< fp32, exp_avg, exp_avg_sq
    std::vector<ByteRange> tensors;               ///< where elements lie in the state file, ascending, neighbours joined
    std::string structure_checksum;               ///< of the bytes elsewhere
    std::map<std::string, std::string> binding;

    std::string text() const; ///< JSON
    /// @throws Error bad_data naming @p path: not whole, changed, or of another version.
    static CheckpointManifest parse(const std::string& text, const std::string& path);
};

/// Places of all datasets' elements in an HDF5 file, as CheckpointManifest::tensors.
std::vector<ByteRange> tensor_ranges(const std::string& h5_path);

/// Checksum of a file's bytes outside @p ranges, by plain reads. @throws Error bad_data when it cannot be read.
std::string checksum_outside(const std::string& path, std::int64_t bytes, const std::vector<ByteRange>& ranges);

/// Checksum of elements of a tensor, such that sums over any cut into pieces are equal: a tensor is named by its hash, an
/// element by its place. One changed element always changes the sum.
std::uint64_t element_checksum(std::uint64_t tensor, std::size_t first_element, std::span<const float> values);

} // namespace selm
