#include "selm/base/hash.hpp"

#include <string>

#include <gtest/gtest.h>

#include "selm/base/error.hpp"
#include "temporary_directory.hpp"

namespace selm {
namespace {

// `xxhsum -H2` of the empty input and of "abc" (xxHash 0.8.1).
TEST(Hash, EqualsXxhsum)
{
    EXPECT_EQ(hash_hex(""), "99aa06d3014798d86001c324468d497f");
    EXPECT_EQ(hash_hex("abc"), "06b05ab6733a618578af5f94892f3950");
    EXPECT_EQ(hash64("abc", 3), 0x78af5f94892f3950U);
}

TEST(Hash, StreamingEqualsOneCall)
{
    std::string bytes;
    for (int i = 0; i < 5000; ++i)
        bytes += static_cast<char>(i * 31 + i / 256);
    Hasher hasher;
    for (std::size_t at = 0, step = 1; at < bytes.size(); at += step, step = step * 3 % 997 + 1)
        hasher.update(std::string_view(bytes).substr(at, step));
    EXPECT_EQ(hasher.hex(), hash_hex(bytes));
    EXPECT_EQ(hasher.low64(), hash64(bytes.data(), bytes.size()));
    bytes[4321] = static_cast<char>(bytes[4321] ^ 1);
    EXPECT_NE(hasher.hex(), hash_hex(bytes));
}

TEST(Hash, FileEqualsItsBytes)
{
    const test::TemporaryDirectory directory;
    std::string bytes(3 << 20, 'x'); // more than one read buffer
    bytes[2 << 20] = 'y';
    directory.write("big.bin", bytes);
    EXPECT_EQ(hash_file(directory.path("big.bin")), hash_hex(bytes));
}

TEST(Hash, UnreadableFileIsBadData)
{
    const test::TemporaryDirectory directory;
    for (const std::string& path : {directory.path("absent"), directory.path("")}) {
        try {
            hash_file(path);
            FAIL() << path;
        } catch (const Error& error) {
            EXPECT_EQ(error.code(), ExitCode::bad_data);
            EXPECT_NE(std::string(error.what()).find(path), std::string::npos) << error.what();
        }
    }
}

} // namespace
} // namespace selm
