#include "selm/model/safetensors.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <limits>
#include <optional>
#include <set>
#include <utility>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/base/hash.hpp"
#include "selm/kernels/engine.hpp"

// The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data, in
// which the offsets count (https://github.com/huggingface/safetensors, "Format").
namespace selm {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* single_file = "model.safetensors";
constexpr const char* index_file = "model.safetensors.index.json";
constexpr std::uint64_t max_header_bytes = 100'000'000; // the limit of the reference implementation
constexpr int max_json_depth = 8;

/// Bytes of one element; empty for a dtype that the format does not know.
std::optional<std::int64_t> dtype_bytes(const std::string& dtype)
{
    static const std::map<std::string, std::int64_t> bytes = {
        {"BOOL", 1}, {"U8", 1},  {"I8", 1},   {"F8_E5M2", 1}, {"F8_E4M3", 1}, {"I16", 2}, {"U16", 2},
        {"F16", 2},  {"BF16", 2}, {"I32", 4}, {"U32", 4},     {"F32", 4},     {"I64", 8}, {"U64", 8}, {"F64", 8}};
    const auto found = bytes.find(dtype);
    return found == bytes.end() ? std::nullopt : std::optional(found->second);
}

/// Product of the dimensions; empty when it does not fit.
std::optional<std::int64_t> checked_elements(const std::vector<std::int64_t>& shape)
{
    std::int64_t elements = 1;
    for (const std::int64_t extent : shape) {
        if (extent < 0 || __builtin_mul_overflow(elements, extent, &elements))
            return std::nullopt;
    }
    return elements;
}

std::string shape_text(const std::vector<std::int64_t>& shape)
{
    std::string text = "[";
    for (std::size_t i = 0; i < shape.size(); ++i)
        text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

/// A whole file mapped read-only; its pages are shared by all processes that map it.
class MappedFile {
  public:
    explicit MappedFile(const std::string& path) : path_(path)
    {
        const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
        if (descriptor < 0)
            throw data_error(cat("cannot open ", path, ": ", std::strerror(errno)));
        struct stat status = {};
        if (::fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode)) {
            ::close(descriptor);
            throw data_error(cat(path, " is not a regular file (weights are read from safetensors files)"));
        }
        size_ = static_cast<std::size_t>(status.st_size);
        void* address = size_ ? ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor, 0) : nullptr;
        const int error = errno;
        ::close(descriptor);
        if (address == MAP_FAILED)
            throw data_error(cat("cannot map ", path, ": ", std::strerror(error)));
        data_ = static_cast<const unsigned char*>(address);
    }
    ~MappedFile()
    {
        if (data_)
            ::munmap(const_cast<unsigned char*>(data_), size_);
    }
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;
    const unsigned char* data() const { return data_; }
    std::size_t size() const { return size_; }
    const std::string& path() const { return path_; }

  private:
    std::string path_;
    const unsigned char* data_ = nullptr;
    std::size_t size_ = 0;
};

/// JSON with bounded nesting in which no object names a key twice (nlohmann would keep the last one silently).
json parse_strictly(const char* begin, const char* end, const std::string& path)
{
    std::vector<std::set<std::string>> keys;
    const auto check = [&](int depth, json::parse_event_t event, json& parsed) {
        if (depth > max_json_depth)
            throw data_error(cat(path, ": JSON nested deeper than ", max_json_depth, " levels (a damaged file)"));
        if (event == json::parse_event_t::object_start) {
            keys.emplace_back();
        } else if (event == json::parse_event_t::object_end) {
            keys.pop_back();
        } else if (event == json::parse_event_t::key) {
            const auto& key = parsed.get_ref<const std::string&>();
            if (!keys.back().insert(key).second)
                throw data_error(cat(path, ": the name '", key, "' occurs twice (which one is meant is unknown)"));
        }
        return true;
    };
    try {
        return json::parse(begin, end, check);
    } catch (const json::exception& error) {
        throw data_error(cat(path, ": not valid JSON where JSON must be (", error.what(), ")"));
    }
}

struct StoredTensor {
    SafetensorInfo info;
    const unsigned char* data = nullptr;
    std::int64_t bytes = 0;
};

std::vector<std::int64_t> integers(const json& entry, const char* key, const std::string& where)
{
    const auto found = entry.find(key);
    if (found == entry.end() || !found->is_array())
        throw data_error(cat(where, ": '", key, "' is missing or not a list"));
    std::vector<std::int64_t> out;
    for (const json& value : *found) {
        if (!value.is_number_unsigned() ||
            value.get<std::uint64_t>() > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
            throw data_error(cat(where, ": '", key, "' holds ", value.dump(), ", which is not a size"));
        out.push_back(value.get<std::int64_t>());
    }
    return out;
}

StoredTensor parse_entry(const json& entry, const std::string& where, const MappedFile& file, std::size_t data_begin)
{
    if (!entry.is_object())
        throw data_error(cat(where, ": its header entry is not an object"));
    StoredTensor tensor;
    const auto dtype = entry.find("dtype");
    if (dtype == entry.end() || !dtype->is_string())
        throw data_error(cat(where, ": 'dtype' is missing or not a string"));
    tensor.info.dtype = dtype->get<std::string>();
    tensor.info.shape = integers(entry, "shape", where);
    tensor.info.file = file.path();
    const auto offsets = integers(entry, "data_offsets", where);
    const auto element_bytes = dtype_bytes(tensor.info.dtype);
    if (!element_bytes)
        throw data_error(cat(where, ": unknown dtype '", tensor.info.dtype, "'"));
    const auto data_bytes = static_cast<std::int64_t>(file.size() - data_begin);
    if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > data_bytes)
        throw data_error(cat(where, ": data_offsets ", shape_text(offsets), " lie outside the file's ", data_bytes,
                             " data bytes (the file is truncated or damaged)"));
    tensor.bytes = offsets[1] - offsets[0];
    const auto elements = checked_elements(tensor.info.shape);
    std::int64_t expected = 0;
    if (!elements || __builtin_mul_overflow(*elements, *element_bytes, &expected) || expected != tensor.bytes)
        throw data_error(cat(where, ": shape ", shape_text(tensor.info.shape), " of ", tensor.info.dtype, " does not take the ",
                             tensor.bytes, " bytes of its data_offsets"));
    tensor.data = file.data() + data_begin + offsets[0];
    return tensor;
}

/// The tensors must tile the data: no byte in two tensors, none in no tensor.
void check_tiling(const std::map<std::string, StoredTensor>& tensors, const MappedFile& file, std::size_t data_begin)
{
    std::vector<const std::pair<const std::string, StoredTensor>*> order;
    for (const auto& item : tensors)
        order.push_back(&item);
    std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
        return std::pair(a->second.data, a->second.bytes) < std::pair(b->second.data, b->second.bytes);
    });
    const unsigned char* expected = file.data() + data_begin;
    for (const auto* item : order) {
        if (item->second.data != expected)
            throw data_error(cat(file.path(), ": tensor '", item->first, "' ",
                                 item->second.data < expected ? "overlaps the tensor before it" : "follows a hole in the data",
                                 " (a damaged file)"));
        expected += item->second.bytes;
    }
    if (expected != file.data() + file.size())
        throw data_error(cat(file.path(), ": ", file.data() + file.size() - expected,
                             " bytes at the end belong to no tensor (a damaged file)"));
}

std::map<std::string, StoredTensor> parse_file(const MappedFile& file)
{
    const std::string& path = file.path();
    if (file.size() < 8)
        throw data_error(cat(path, ": ", file.size(), " bytes are no safetensors file (the header length alone takes 8)"));
    std::uint64_t header_bytes = 0;
    for (int i = 7; i >= 0; --i)
        header_bytes = header_bytes << 8 | file.data()[i];
    if (header_bytes > max_header_bytes || header_bytes > file.size() - 8)
        throw data_error(cat(path, ": header length ", header_bytes, " does not fit (the file has ", file.size(),
                             " bytes, headers at most ", max_header_bytes, "): not a safetensors file, or truncated"));
    const char* header_begin = reinterpret_cast<const char*>(file.data()) + 8;
    const std::size_t data_begin = 8 + static_cast<std::size_t>(header_bytes);
    const json header = parse_strictly(header_begin, header_begin + header_bytes, path);
    if (!header.is_object())
        throw data_error(cat(path, ": the header is not a JSON object (a damaged file)"));
    std::map<std::string, StoredTensor> tensors;
    for (const auto& [name, entry] : header.items()) {
        if (name != "__metadata__")
            tensors.emplace(name, parse_entry(entry, cat(path, ": tensor '", name, "'"), file, data_begin));
    }
    check_tiling(tensors, file, data_begin);
    return tensors;
}

float half_to_float(std::uint16_t half)
{
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000U) << 16;
    const std::uint32_t exponent = half >> 10 & 0x1FU;
    const std::uint32_t fraction = half & 0x3FFU;
    std::uint32_t bits = 0;
    if (exponent == 0) { // zero and subnormals: fraction * 2^-24
        const float magnitude = static_cast<float>(fraction) * 0x1p-24F;
        return sign ? -magnitude : magnitude;
    }
    bits = exponent == 31 ? sign | 0x7F800000U | fraction << 13 : sign | (exponent + 112) << 23 | fraction << 13;
    float value = 0;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

void widen_bf16(const unsigned char* data, std::span<float> out)
{
    for (std::size_t i = 0; i < out.size(); ++i) {
        std::uint16_t half = 0;
        std::memcpy(&half, data + 2 * i, 2); // offsets in a file need not be aligned
        const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
        std::memcpy(&out[i], &bits, 4);
    }
}

void widen_half(const unsigned char* data, std::span<float> out)
{
    for (std::size_t i = 0; i < out.size(); ++i) {
        std::uint16_t half = 0;
        std::memcpy(&half, data + 2 * i, 2);
        out[i] = half_to_float(half);
    }
}

} // namespace

std::int64_t SafetensorInfo::elements() const { return checked_elements(shape).value_or(0); }

struct SafetensorsReader::Impl {
    std::string directory;
    std::vector<std::unique_ptr<MappedFile>> files;
    std::map<std::string, StoredTensor> stored;
    std::map<std::string, SafetensorInfo> infos;

    std::map<std::string, StoredTensor> open(const std::string& path)
    {
        files.push_back(std::make_unique<MappedFile>(path));
        return parse_file(*files.back());
    }
    void open_index(const std::string& path);
    /// @throws Error bad_data when the tensor is missing or not of that shape.
    const StoredTensor& find(const std::string& name, const std::vector<std::int64_t>& shape) const;
};

const StoredTensor& SafetensorsReader::Impl::find(const std::string& name, const std::vector<std::int64_t>& shape) const
{
    const auto found = stored.find(name);
    if (found == stored.end())
        throw data_error(cat(directory, ": tensor '", name, "' is missing (config.json calls for it)"));
    if (found->second.info.shape != shape)
        throw data_error(cat(found->second.info.file, ": tensor '", name, "' has shape ", shape_text(found->second.info.shape),
                             ", but config.json calls for ", shape_text(shape)));
    return found->second;
}

void SafetensorsReader::Impl::open_index(const std::string& path)
{
    const std::string text = read_file(path);
    const json index = parse_strictly(text.data(), text.data() + text.size(), path);
    if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object())
        throw data_error(cat(path, ": 'weight_map' is missing or not an object"));
    std::map<std::string, std::map<std::string, StoredTensor>> shards;
    for (const auto& [name, value] : index["weight_map"].items()) {
        const std::string file = value.is_string() ? value.get<std::string>() : std::string();
        if (file.empty() || file.find('/') != std::string::npos || file == "." || file == "..")
            throw data_error(cat(path, ": tensor '", name, "' is mapped to ", value.dump(), ", which is no file name"));
        if (!shards.contains(file)) {
            const std::string shard = directory + "/" + file;
            if (!fs::exists(shard))
                throw data_error(cat(path, ": tensor '", name, "' is in ", file,
                                     ", which does not exist (an incomplete download?)"));
            shards[file] = open(shard);
        }
        const auto found = shards[file].find(name);
        if (found == shards[file].end())
            throw data_error(cat(path, ": tensor '", name, "' is said to be in ", file, ", but is not there"));
        stored.emplace(name, found->second);
    }
    for (const auto& [file, tensors] : shards) {
        for (const auto& [name, tensor] : tensors) {
            if (!stored.contains(name) || stored.at(name).data != tensor.data)
                throw data_error(cat(path, ": ", file, " holds a tensor '", name, "' that the index does not place there"));
        }
    }
}

SafetensorsReader::SafetensorsReader(const std::string& directory) : impl_(std::make_unique<Impl>())
{
    impl_->directory = directory;
    const std::string single = directory + "/" + single_file;
    const std::string index = directory + "/" + index_file;
    if (fs::exists(single))
        impl_->stored = impl_->open(single);
    else if (fs::exists(index))
        impl_->open_index(index);
    else
        throw config_error(cat(directory, " holds neither ", single_file, " nor ", index_file,
                               " (a model directory in Hugging Face format is needed). Check the path"));
    for (const auto& [name, tensor] : impl_->stored)
        impl_->infos.emplace(name, tensor.info);
}

SafetensorsReader::~SafetensorsReader() = default;
SafetensorsReader::SafetensorsReader(SafetensorsReader&&) noexcept = default;

const std::map<std::string, SafetensorInfo>& SafetensorsReader::tensors() const { return impl_->infos; }

bool SafetensorsReader::has(const std::string& name) const { return impl_->stored.contains(name); }

void SafetensorsReader::read_f32(const std::string& name, const std::vector<std::int64_t>& shape, std::int64_t begin,
                                 std::span<float> out) const
{
    const StoredTensor& tensor = impl_->find(name, shape);
    SELM_EXPECT(begin >= 0 && begin + static_cast<std::int64_t>(out.size()) <= tensor.info.elements());
    if (tensor.info.dtype == "F32")
        std::memcpy(out.data(), tensor.data + begin * 4, out.size_bytes());
    else if (tensor.info.dtype == "BF16")
        widen_bf16(tensor.data + begin * 2, out);
    else if (tensor.info.dtype == "F16")
        widen_half(tensor.data + begin * 2, out);
    else
        throw data_error(cat(tensor.info.file, ": tensor '", name, "' has dtype ", tensor.info.dtype,
                             " (weights must be F32, BF16 or F16). Quantised checkpoints are not supported"));
}

Tensor SafetensorsReader::view(const std::string& name, const std::vector<std::int64_t>& shape) const
{
    const StoredTensor& tensor = impl_->find(name, shape);
    const bool is_f32 = tensor.info.dtype == "F32";
    const auto address = reinterpret_cast<std::uintptr_t>(tensor.data);
    if ((!is_f32 && tensor.info.dtype != "BF16") || shape.empty() || shape.size() > 2 || address % (is_f32 ? 4 : 2) != 0)
        return {};
    const std::int64_t columns = shape.back();
    void* const data = const_cast<unsigned char*>(tensor.data); // a Tensor can be written, a mapped file cannot
    return {nullptr, data, shape.size() == 2 ? shape[0] : 1, columns, columns, is_f32 ? DType::f32 : DType::bf16, Device::cpu};
}

std::string SafetensorsReader::digest() const
{
    Hasher hasher;
    for (const auto& [name, tensor] : impl_->stored) { // sorted by name
        hasher.update(cat(name.size(), ':', name, ' ', tensor.info.dtype, ' ', shape_text(tensor.info.shape), '\n'));
        hasher.update(tensor.data, static_cast<std::size_t>(tensor.bytes));
    }
    return hasher.hex();
}

} // namespace selm
