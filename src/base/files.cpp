#include "selm/base/files.hpp"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <vector>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "selm/base/attempt.hpp"
#include "selm/base/error.hpp"

namespace selm {

namespace {

/// A file descriptor that closes itself.
class Descriptor {
  public:
    explicit Descriptor(int descriptor) : descriptor_(descriptor) {}
    ~Descriptor()
    {
        if (descriptor_ >= 0)
            ::close(descriptor_);
    }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    int get() const { return descriptor_; }
    /// Network file systems report a full disk as late as in close().
    bool close()
    {
        const int descriptor = descriptor_;
        descriptor_ = -1;
        return ::close(descriptor) == 0;
    }

  private:
    int descriptor_;
};

std::string parent_directory(const std::string& path)
{
    const std::string parent = std::filesystem::path(path).parent_path().string();
    return parent.empty() ? "." : parent;
}

Error write_failed(const std::string& path, int error)
{
    return io_error(cat("writing '", path, "' failed (", std::strerror(error), "). Free some space or check the permissions ",
                        "of the directory, then run again"));
}

void write_all(int descriptor, std::string_view content, const std::string& path)
{
    while (!content.empty()) {
        const ssize_t written = ::write(descriptor, content.data(), content.size());
        if (written < 0 && errno == EINTR)
            continue;
        if (written < 0)
            throw write_failed(path, errno);
        content.remove_prefix(static_cast<std::size_t>(written));
    }
}

void write_new_file(const std::string& path, std::string_view content)
{
    Descriptor file(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
    if (file.get() < 0)
        throw write_failed(path, errno);
    write_all(file.get(), content, path);
    if (::fsync(file.get()) != 0 || !file.close())
        throw write_failed(path, errno);
}

} // namespace

std::string read_file(const std::string& path)
{
    const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    SELM_VALIDATE(file.get() >= 0, ExitCode::bad_data,
                  "cannot read '" << path << "' (" << std::strerror(errno) << "). Check the path and its permissions");
    struct stat status {};
    SELM_VALIDATE(::fstat(file.get(), &status) == 0 && !S_ISDIR(status.st_mode), ExitCode::bad_data,
                  "cannot read '" << path << "' (it is a directory, not a file). Check the path");
    std::string content;
    content.reserve(status.st_size > 0 ? static_cast<std::size_t>(status.st_size) : 0);
    std::vector<char> buffer(std::size_t{1} << 18);
    while (true) {
        const ssize_t got = ::read(file.get(), buffer.data(), buffer.size());
        if (got < 0 && errno == EINTR)
            continue;
        SELM_VALIDATE(got >= 0, ExitCode::io, "reading '" << path << "' failed (" << std::strerror(errno) << ")");
        if (got == 0)
            return content;
        content.append(buffer.data(), static_cast<std::size_t>(got));
    }
}

void write_file_atomically(const std::string& path, std::string_view content)
{
    const std::string partial = path + ".partial-" + process_tag();
    try {
        write_new_file(partial, content);
        publish_file(partial, path);
    } catch (...) {
        ::unlink(partial.c_str());
        throw;
    }
}

void sync_path(const std::string& path)
{
    Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (file.get() < 0)
        throw write_failed(path, errno);
    struct stat status {};
    // Some file systems cannot sync a directory and say EINVAL: there is nothing more to do there.
    if (::fsync(file.get()) != 0 && !(errno == EINVAL && ::fstat(file.get(), &status) == 0 && S_ISDIR(status.st_mode)))
        throw write_failed(path, errno);
}

void publish_file(const std::string& partial, const std::string& final_path)
{
    sync_path(partial);
    check_newest_attempt(final_path);
    if (::rename(partial.c_str(), final_path.c_str()) != 0)
        throw io_error(cat("renaming '", partial, "' to '", final_path, "' failed (", std::strerror(errno), ")"));
    sync_path(parent_directory(final_path));
}

} // namespace selm
