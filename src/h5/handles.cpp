#include "handles.hpp"

#include <algorithm>

namespace selm::h5 {

void silence_error_stack()
{
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
}

namespace {

herr_t take_innermost(unsigned depth, const H5E_error2_t* error, void* data)
{
    if (depth == 0 && error->desc != nullptr)
        *static_cast<std::string*>(data) = error->desc;
    return 0;
}

} // namespace

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

Id memory_space(std::int64_t elements)
{
    const hsize_t size = static_cast<hsize_t>(std::max<std::int64_t>(elements, 1));
    Id space(H5Screate_simple(1, &size, nullptr), H5Sclose);
    if (elements == 0)
        H5Sselect_none(space.get());
    return space;
}

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

} // namespace selm::h5
