#pragma once

#include <cstdint>
#include <string>

#include "selm/h5/file.hpp"

namespace selm {

inline constexpr const char* preferences_format = "selm-prefs";
inline constexpr const char* iteration_format = "selm-iteration";
inline constexpr std::int64_t file_format_version = 1;

/// Root attributes of both kinds of file (besides format, format_version, created and software, which the writers add).
struct FileAttributes {
    std::string config;        ///< the effective configuration as INI text
    std::string config_hash;   ///< hash of its recipe keys
    std::string source_digest; ///< digest of the input the file was made from
    h5::Attributes extra;      ///< anything else to be stored at the root
};

/**
 * @brief Checks that @p file is of @p format and of a version this program reads.
 * @throws Error bad_data naming the path, what was found and what was expected.
 */
void check_format(const h5::File& file, const std::string& format);

/// format attribute of a file, or empty when it has none. @throws Error bad_data when it is no HDF5 file.
std::string format_of(const std::string& path);

/// Writes format, format_version, created, software and @p attributes to "/". Collective.
void write_root_attributes(h5::File& file, const std::string& format, const FileAttributes& attributes);

/**
 * @brief Digest of the data of a file: every dataset but those under /timing and /provenance, no attributes; in the order
 * of their paths: path, type, shape, bytes. Independent of how many ranks wrote the file and of its storage layout. Not
 * collective; streams, so memory stays small.
 */
std::string data_digest(const std::string& path);
std::string data_digest(const h5::File& file);

} // namespace selm
