#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace selm {

/// Streaming XXH3 128-bit hash (libxxhash): digests of files, recipes and data sets. Not cryptographic.
class Hasher {
  public:
    Hasher();
    ~Hasher();
    Hasher(const Hasher&) = delete;
    Hasher& operator=(const Hasher&) = delete;
    void update(const void* data, std::size_t bytes);
    void update(std::string_view text) { update(text.data(), text.size()); }
    std::string hex() const; ///< 32 lower-case hexadecimal digits
    std::uint64_t low64() const; ///< the low half of the 128 bits

  private:
    struct State;
    std::unique_ptr<State> state_;
};

std::string hash_hex(std::string_view bytes);
/// The low half of the 128-bit hash, as Hasher::low64.
std::uint64_t hash64(const void* data, std::size_t bytes);
/// Digest of a file's bytes. @throws Error bad_data when it cannot be read.
std::string hash_file(const std::string& path);

} // namespace selm
