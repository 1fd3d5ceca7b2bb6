#include "selm/base/hash.hpp"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

#include <xxhash.h>

#include "selm/base/error.hpp"

namespace selm {

namespace {

std::string to_hex(XXH128_hash_t hash)
{
    char text[33];
    std::snprintf(text, sizeof text, "%016llx%016llx", static_cast<unsigned long long>(hash.high64),
                  static_cast<unsigned long long>(hash.low64));
    return text;
}

} // namespace

struct Hasher::State {
    XXH3_state_t* xxh = XXH3_createState();
    State()
    {
        if (xxh == nullptr)
            throw std::bad_alloc();
        XXH3_128bits_reset(xxh);
    }
    ~State() { XXH3_freeState(xxh); }
    State(const State&) = delete;
    State& operator=(const State&) = delete;
};

Hasher::Hasher() : state_(std::make_unique<State>()) {}
Hasher::~Hasher() = default;

void Hasher::update(const void* data, std::size_t bytes)
{
    if (bytes > 0)
        XXH3_128bits_update(state_->xxh, data, bytes);
}

std::string Hasher::hex() const
{
    return to_hex(XXH3_128bits_digest(state_->xxh));
}

std::uint64_t Hasher::low64() const
{
    return XXH3_128bits_digest(state_->xxh).low64;
}

std::string hash_hex(std::string_view bytes)
{
    return to_hex(XXH3_128bits(bytes.data(), bytes.size()));
}

std::uint64_t hash64(const void* data, std::size_t bytes)
{
    return XXH3_128bits(data, bytes).low64;
}

std::string hash_file(const std::string& path)
{
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), &std::fclose);
    SELM_VALIDATE(file != nullptr, ExitCode::bad_data,
                  "cannot read '" << path << "' (" << std::strerror(errno) << "). Check the path and its permissions");
    Hasher hasher;
    std::vector<char> buffer(std::size_t{1} << 20);
    while (true) {
        const std::size_t got = std::fread(buffer.data(), 1, buffer.size(), file.get());
        hasher.update(buffer.data(), got);
        if (got < buffer.size())
            break;
    }
    SELM_VALIDATE(std::ferror(file.get()) == 0, errno == EISDIR ? ExitCode::bad_data : ExitCode::io,
                  "reading '" << path << "' failed (" << std::strerror(errno) << ")");
    return hasher.hex();
}

} // namespace selm
