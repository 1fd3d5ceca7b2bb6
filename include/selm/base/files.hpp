#pragma once

#include <string>
#include <string_view>

namespace selm {

/// Whole content of a file. @throws Error bad_data naming the path and errno text.
std::string read_file(const std::string& path);

/// Writes @p content to "<path>.partial-<process tag>", then publish_file(). @throws Error as that.
void write_file_atomically(const std::string& path, std::string_view content);

/// fsync of a finished file (or directory). @throws Error io.
void sync_path(const std::string& path);

/// fsync + rename + fsync of the directory: the file is whole once it has its final name.
/// @throws Error io; stopped when a newer attempt has claimed it (attempt.hpp).
void publish_file(const std::string& partial, const std::string& final_path);

} // namespace selm
