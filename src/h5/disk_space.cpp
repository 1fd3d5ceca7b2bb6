#include "disk_space.hpp"

#include <cerrno>
#include <cstring>

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "selm/base/error.hpp"

namespace selm::h5 {

namespace {

/// Error of a file that cannot grow to @p bytes.
Error no_space(const std::string& path, std::int64_t bytes, const std::string& reason)
{
    return io_error(cat(path, " cannot grow to ", bytes, " bytes (", reason, "). Free space, raise the limit, or write elsewhere"));
}

} // namespace

void check_size_limit(const std::string& path, std::int64_t bytes)
{
    struct rlimit limit {};
    if (::getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY
        && limit.rlim_cur < static_cast<rlim_t>(bytes))
        throw no_space(path, bytes, cat("the limit on the size of files is ", limit.rlim_cur));
}

void reserve_space(const std::string& path, std::int64_t bytes)
{
    const int descriptor = ::open(path.c_str(), O_WRONLY | O_CLOEXEC);
    if (descriptor < 0)
        throw no_space(path, bytes, std::strerror(errno));
    int status = 0;
    do
        status = ::fallocate(descriptor, 0, 0, bytes);
    while (status != 0 && errno == EINTR);
    const int reason = errno;
    struct stat there {};
    struct statvfs store {};
    const bool known = ::fstat(descriptor, &there) == 0 && ::fstatvfs(descriptor, &store) == 0;
    ::close(descriptor);
    if (status == 0)
        return;
    if (reason != EOPNOTSUPP && reason != ENOSYS)
        throw no_space(path, bytes, std::strerror(reason));
    const std::uint64_t free_bytes = std::uint64_t{store.f_bavail} * store.f_frsize + static_cast<std::uint64_t>(there.st_blocks) * 512;
    if (known && free_bytes < static_cast<std::uint64_t>(bytes))
        throw no_space(path, bytes, std::strerror(ENOSPC));
}

void start_writing_back([[maybe_unused]] const std::string& path)
{
#ifdef SYNC_FILE_RANGE_WRITE
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0)
        return;
    [[maybe_unused]] const int status = ::sync_file_range(descriptor, 0, 0, SYNC_FILE_RANGE_WRITE);
    ::close(descriptor);
#endif
}

} // namespace selm::h5
