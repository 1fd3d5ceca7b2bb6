#include "selm/h5/file.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include <fcntl.h>
#include <hdf5.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "selm/comm/agree.hpp"

namespace selm::h5 {

namespace {

constexpr std::int64_t transfer_bytes = std::int64_t{256} << 20; // MPI-IO counts are ints: stay far below 2 GiB
constexpr std::int64_t copy_bytes = std::int64_t{32} << 20;
constexpr std::int64_t object_bytes = std::int64_t{4} << 10;    // more than the metadata of one object or attribute
constexpr std::int64_t metadata_bytes = std::int64_t{32} << 10; // what HDF5 has at any time beyond what is counted

/// Owner of one HDF5 identifier.
class Id {
  public:
    using Closer = herr_t (*)(hid_t);
    Id() = default;
    Id(hid_t id, Closer closer) : id_(id), closer_(closer) {}
    Id(Id&& other) noexcept : id_(std::exchange(other.id_, H5I_INVALID_HID)), closer_(other.closer_) {}
    Id& operator=(Id&& other) noexcept
    {
        std::swap(id_, other.id_);
        std::swap(closer_, other.closer_);
        return *this;
    }
    ~Id()
    {
        if (id_ >= 0)
            closer_(id_);
    }
    hid_t get() const noexcept { return id_; }
    bool valid() const noexcept { return id_ >= 0; }
    hid_t release() noexcept { return std::exchange(id_, H5I_INVALID_HID); }

  private:
    hid_t id_ = H5I_INVALID_HID;
    Closer closer_ = nullptr;
};

void silence_error_stack()
{
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
}

herr_t take_innermost(unsigned depth, const H5E_error2_t* error, void* data)
{
    if (depth == 0 && error->desc != nullptr)
        *static_cast<std::string*>(data) = error->desc;
    return 0;
}

/// The innermost message of HDF5's error stack, which is cleared.
std::string hdf5_reason()
{
    std::string reason;
    H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, take_innermost, &reason);
    H5Eclear2(H5E_DEFAULT);
    return reason.empty() ? "no reason given" : reason;
}

hid_t memory_type(ElementType type)
{
    switch (type) {
    case ElementType::uint8: return H5T_NATIVE_UINT8;
    case ElementType::int32: return H5T_NATIVE_INT32;
    case ElementType::int64: return H5T_NATIVE_INT64;
    case ElementType::float32: return H5T_NATIVE_FLOAT;
    case ElementType::float64: return H5T_NATIVE_DOUBLE;
    }
    throw internal_error("unknown element type");
}

hid_t stored_type(ElementType type)
{
    switch (type) {
    case ElementType::uint8: return H5T_STD_U8LE;
    case ElementType::int32: return H5T_STD_I32LE;
    case ElementType::int64: return H5T_STD_I64LE;
    case ElementType::float32: return H5T_IEEE_F32LE;
    case ElementType::float64: return H5T_IEEE_F64LE;
    }
    throw internal_error("unknown element type");
}

std::optional<ElementType> known_type(hid_t type)
{
    const H5T_class_t kind = H5Tget_class(type);
    const std::size_t size = H5Tget_size(type);
    if (kind == H5T_FLOAT && size == 4)
        return ElementType::float32;
    if (kind == H5T_FLOAT && size == 8)
        return ElementType::float64;
    if (kind != H5T_INTEGER)
        return std::nullopt;
    const bool is_signed = H5Tget_sign(type) == H5T_SGN_2;
    if (size == 1 && !is_signed)
        return ElementType::uint8;
    if (size == 4 && is_signed)
        return ElementType::int32;
    if (size == 8 && is_signed)
        return ElementType::int64;
    return std::nullopt;
}

std::string parent_of(const std::string& path)
{
    const std::size_t slash = path.rfind('/');
    return slash == 0 || slash == std::string::npos ? "/" : path.substr(0, slash);
}

std::string join(const std::string& group, const std::string& name)
{
    return group == "/" ? "/" + name : group + "/" + name;
}

std::vector<hsize_t> dimensions(const std::vector<std::int64_t>& shape)
{
    return {shape.begin(), shape.end()};
}

/// A memory space of @p elements, of which all are selected; nothing is when there are none.
Id memory_space(std::int64_t elements)
{
    const hsize_t size = static_cast<hsize_t>(std::max<std::int64_t>(elements, 1));
    Id space(H5Screate_simple(1, &size, nullptr), H5Sclose);
    if (elements == 0)
        H5Sselect_none(space.get());
    return space;
}

/// Selects rows [first, first + count) of a dataset's space.
Id row_selection(hid_t dataset, const DatasetInfo& info, std::int64_t first, std::int64_t count)
{
    Id space(H5Dget_space(dataset), H5Sclose);
    if (count == 0) {
        H5Sselect_none(space.get());
        return space;
    }
    std::vector<hsize_t> start(info.shape.size(), 0);
    std::vector<hsize_t> extent = dimensions(info.shape);
    start[0] = static_cast<hsize_t>(first);
    extent[0] = static_cast<hsize_t>(count);
    if (H5Sselect_hyperslab(space.get(), H5S_SELECT_SET, start.data(), nullptr, extent.data(), nullptr) < 0)
        throw internal_error(cat("HDF5 cannot select rows: ", hdf5_reason()));
    return space;
}

std::string words_of_cause(std::uint32_t cause)
{
    std::string words;
    const auto add = [&](std::uint32_t bit, const char* text) {
        if ((cause & bit) != 0)
            words += (words.empty() ? "" : ", ") + std::string(text);
    };
    add(H5D_MPIO_SET_INDEPENDENT, "independent transfer was asked for");
    add(H5D_MPIO_DATATYPE_CONVERSION, "memory and file types differ");
    add(H5D_MPIO_DATA_TRANSFORMS, "a data transform is set");
    add(H5D_MPIO_MPI_OPT_TYPES_ENV_VAR_DISABLED, "HDF5_MPI_OPT_TYPES switches it off");
    add(H5D_MPIO_NOT_SIMPLE_OR_SCALAR_DATASPACES, "the dataspace is not simple");
    add(H5D_MPIO_NOT_CONTIGUOUS_OR_CHUNKED_DATASET, "the layout is neither contiguous nor chunked");
    return words.empty() ? cat("cause ", cause) : words;
}

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

/// Error of a file that cannot grow to @p bytes.
Error no_space(const std::string& path, std::int64_t bytes, const std::string& reason)
{
    return io_error(cat(path, " cannot grow to ", bytes, " bytes (", reason, "). Free space, raise the limit, or write elsewhere"));
}

/// This process may not write files of any size (ulimit -f).
void check_size_limit(const std::string& path, std::int64_t bytes)
{
    struct rlimit limit {};
    if (::getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY
        && limit.rlim_cur < static_cast<rlim_t>(bytes))
        throw no_space(path, bytes, cat("the limit on the size of files is ", limit.rlim_cur));
}

/// Takes the blocks of the first @p bytes of the file; where the file system cannot, looks for enough free space.
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

struct File::State {
    struct OpenDataset {
        Id id;
        DatasetInfo info;
    };

    std::string path;
    Communicator* comm = nullptr; ///< created files only
    Id file;
    std::map<std::string, OpenDataset> open_datasets; ///< kept open: rows are read one by one
    TransferCount transfers;
    std::int64_t largest_size = 0; ///< an upper bound of the file's bytes (parallel HDF5 cannot tell them)
    std::int64_t reserved = 0;     ///< bytes of the file that have their place on disk
    bool failed = false;           ///< a write failed: the file will not be used

    State() = default;
    State(const State&) = delete;
    State& operator=(const State&) = delete;
    ~State()
    {
        // HDF5 writes its metadata when it closes; on a full disk that fails and leaves HDF5 unable to shut down. What was
        // written so far is useless: its space will do.
        if (file.valid() && failed && comm->is_root())
            [[maybe_unused]] const int status = ::truncate(path.c_str(), 0);
        open_datasets.clear();
    }

    bool parallel() const { return comm != nullptr && comm->size() > 1; }
    ExitCode error_code() const { return comm != nullptr ? ExitCode::io : ExitCode::bad_data; }

    [[noreturn]] void fail(const std::string& what) const
    {
        const std::string reason = hdf5_reason();
        if (comm != nullptr)
            throw Error(ExitCode::io, cat(path, ": ", what, " failed (", reason,
                                          "). Check the free space and the quota of its file system"));
        throw Error(ExitCode::bad_data, cat(path, ": ", what, " failed (", reason, "). The file is damaged; make it anew"));
    }

    /// In a created file: every rank learns of any rank's failure here.
    void together(const char* label, const std::function<void()>& body)
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

    /**
     * Makes sure that the file can grow by @p more bytes and some metadata before HDF5 is told to: it does not survive a
     * write that fails later (it would crash at its end). Collective, and apart from what it is for: every rank stops here.
     */
    void reserve(std::int64_t more)
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

    /// Gives back what was reserved beyond the file's end.
    void trim(std::int64_t size) const
    {
        struct stat there {};
        if (::stat(path.c_str(), &there) == 0 && there.st_size > size && ::truncate(path.c_str(), size) != 0)
            throw io_error(cat(path, " cannot be cut to its length (", std::strerror(errno), "). Check its file system"));
    }

    OpenDataset& dataset(const std::string& name)
    {
        if (const auto found = open_datasets.find(name); found != open_datasets.end())
            return found->second;
        OpenDataset opened = open_dataset(name);
        return open_datasets.emplace(name, std::move(opened)).first->second;
    }

    OpenDataset open_dataset(const std::string& name) const
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

    bool link_exists(const std::string& name) const
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

    Id open_object(const std::string& name) const
    {
        if (!link_exists(name))
            throw Error(error_code(), cat(path, " has no object ", name));
        Id object(H5Oopen(file.get(), name.c_str(), H5P_DEFAULT), H5Oclose);
        if (!object.valid())
            fail("opening " + name);
        return object;
    }

    void count_transfer(hid_t transfer)
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

    /// One collective transfer of @p count rows (possibly none on this rank).
    void write_round(const std::string& name, OpenDataset& target, std::int64_t first, std::int64_t count, const void* values)
    {
        const Id transfer(H5Pcreate(H5P_DATASET_XFER), H5Pclose);
        if (parallel())
            H5Pset_dxpl_mpio(transfer.get(), H5FD_MPIO_COLLECTIVE);
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
};

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
        ::close(descriptor);
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

// ---------------------------------------------------------------------------------------------------- attributes

namespace {

std::optional<AttributeValue> read_attribute(hid_t attribute)
{
    const Id type(H5Aget_type(attribute), H5Tclose);
    const H5T_class_t kind = H5Tget_class(type.get());
    if (kind == H5T_INTEGER) {
        std::int64_t value = 0;
        if (H5Aread(attribute, H5T_NATIVE_INT64, &value) < 0)
            return std::nullopt;
        return value;
    }
    if (kind == H5T_FLOAT) {
        double value = 0;
        if (H5Aread(attribute, H5T_NATIVE_DOUBLE, &value) < 0)
            return std::nullopt;
        return value;
    }
    if (kind != H5T_STRING)
        return std::nullopt;
    if (H5Tis_variable_str(type.get()) > 0) {
        char* text = nullptr;
        const Id memory(H5Tcopy(type.get()), H5Tclose);
        if (H5Aread(attribute, memory.get(), &text) < 0)
            return std::nullopt;
        std::string value = text != nullptr ? text : "";
        H5free_memory(text);
        return value;
    }
    std::string value(H5Tget_size(type.get()), '\0');
    if (H5Aread(attribute, type.get(), value.data()) < 0)
        return std::nullopt;
    value.resize(std::strlen(value.c_str()) < value.size() ? std::strlen(value.c_str()) : value.size());
    return value;
}

} // namespace

std::optional<AttributeValue> File::attribute(const std::string& object, const std::string& name) const
{
    const Id id = state_->open_object(object);
    if (H5Aexists(id.get(), name.c_str()) <= 0)
        return std::nullopt;
    const Id attribute(H5Aopen(id.get(), name.c_str(), H5P_DEFAULT), H5Aclose);
    if (!attribute.valid())
        state_->fail(cat("opening attribute ", name, " of ", object));
    const Id space(H5Aget_space(attribute.get()), H5Sclose);
    if (H5Sget_simple_extent_npoints(space.get()) != 1)
        throw Error(state_->error_code(), cat(path(), ": attribute ", name, " of ", object, " is not a single value"));
    auto value = read_attribute(attribute.get());
    if (!value)
        state_->fail(cat("reading attribute ", name, " of ", object));
    return value;
}

namespace {

template<typename T>
T typed_attribute(const File& file, const std::string& object, const std::string& name, const char* expected)
{
    const auto value = file.attribute(object, name);
    if (!value)
        throw data_error(cat(file.path(), ": attribute ", name, " of ", object, " is missing (", expected,
                             " was expected). Is it a complete file of the right kind?"));
    if (const T* typed = std::get_if<T>(&*value))
        return *typed;
    throw data_error(cat(file.path(), ": attribute ", name, " of ", object, " is not ", expected, ". Was the file changed by another program?"));
}

} // namespace

std::string File::string_attribute(const std::string& object, const std::string& name) const
{
    return typed_attribute<std::string>(*this, object, name, "a text");
}

std::int64_t File::int_attribute(const std::string& object, const std::string& name) const
{
    return typed_attribute<std::int64_t>(*this, object, name, "an integer");
}

double File::double_attribute(const std::string& object, const std::string& name) const
{
    return typed_attribute<double>(*this, object, name, "a floating-point number");
}

Attributes File::attributes(const std::string& object) const
{
    const Id id = state_->open_object(object);
    std::vector<std::string> names;
    const auto collect = [](hid_t, const char* name, const H5A_info_t*, void* data) -> herr_t {
        static_cast<std::vector<std::string>*>(data)->emplace_back(name);
        return 0;
    };
    hsize_t position = 0;
    if (H5Aiterate2(id.get(), H5_INDEX_NAME, H5_ITER_INC, &position, collect, &names) < 0)
        state_->fail("listing attributes of " + object);
    Attributes found;
    for (const std::string& name : names)
        found.emplace(name, *attribute(object, name));
    return found;
}

void File::set_attribute(const std::string& object, const std::string& name, const AttributeValue& value)
{
    SELM_EXPECT(state_->comm != nullptr);
    const auto* words = std::get_if<std::string>(&value);
    state_->reserve(words != nullptr ? static_cast<std::int64_t>(words->size()) : 0);
    state_->together("HDF5 attribute", [&] {
        const Id id = state_->open_object(object);
        if (H5Aexists(id.get(), name.c_str()) > 0 && H5Adelete(id.get(), name.c_str()) < 0)
            state_->fail(cat("replacing attribute ", name, " of ", object));
        const Id scalar(H5Screate(H5S_SCALAR), H5Sclose);
        const auto store = [&](hid_t stored, hid_t in_memory, const void* data) {
            const Id attribute(H5Acreate2(id.get(), name.c_str(), stored, scalar.get(), H5P_DEFAULT, H5P_DEFAULT), H5Aclose);
            if (!attribute.valid() || H5Awrite(attribute.get(), in_memory, data) < 0)
                state_->fail(cat("writing attribute ", name, " of ", object));
        };
        if (words != nullptr) {
            SELM_EXPECT(words->find('\0') == std::string::npos);
            const Id type(H5Tcopy(H5T_C_S1), H5Tclose);
            H5Tset_size(type.get(), H5T_VARIABLE);
            H5Tset_cset(type.get(), H5T_CSET_UTF8);
            const char* data = words->c_str();
            store(type.get(), type.get(), &data);
        } else if (const auto* integer = std::get_if<std::int64_t>(&value)) {
            store(H5T_STD_I64LE, H5T_NATIVE_INT64, integer);
        } else {
            store(H5T_IEEE_F64LE, H5T_NATIVE_DOUBLE, &std::get<double>(value));
        }
    });
}

void File::set_attributes(const std::string& object, const Attributes& values)
{
    for (const auto& [name, value] : values)
        set_attribute(object, name, value);
}

// ---------------------------------------------------------------------------------------------------- writing

void File::create_group(const std::string& path)
{
    SELM_EXPECT(state_->comm != nullptr);
    if (path == "/" || state_->link_exists(path))
        return;
    create_group(parent_of(path));
    state_->reserve(0);
    state_->together("HDF5 group", [&] {
        const Id group(H5Gcreate2(state_->file.get(), path.c_str(), H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT), H5Gclose);
        if (!group.valid())
            state_->fail("creating group " + path);
    });
}

void File::create_dataset(const std::string& path, ElementType type, const std::vector<std::int64_t>& shape)
{
    SELM_EXPECT(state_->comm != nullptr && !shape.empty());
    create_group(parent_of(path));
    const std::int64_t elements = DatasetInfo{.type = type, .shape = shape}.elements();
    state_->reserve(elements * static_cast<std::int64_t>(bytes_of(type)));
    state_->together("HDF5 dataset", [&] {
        const std::vector<hsize_t> extent = dimensions(shape);
        const Id space(H5Screate_simple(static_cast<int>(extent.size()), extent.data(), nullptr), H5Sclose);
        const Id creation(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
        H5Pset_fill_time(creation.get(), H5D_FILL_TIME_NEVER); // every element is written
        H5Pset_alloc_time(creation.get(), H5D_ALLOC_TIME_EARLY);
        H5Pset_obj_track_times(creation.get(), false);
        Id dataset(H5Dcreate2(state_->file.get(), path.c_str(), stored_type(type), space.get(), H5P_DEFAULT, creation.get(),
                              H5P_DEFAULT), H5Dclose);
        if (!dataset.valid())
            state_->fail("creating dataset " + path);
    });
}

void File::write_from(const std::string& path, ElementType type, std::int64_t first_row, std::int64_t elements, const void* values)
{
    SELM_EXPECT(state_->comm != nullptr);
    State& state = *state_;
    State::OpenDataset target = state.open_dataset(path); // not cached: thousands may be written once each
    const std::int64_t width = target.info.row_elements();
    std::int64_t rows = 0;
    state.together("HDF5 slab", [&] {
        SELM_EXPECT(target.info.type == type);
        rows = width == 0 ? 0 : elements / width;
        SELM_EXPECT(rows * width == elements);
        SELM_EXPECT(rows == 0 || (first_row >= 0 && first_row + rows <= target.info.rows()));
    });
    if (target.info.elements() == 0)
        return;
    const auto row_bytes = width * static_cast<std::int64_t>(bytes_of(type));
    const std::int64_t rows_per_round = std::max<std::int64_t>(1, transfer_bytes / row_bytes);
    std::int64_t rounds = (rows + rows_per_round - 1) / rows_per_round;
    if (state.parallel())
        rounds = all_reduce_value(*state.comm, rounds, ReduceOp::max, "HDF5 transfer rounds");
    for (std::int64_t round = 0; round < rounds; ++round) {
        const std::int64_t begin = std::min(rows, round * rows_per_round);
        const std::int64_t count = std::min(rows - begin, rows_per_round);
        const char* data = static_cast<const char*>(values);
        state.write_round(path, target, first_row + begin, count, count > 0 ? data + begin * row_bytes : nullptr);
    }
}

void File::write_blocks_from(const std::string& path, ElementType type, std::int64_t elements, const void* values,
                             const std::vector<std::int64_t>& row_shape)
{
    SELM_EXPECT(state_->comm != nullptr);
    std::int64_t width = 1;
    for (const std::int64_t extent : row_shape)
        width *= extent;
    state_->together("HDF5 blocks", [&] { SELM_EXPECT(width > 0 && elements % width == 0); });
    const std::int64_t rows = elements / width;
    const std::vector<std::int64_t> all = all_gather_value(*state_->comm, rows, "HDF5 block sizes");
    std::int64_t first = 0;
    std::int64_t total = 0;
    for (std::size_t rank = 0; rank < all.size(); ++rank) {
        if (static_cast<int>(rank) < state_->comm->rank())
            first += all[rank];
        total += all[rank];
    }
    std::vector<std::int64_t> shape{total};
    shape.insert(shape.end(), row_shape.begin(), row_shape.end());
    create_dataset(path, type, shape);
    write_from(path, type, first, elements, values);
}

void File::write_offsets(const std::string& path, std::span<const std::int64_t> lengths)
{
    std::int64_t mine = 0;
    for (const std::int64_t length : lengths)
        mine += length;
    const std::vector<std::int64_t> all = all_gather_value(*state_->comm, mine, "HDF5 ragged sizes");
    std::int64_t next = 0;
    for (int rank = 0; rank < state_->comm->rank(); ++rank)
        next += all[static_cast<std::size_t>(rank)];
    std::vector<std::int64_t> offsets;
    offsets.reserve(lengths.size() + 1);
    for (const std::int64_t length : lengths) {
        offsets.push_back(next);
        next += length;
    }
    if (state_->comm->rank() == state_->comm->size() - 1)
        offsets.push_back(next);
    write_blocks(path, offsets);
}

void File::write_texts(const std::string& path, std::span<const std::string> mine)
{
    std::vector<std::int64_t> lengths;
    lengths.reserve(mine.size());
    std::string joined;
    for (const std::string& text : mine) {
        lengths.push_back(static_cast<std::int64_t>(text.size()));
        joined += text;
    }
    write_blocks(path, std::span(reinterpret_cast<const std::uint8_t*>(joined.data()), joined.size()));
    write_offsets(path + "_offsets", lengths);
}

// ---------------------------------------------------------------------------------------------------- copying

namespace {

void copy_dataset(const File& source, File& target, const std::string& path, Communicator& comm)
{
    DatasetInfo info;
    agree(comm, "dataset to be copied", [&] { info = source.info(path); });
    target.create_dataset(path, info.type, info.shape);
    const std::int64_t row_bytes = info.row_elements() * static_cast<std::int64_t>(bytes_of(info.type));
    if (row_bytes == 0)
        return;
    const std::int64_t rows_per_round = std::max<std::int64_t>(1, copy_bytes / row_bytes);
    const std::int64_t stride = rows_per_round * comm.size(); // rows of all ranks in one round
    std::vector<std::byte> buffer;
    for (std::int64_t begin = 0; begin < info.rows(); begin += stride) {
        const std::int64_t first = std::min(info.rows(), begin + rows_per_round * comm.rank());
        const std::int64_t count = std::min(rows_per_round, info.rows() - first);
        agree(comm, "reading the file to be copied", [&] {
            buffer.resize(static_cast<std::size_t>(count * row_bytes));
            source.read_into(path, info.type, first, count, buffer.data());
        });
        const auto write = [&]<typename T>(T) {
            target.write_slab(path, first, std::span(reinterpret_cast<const T*>(buffer.data()), buffer.size() / sizeof(T)));
        };
        switch (info.type) {
        case ElementType::uint8: write(std::uint8_t{}); break;
        case ElementType::int32: write(std::int32_t{}); break;
        case ElementType::int64: write(std::int64_t{}); break;
        case ElementType::float32: write(float{}); break;
        case ElementType::float64: write(double{}); break;
        }
    }
}

} // namespace

void File::copy_tree(const File& source, const std::string& path, const std::vector<std::string>& except)
{
    SELM_EXPECT(state_->comm != nullptr);
    if (std::find(except.begin(), except.end(), path) != except.end())
        return;
    bool group = false;
    Attributes attributes;
    std::vector<std::string> names;
    agree(*state_->comm, "object to be copied", [&] {
        group = source.is_group(path);
        attributes = source.attributes(path);
        if (group)
            names = source.children(path);
    });
    if (group)
        create_group(path);
    else
        copy_dataset(source, *this, path, *state_->comm);
    set_attributes(path, attributes);
    for (const std::string& name : names)
        copy_tree(source, join(path, name), except);
}

} // namespace selm::h5
