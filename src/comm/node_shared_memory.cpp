#include "node_shared_memory.hpp"

#include <atomic>
#include <cerrno>
#include <cstring>
#include <exception>
#include <filesystem>
#include <string>

#include <fcntl.h>
#include <mpi.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "mpi_call.hpp"
#include "selm/base/error.hpp"
#include "selm/base/log.hpp"
#include "selm/comm/agree.hpp"
#include "selm/comm/communicator.hpp"

namespace selm {

namespace {

std::size_t& shared_memory_reserve()
{
    static std::size_t bytes = std::size_t{16} << 20; // for MPI's own segments
    return bytes;
}

/// MPI puts windows into /dev/shm and, where that is full, the first write past the room ends in SIGBUS: look before.
bool dev_shm_has_room(std::size_t bytes)
{
    struct statvfs status {};
    if (::statvfs("/dev/shm", &status) != 0)
        return false;
    const std::size_t room = static_cast<std::size_t>(status.f_bavail) * status.f_frsize;
    return room >= bytes && room - bytes >= shared_memory_reserve();
}

void* map_memory(std::size_t bytes, int flags, int descriptor, std::string_view label)
{
    void* const address = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, descriptor, 0);
    if (address == MAP_FAILED)
        throw io_error(cat(label, ": cannot map ", bytes, " bytes (", std::strerror(errno), "). Use fewer ranks on a node"));
    return address;
}

/// A file of `bytes` zeros in TMPDIR with its blocks reserved, so that writing to the mapping cannot run out of space.
int create_backing_file(std::string& path, std::size_t bytes, std::string_view label)
{
    path = (std::filesystem::temp_directory_path() / "selm-shared-XXXXXX").string();
    const int descriptor = ::mkstemp(path.data());
    const int error = descriptor < 0 ? errno : ::posix_fallocate(descriptor, 0, static_cast<off_t>(bytes));
    if (error == 0)
        return descriptor;
    if (descriptor >= 0) {
        ::close(descriptor);
        ::unlink(path.c_str());
    }
    throw io_error(cat(label, ": neither /dev/shm nor '", std::filesystem::temp_directory_path().string(), "' has room for ",
                       bytes, " bytes that the ranks of this node share (", std::strerror(error),
                       "). Point TMPDIR at a file system with more room"));
}

std::byte* map_shared_file(Communicator& node, std::size_t bytes, std::string_view label)
{
    int descriptor = -1;
    std::string path;
    agree(node, label, [&] {
        if (node.is_root())
            descriptor = create_backing_file(path, bytes, label);
    });
    broadcast_string(node, path, 0, label);
    void* address = nullptr;
    const auto map = [&] {
        if (descriptor < 0)
            descriptor = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
        SELM_VALIDATE(descriptor >= 0, ExitCode::io,
                      label << ": cannot open '" << path << "' (" << std::strerror(errno)
                            << "). TMPDIR must be the same directory on all ranks of a node");
        address = map_memory(bytes, MAP_SHARED, descriptor, label);
    };
    const auto clean_up = [&] {
        if (descriptor >= 0)
            ::close(descriptor);
        if (node.is_root())
            ::unlink(path.c_str()); // the mapping keeps it alive, and nothing stays behind when a rank is killed
    };
    try {
        agree(node, label, map);
    } catch (...) {
        clean_up();
        if (address != nullptr)
            ::munmap(address, bytes);
        throw;
    }
    clean_up();
    return static_cast<std::byte*>(address);
}

} // namespace

void comm::set_shared_memory_reserve(std::size_t bytes)
{
    shared_memory_reserve() = bytes;
}

struct NodeSharedMemory::Impl {
    std::unique_ptr<Communicator> node; ///< own copy, for fence()
    MPI_Win window = MPI_WIN_NULL;
    void* mapping = nullptr;
    std::size_t mapped_bytes = 0;
    int exceptions_at_start = std::uncaught_exceptions();

    std::byte* open_window(std::size_t bytes, std::string_view label)
    {
        const MPI_Comm comm = *static_cast<const MPI_Comm*>(node->native_handle());
        void* address = nullptr;
        const auto own_bytes = static_cast<MPI_Aint>(node->is_root() ? bytes : 0);
        SELM_MPI(label, MPI_Win_allocate_shared(own_bytes, 1, MPI_INFO_NULL, comm, &address, &window));
        MPI_Aint size = 0;
        int unit = 0;
        SELM_MPI(label, MPI_Win_shared_query(window, 0, &size, &unit, &address));
        SELM_MPI(label, MPI_Win_lock_all(MPI_MODE_NOCHECK, window));
        // Memory is had when it is first touched: by all ranks together, each its part (on NUMA nodes it lies with all of them).
        const auto ranks = static_cast<std::size_t>(node->size()), rank = static_cast<std::size_t>(node->rank());
        const std::size_t begin = bytes / ranks * rank, end = rank + 1 == ranks ? bytes : bytes / ranks * (rank + 1);
        std::memset(static_cast<std::byte*>(address) + begin, 0, end - begin);
        return static_cast<std::byte*>(address);
    }

    ~Impl()
    {
        if (mapping != nullptr)
            ::munmap(mapping, mapped_bytes);
        int finalized = 0;
        MPI_Finalized(&finalized);
        // Freeing a window is collective: while an exception unwinds the peers may be elsewhere.
        if (window == MPI_WIN_NULL || finalized != 0 || std::uncaught_exceptions() > exceptions_at_start)
            return;
        MPI_Win_unlock_all(window);
        MPI_Win_free(&window);
    }
};

NodeSharedMemory::NodeSharedMemory(Communicator& node, std::size_t bytes, std::string_view label)
    : impl_(std::make_unique<Impl>()), bytes_(bytes)
{
    impl_->node = node.duplicate(label);
    if (bytes == 0)
        return;
    if (node.size() == 1 || node.native_handle() == nullptr) {
        impl_->mapping = map_memory(bytes, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, label);
        impl_->mapped_bytes = bytes;
        data_ = static_cast<std::byte*>(impl_->mapping);
        return;
    }
    bool window = node.is_root() && dev_shm_has_room(bytes);
    broadcast_value(node, window, 0, label);
    if (window) {
        data_ = impl_->open_window(bytes, label);
    } else {
        if (node.is_root())
            log_local(LogLevel::warning, cat(label, ": /dev/shm has no room for ", bytes, " bytes; the ranks of ",
                                             "this node share a mapped file in ",
                                             std::filesystem::temp_directory_path().string(), " instead"));
        data_ = map_shared_file(*impl_->node, bytes, label);
        impl_->mapping = data_;
        impl_->mapped_bytes = bytes;
    }
    fence();
}

NodeSharedMemory::~NodeSharedMemory() = default;

void NodeSharedMemory::fence()
{
    if (impl_->window != MPI_WIN_NULL)
        SELM_MPI("shared memory fence", MPI_Win_sync(impl_->window));
    std::atomic_thread_fence(std::memory_order_seq_cst);
    impl_->node->barrier("shared memory fence");
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (impl_->window != MPI_WIN_NULL)
        SELM_MPI("shared memory fence", MPI_Win_sync(impl_->window));
}

} // namespace selm
