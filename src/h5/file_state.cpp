#include "file_state.hpp"

#include <cerrno>
#include <cstring>

#include <sys/stat.h>
#include <unistd.h>

#include "disk_space.hpp"
#include "selm/base/error.hpp"
#include "selm/comm/agree.hpp"

namespace selm::h5 {

namespace {

constexpr std::int64_t object_bytes = std::int64_t{4} << 10;    // more than the metadata of one object or attribute
constexpr std::int64_t large_block_bytes = std::int64_t{4} << 20; // mean of a dataset's blocks: as large as file systems' stripes
constexpr std::int64_t metadata_bytes = std::int64_t{32} << 10; // what HDF5 has at any time beyond what is counted

} // namespace

File::State::~State()
{
    // HDF5 writes its metadata when it closes; on a full disk that fails and leaves HDF5 unable to shut down. What was
    // written so far is useless: its space will do.
    if (file.valid() && failed && comm->is_root())
        [[maybe_unused]] const int status = ::truncate(path.c_str(), 0);
    open_datasets.clear();
}

void File::State::fail(const std::string& what) const
{
    const std::string reason = hdf5_reason();
    if (comm != nullptr)
        throw Error(ExitCode::io, cat(path, ": ", what, " failed (", reason,
                                      "). Check the free space and the quota of its file system"));
    throw Error(ExitCode::bad_data, cat(path, ": ", what, " failed (", reason, "). The file is damaged; make it anew"));
}

void File::State::together(const char* label, const std::function<void()>& body)
{
    try {
        if (parallel())
            agree(*comm, label, body);
        else
            body();
    } catch (...) {
        failed = true;
        throw;
    }
}

void File::State::reserve(std::int64_t more)
{
    largest_size += more + object_bytes;
    if (largest_size + metadata_bytes <= reserved)
        return;
    reserved = largest_size + 2 * metadata_bytes;
    together("space for an HDF5 file", [&] {
        check_size_limit(path, reserved);
        if (comm->is_root())
            reserve_space(path, reserved);
    });
}

void File::State::trim(std::int64_t size) const
{
    struct stat there {};
    if (::stat(path.c_str(), &there) == 0 && there.st_size > size && ::truncate(path.c_str(), size) != 0)
        throw io_error(cat(path, " cannot be cut to its length (", std::strerror(errno), "). Check its file system"));
}

File::State::OpenDataset& File::State::dataset(const std::string& name)
{
    if (const auto found = open_datasets.find(name); found != open_datasets.end())
        return found->second;
    OpenDataset opened = open_dataset(name);
    return open_datasets.emplace(name, std::move(opened)).first->second;
}

File::State::OpenDataset File::State::open_dataset(const std::string& name) const
{
    if (!link_exists(name))
        throw Error(error_code(), cat(path, " has no dataset ", name, " (it is needed here). Is it a complete file of the right kind?"));
    OpenDataset opened;
    opened.id = Id(H5Dopen2(file.get(), name.c_str(), H5P_DEFAULT), H5Dclose);
    if (!opened.id.valid())
        fail("opening dataset " + name);
    const Id type(H5Dget_type(opened.id.get()), H5Tclose);
    const auto known = known_type(type.get());
    if (!known)
        throw Error(error_code(), cat(path, ": dataset ", name, " has a type that SELM's files do not use (uint8, int32, int64, "
                                      "float32, float64). Was it changed by another program?"));
    opened.info.type = *known;
    const Id space(H5Dget_space(opened.id.get()), H5Sclose);
    const int rank = H5Sget_simple_extent_ndims(space.get());
    if (rank < 1)
        throw Error(error_code(), cat(path, ": dataset ", name, " has no dimension (a list was expected)"));
    std::vector<hsize_t> extent(static_cast<std::size_t>(rank));
    H5Sget_simple_extent_dims(space.get(), extent.data(), nullptr);
    opened.info.shape.assign(extent.begin(), extent.end());
    return opened;
}

bool File::State::link_exists(const std::string& name) const
{
    if (name == "/")
        return true;
    for (std::size_t end = name.find('/', 1);; end = name.find('/', end + 1)) {
        const std::string prefix = name.substr(0, end);
        if (H5Lexists(file.get(), prefix.c_str(), H5P_DEFAULT) <= 0) {
            H5Eclear2(H5E_DEFAULT);
            return false;
        }
        if (end == std::string::npos)
            return true;
    }
}

Id File::State::open_object(const std::string& name) const
{
    if (!link_exists(name))
        throw Error(error_code(), cat(path, " has no object ", name));
    Id object(H5Oopen(file.get(), name.c_str(), H5P_DEFAULT), H5Oclose);
    if (!object.valid())
        fail("opening " + name);
    return object;
}

void File::State::count_transfer(hid_t transfer)
{
    if (!parallel())
        return;
    H5D_mpio_actual_io_mode_t mode = H5D_MPIO_NO_COLLECTIVE;
    H5Pget_mpio_actual_io_mode(transfer, &mode);
    if (mode == H5D_MPIO_CONTIGUOUS_COLLECTIVE || mode == H5D_MPIO_CHUNK_COLLECTIVE) {
        ++transfers.collective;
        return;
    }
    std::uint32_t local = 0;
    std::uint32_t global = 0;
    H5Pget_mpio_no_collective_cause(transfer, &local, &global);
    if (transfers.fallbacks++ == 0)
        transfers.cause = words_of_cause(global);
}

void File::State::write_round(const std::string& name, OpenDataset& target, std::int64_t first, std::int64_t count, const void* values)
{
    const Id transfer(H5Pcreate(H5P_DATASET_XFER), H5Pclose);
    if (parallel()) {
        H5Pset_dxpl_mpio(transfer.get(), H5FD_MPIO_COLLECTIVE);
        if (target.info.elements() * static_cast<std::int64_t>(bytes_of(target.info.type)) >= comm->size() * large_block_bytes)
            H5Pset_dxpl_mpio_collective_opt(transfer.get(), H5FD_MPIO_INDIVIDUAL_IO);
    }
    const Id in_memory = memory_space(count * target.info.row_elements());
    const Id in_file = row_selection(target.id.get(), target.info, first, count);
    const char nothing = 0;
    const herr_t status = H5Dwrite(target.id.get(), memory_type(target.info.type), in_memory.get(), in_file.get(),
                                   transfer.get(), values != nullptr ? values : &nothing);
    together("HDF5 write", [&] {
        if (status < 0)
            fail("writing dataset " + name);
    });
    count_transfer(transfer.get());
}

} // namespace selm::h5
