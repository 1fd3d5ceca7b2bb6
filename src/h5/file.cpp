#include "selm/h5/file.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "file_state.hpp"

namespace selm::h5 {

namespace {

/// Bytes that an empty file takes at most.
constexpr off_t first_blocks = 8192;

std::string cut_off_path(const std::string& path, std::int64_t bytes)
{
    return cat(path, " is truncated (", bytes, " bytes are there, more were written: a copy or download was cut off). "
               "Copy or make it again");
}

/// Says what keeps @p path from being read, before HDF5 does so in its own words. @returns the file's size.
std::int64_t check_readable(const std::string& path)
{
    struct stat status {};
    if (::stat(path.c_str(), &status) != 0)
        throw data_error(cat(path, errno == ENOENT ? " does not exist (an HDF5 file was expected there). Check the path"
                                                   : cat(" cannot be read (", std::strerror(errno), "). Check the path")));
    if (S_ISDIR(status.st_mode))
        throw data_error(cat(path, " is a directory (an HDF5 file was expected). Give the file's path"));
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0)
        throw data_error(cat(path, " cannot be read (", std::strerror(errno), "). Check its permissions"));
    ::close(descriptor);
    if (status.st_size == 0)
        throw data_error(cat(path, " is empty (an HDF5 file was expected). Make it again"));
    return status.st_size;
}

} // namespace

const char* name_of(ElementType type) noexcept
{
    switch (type) {
    case ElementType::uint8: return "uint8";
    case ElementType::int32: return "int32";
    case ElementType::int64: return "int64";
    case ElementType::float32: return "float32";
    case ElementType::float64: return "float64";
    }
    return "?";
}

std::size_t bytes_of(ElementType type) noexcept
{
    switch (type) {
    case ElementType::uint8: return 1;
    case ElementType::int32:
    case ElementType::float32: return 4;
    case ElementType::int64:
    case ElementType::float64: return 8;
    }
    return 0;
}

std::int64_t DatasetInfo::row_elements() const
{
    std::int64_t product = 1;
    for (std::size_t i = 1; i < shape.size(); ++i)
        product *= shape[i];
    return product;
}

File::File(std::unique_ptr<State> state) : state_(std::move(state)) {}
File::File(File&& other) noexcept = default;
File& File::operator=(File&& other) noexcept
{
    std::swap(state_, other.state_);
    return *this;
}
File::~File() = default;

File File::open(const std::string& path)
{
    silence_error_stack();
    const std::int64_t bytes = check_readable(path);
    const htri_t is_hdf5 = H5Fis_hdf5(path.c_str());
    H5Eclear2(H5E_DEFAULT);
    if (is_hdf5 <= 0)
        throw data_error(cat(path, " is not an HDF5 file (its signature is missing). Give a file that selm_import or selm_gen wrote"));
    const Id access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
    H5Pset_fclose_degree(access.get(), H5F_CLOSE_STRONG);
    // Files are complete once they have their name: nothing to lock, and many shared file systems cannot.
    H5Pset_file_locking(access.get(), false, true);
    auto state = std::make_unique<State>();
    state->path = path;
    state->file = Id(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access.get()), H5Fclose);
    if (!state->file.valid()) {
        const std::string reason = hdf5_reason();
        throw data_error(reason.find("truncated") != std::string::npos
                             ? cut_off_path(path, bytes)
                             : cat(path, " cannot be opened (", reason, "). The file is damaged; make it anew"));
    }
    return File(std::move(state));
}

File File::create(const std::string& path, Communicator& comm)
{
    silence_error_stack();
    auto state = std::make_unique<State>();
    state->path = path;
    state->comm = &comm;
    const Id access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
    H5Pset_fclose_degree(access.get(), H5F_CLOSE_STRONG);
    H5Pset_file_locking(access.get(), false, true);
    H5Pset_libver_bounds(access.get(), H5F_LIBVER_V18, H5F_LIBVER_V18);
    if (comm.size() > 1) {
        if (comm.native_handle() == nullptr)
            throw internal_error("a file was to be created on a communicator without MPI");
        H5Pset_fapl_mpio(access.get(), *static_cast<const MPI_Comm*>(comm.native_handle()), MPI_INFO_NULL);
        H5Pset_all_coll_metadata_ops(access.get(), true);
        H5Pset_coll_metadata_write(access.get(), true);
    }
    state->together("directory of an HDF5 file", [&] {
        if (!comm.is_root())
            return;
        // MPI-IO says only "cannot create file": find the reason first.
        const int descriptor = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
        if (descriptor < 0)
            throw io_error(cat(path, " cannot be created (", std::strerror(errno), "). Check the directory and its permissions"));
        // HDF5's own first blocks: where they do not fit, ranks would wait for each other in its library.
        const int full = ::posix_fallocate(descriptor, 0, first_blocks);
        ::close(descriptor);
        if (full == ENOSPC || full == EFBIG || full == EDQUOT) {
            ::unlink(path.c_str());
            throw io_error(cat(path, " cannot be created (", std::strerror(full), "). Free space, raise the limit, or write elsewhere"));
        }
    });
    state->file = Id(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access.get()), H5Fclose);
    state->together("creating an HDF5 file", [&] {
        if (!state->file.valid())
            state->fail("creating it");
    });
    state->reserve(0);
    return File(std::move(state));
}

void File::close()
{
    if (!state_ || !state_->file.valid())
        return;
    State& state = *state_;
    const bool writable = state.comm != nullptr;
    state.open_datasets.clear();
    // Flush first: a full disk is heard of while the file can still be closed in order.
    const herr_t flushed = writable ? H5Fflush(state.file.get(), H5F_SCOPE_LOCAL) : 0;
    const std::string flush_reason = flushed < 0 ? hdf5_reason() : "";
    hsize_t size = 0;
    // Parallel HDF5 cuts the file itself.
    const bool sized = writable && !state.parallel() && H5Fget_filesize(state.file.get(), &size) >= 0;
    const herr_t closed = H5Fclose(state.file.release());
    const std::string close_reason = closed < 0 ? hdf5_reason() : "";
    state.together("closing an HDF5 file", [&] {
        if (flushed < 0 || closed < 0)
            throw Error(state.error_code(), cat(state.path, ": closing it failed (", flushed < 0 ? flush_reason : close_reason,
                                                "). Check the free space and the quota of its file system"));
        if (sized)
            state.trim(static_cast<std::int64_t>(size));
    });
}

const std::string& File::path() const noexcept
{
    return state_->path;
}

const TransferCount& File::transfers() const noexcept
{
    return state_->transfers;
}

// ---------------------------------------------------------------------------------------------------- what is there

bool File::exists(const std::string& path) const
{
    return state_->link_exists(path);
}

bool File::is_group(const std::string& path) const
{
    if (!state_->link_exists(path))
        return false;
    const Id object = state_->open_object(path);
    return H5Iget_type(object.get()) == H5I_GROUP;
}

std::vector<std::string> File::children(const std::string& group) const
{
    const Id id(state_->link_exists(group) ? H5Gopen2(state_->file.get(), group.c_str(), H5P_DEFAULT) : H5I_INVALID_HID, H5Gclose);
    if (!id.valid())
        throw Error(state_->error_code(), cat(path(), " has no group ", group));
    std::vector<std::string> names;
    const auto collect = [](hid_t, const char* name, const H5L_info_t*, void* data) -> herr_t {
        static_cast<std::vector<std::string>*>(data)->emplace_back(name);
        return 0;
    };
    if (H5Literate(id.get(), H5_INDEX_NAME, H5_ITER_INC, nullptr, collect, &names) < 0)
        state_->fail("listing group " + group);
    std::sort(names.begin(), names.end());
    return names;
}

std::vector<std::string> File::datasets(const std::string& group) const
{
    std::vector<std::string> found;
    for (const std::string& name : children(group)) {
        const std::string path = join(group, name);
        if (is_group(path)) {
            for (std::string& below : datasets(path))
                found.push_back(std::move(below));
        } else {
            found.push_back(path);
        }
    }
    std::sort(found.begin(), found.end());
    return found;
}

DatasetInfo File::info(const std::string& dataset) const
{
    return state_->dataset(dataset).info;
}

std::pair<std::int64_t, std::int64_t> File::extent(const std::string& dataset) const
{
    const hid_t id = state_->dataset(dataset).id.get();
    const haddr_t offset = H5Dget_offset(id);
    H5Eclear2(H5E_DEFAULT);
    if (offset == HADDR_UNDEF)
        return {0, 0};
    return {static_cast<std::int64_t>(offset), static_cast<std::int64_t>(H5Dget_storage_size(id))};
}

// ---------------------------------------------------------------------------------------------------- reading

void File::read_into(const std::string& dataset, ElementType type, std::int64_t first, std::int64_t count, void* values) const
{
    State::OpenDataset& source = state_->dataset(dataset);
    if (source.info.type != type)
        throw Error(state_->error_code(), cat(path(), ": dataset ", dataset, " holds ", name_of(source.info.type), ", not ",
                                              name_of(type), " (the file was changed or is of another version). Make it anew"));
    SELM_EXPECT(first >= 0 && count >= 0 && first + count <= source.info.rows());
    if (count * source.info.row_elements() == 0)
        return;
    const Id in_memory = memory_space(count * source.info.row_elements());
    const Id in_file = row_selection(source.id.get(), source.info, first, count);
    if (H5Dread(source.id.get(), memory_type(type), in_memory.get(), in_file.get(), H5P_DEFAULT, values) < 0)
        state_->fail("reading dataset " + dataset);
}

std::string File::read_text(const std::string& dataset, std::int64_t first, std::int64_t count) const
{
    const DatasetInfo found = info(dataset);
    SELM_VALIDATE(found.shape.size() == 1 && first >= 0 && count >= 0 && first <= found.rows() && count <= found.rows() - first,
                  state_->error_code(), path() << ": bytes " << first << " to " << first + count << " of " << dataset
                  << " do not exist (it has " << found.rows() << "). The file is damaged; make it anew");
    std::string text(static_cast<std::size_t>(count), '\0');
    read_into(dataset, ElementType::uint8, first, count, text.data());
    return text;
}

} // namespace selm::h5
