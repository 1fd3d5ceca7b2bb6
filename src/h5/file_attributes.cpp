#include <algorithm>
#include <cstring>

#include "file_state.hpp"

namespace selm::h5 {

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

} // namespace selm::h5
