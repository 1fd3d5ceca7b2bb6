#include "selm/model/safetensors_writer.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <set>
#include <utility>

#include <fcntl.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include "selm/base/attempt.hpp"
#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/kernels/engine.hpp"
#include "selm/model/safetensors.hpp"

// The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data, in
// which the offsets count (https://github.com/huggingface/safetensors, "Format").
namespace selm {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

constexpr const char* single_file = "model.safetensors";
constexpr const char* index_file = "model.safetensors.index.json";
constexpr std::int64_t block_elements = std::int64_t{1} << 20; ///< converted at a time

std::int64_t elements_of(const std::vector<std::int64_t>& shape)
{
    std::int64_t elements = 1;
    for (const std::int64_t extent : shape) {
        const bool overflow = __builtin_mul_overflow(elements, extent, &elements);
        SELM_EXPECT(extent >= 0 && !overflow);
    }
    return elements;
}

Error write_failed(const std::string& path, int error)
{
    return io_error(cat("writing ", path, " failed: ", std::strerror(error)));
}

/// Consecutive tensors [begin, end) of each file: at most max_shard_bytes unless one tensor alone is larger.
std::vector<std::pair<std::size_t, std::size_t>> cut_into_files(const std::vector<SafetensorSpec>& tensors,
                                                                std::int64_t element_bytes, std::int64_t max_shard_bytes)
{
    std::vector<std::pair<std::size_t, std::size_t>> files{{0, 0}};
    std::int64_t file_bytes = 0;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        const std::int64_t bytes = elements_of(tensors[i].shape) * element_bytes;
        if (i > files.back().first && file_bytes + bytes > max_shard_bytes) {
            files.emplace_back(i, i);
            file_bytes = 0;
        }
        files.back().second = i + 1;
        file_bytes += bytes;
    }
    return files;
}

std::string file_name(std::size_t index, std::size_t count)
{
    if (count == 1)
        return single_file;
    std::array<char, 64> name = {};
    std::snprintf(name.data(), name.size(), "model-%05zu-of-%05zu.safetensors", index + 1, count);
    return name.data();
}

/// Length and header of a file of these tensors.
std::string header_of(std::span<const SafetensorSpec> tensors, DType dtype)
{
    ordered_json header;
    header["__metadata__"] = {{"format", "pt"}};
    std::int64_t offset = 0;
    for (const SafetensorSpec& tensor : tensors) {
        const std::int64_t bytes = elements_of(tensor.shape) * static_cast<std::int64_t>(size_of(dtype));
        header[tensor.name] = {{"dtype", dtype == DType::f32 ? "F32" : "BF16"},
                               {"shape", tensor.shape},
                               {"data_offsets", {offset, offset + bytes}}};
        offset += bytes;
    }
    std::string text = header.dump();
    text.append((8 - text.size() % 8) % 8, ' '); // the data start aligned
    std::string length(8, '\0');
    for (std::size_t i = 0; i < 8; ++i)
        length[i] = static_cast<char>(text.size() >> (8 * i) & 0xFF);
    return length + text;
}

/// Weights of an earlier model in the same directory would be read instead of, or beside, the new ones.
void remove_stale_weights(const std::string& directory, const std::set<std::string>& keep)
{
    std::vector<fs::path> stale;
    for (const auto& entry : fs::directory_iterator(directory)) {
        const std::string name = entry.path().filename().string();
        const bool weights = name == single_file || name == index_file ||
                             (name.starts_with("model-") && name.ends_with(".safetensors"));
        if (weights && !keep.contains(name))
            stale.push_back(entry.path());
    }
    for (const auto& path : stale)
        fs::remove(path);
}

} // namespace

SafetensorsWriter::SafetensorsWriter(std::string directory, const std::vector<SafetensorSpec>& tensors, DType dtype,
                                     std::string attempt, std::int64_t max_shard_bytes)
    : directory_(std::move(directory)), attempt_(std::move(attempt)), dtype_(dtype)
{
    SELM_EXPECT(dtype == DType::f32 || dtype == DType::bf16);
    const auto element_bytes = static_cast<std::int64_t>(size_of(dtype));
    const auto cuts = cut_into_files(tensors, element_bytes, max_shard_bytes);
    ordered_json weight_map = ordered_json::object();
    for (std::size_t f = 0; f < cuts.size(); ++f) {
        const auto of_file = std::span(tensors).subspan(cuts[f].first, cuts[f].second - cuts[f].first);
        File file{.name = file_name(f, cuts.size()), .header = header_of(of_file, dtype)};
        file.bytes = static_cast<std::int64_t>(file.header.size());
        for (const SafetensorSpec& tensor : of_file) {
            const Place place{f, file.bytes, elements_of(tensor.shape)};
            const bool is_new = places_.emplace(tensor.name, place).second;
            SELM_EXPECT(is_new);
            file.bytes += place.elements * element_bytes;
            elements_ += place.elements;
            weight_map[tensor.name] = file.name;
        }
        files_.push_back(std::move(file));
    }
    const ordered_json index = {{"metadata", {{"total_size", elements_ * element_bytes}}}, {"weight_map", weight_map}};
    if (files_.size() > 1)
        index_ = index.dump(2) + "\n";
}

SafetensorsWriter::~SafetensorsWriter()
{
    for (const File& file : files_)
        if (file.descriptor >= 0)
            ::close(file.descriptor);
}

void SafetensorsWriter::open(File& file, int flags)
{
    if (file.descriptor >= 0)
        return;
    file.descriptor = ::open(partial(file).c_str(), O_WRONLY | O_CLOEXEC | flags, 0666);
    if (file.descriptor < 0)
        throw io_error(cat("cannot ", flags != 0 ? "create " : "open ", partial(file), ": ", std::strerror(errno)));
}

void SafetensorsWriter::write_at(const File& file, std::int64_t offset, const void* data, std::size_t bytes) const
{
    const char* at = static_cast<const char*>(data);
    while (bytes > 0) {
        const ssize_t written = ::pwrite(file.descriptor, at, bytes, offset);
        if (written < 0 && errno == EINTR)
            continue;
        if (written < 0)
            throw write_failed(path(file), errno);
        at += written;
        offset += written;
        bytes -= static_cast<std::size_t>(written);
    }
}

void SafetensorsWriter::reserve(const File& file) const
{
    while (::fallocate(file.descriptor, 0, 0, file.bytes) != 0) {
        if (errno == EINTR)
            continue;
        if (errno != EOPNOTSUPP && errno != ENOSYS)
            throw write_failed(path(file), errno);
        if (::ftruncate(file.descriptor, file.bytes) != 0) // a file system that cannot reserve: write() may fail later
            throw write_failed(path(file), errno);
        return;
    }
}

void SafetensorsWriter::create()
{
    for (File& file : files_) {
        open(file, O_CREAT | O_TRUNC);
        write_at(file, 0, file.header.data(), file.header.size());
        reserve(file);
    }
}

void SafetensorsWriter::write(std::string_view tensor, std::int64_t begin, std::span<const float> values)
{
    const auto found = places_.find(tensor);
    SELM_EXPECT(found != places_.end());
    const Place& place = found->second;
    const auto count = static_cast<std::int64_t>(values.size());
    SELM_EXPECT(begin >= 0 && begin <= place.elements && count <= place.elements - begin);
    if (count == 0)
        return;
    File& file = files_[place.file];
    open(file, 0);
    const std::int64_t offset = place.offset + begin * static_cast<std::int64_t>(size_of(dtype_));
    if (dtype_ == DType::f32) {
        write_at(file, offset, values.data(), values.size_bytes());
    } else {
        rounded_.resize(static_cast<std::size_t>(std::min(count, block_elements)));
        for (std::int64_t done = 0; done < count; done += block_elements) {
            const auto block = values.subspan(static_cast<std::size_t>(done),
                                              static_cast<std::size_t>(std::min(block_elements, count - done)));
            std::transform(block.begin(), block.end(), rounded_.begin(), float_to_bf16);
            write_at(file, offset + done * 2, rounded_.data(), block.size() * 2);
        }
    }
    written_ += count;
}

void SafetensorsWriter::finish()
{
    for (File& file : files_) {
        if (file.descriptor < 0)
            continue;
        if (::fsync(file.descriptor) != 0)
            throw write_failed(path(file), errno);
        if (::close(std::exchange(file.descriptor, -1)) != 0) // network file systems report a full disk as late as here
            throw write_failed(path(file), errno);
    }
}

void SafetensorsWriter::publish()
{
    finish();
    if (index_.empty()) {
        publish_file(partial(files_.front()), path(files_.front()));
        remove_stale_weights(directory_, {single_file});
        return;
    }
    remove_stale_weights(directory_, {}); // no index between here and the end: never a mixture of two models
    for (const File& file : files_)
        publish_file(partial(file), path(file));
    write_file_atomically(directory_ + "/" + index_file, index_);
}

void SafetensorsWriter::discard() noexcept
{
    for (const File& file : files_)
        ::unlink(partial(file).c_str());
}

void write_safetensors(const std::string& directory, const std::vector<SafetensorSource>& tensors, DType dtype,
                       std::int64_t max_shard_bytes)
{
    std::vector<SafetensorSpec> specs;
    for (const SafetensorSource& tensor : tensors)
        specs.push_back({tensor.name, tensor.shape});
    SafetensorsWriter writer(directory, specs, dtype, process_tag(), max_shard_bytes);
    try {
        writer.create();
        std::vector<float> values;
        for (const SafetensorSource& tensor : tensors) {
            const std::int64_t elements = elements_of(tensor.shape);
            values.resize(static_cast<std::size_t>(std::min(elements, block_elements)));
            for (std::int64_t begin = 0; begin < elements; begin += block_elements) {
                const auto block =
                    std::span(values).first(static_cast<std::size_t>(std::min(block_elements, elements - begin)));
                tensor.read(begin, block);
                writer.write(tensor.name, begin, block);
            }
        }
        writer.publish();
    } catch (...) {
        writer.discard();
        throw;
    }
}

} // namespace selm
