#include "selm/data/attributes.hpp"

#include <algorithm>

#include "dataset_digest.hpp"
#include "selm/base/hash.hpp"
#include "selm/base/provenance.hpp"

namespace selm {

namespace {

constexpr std::int64_t digest_bytes = std::int64_t{8} << 20;

bool is_below(const std::string& path, const std::string& group)
{
    return path.compare(0, group.size() + 1, group + "/") == 0;
}

void digest_dataset(Hasher& hasher, const h5::File& file, const std::string& path)
{
    const h5::DatasetInfo info = file.info(path);
    std::string head = cat(path, ' ', h5::name_of(info.type));
    for (const std::int64_t extent : info.shape)
        head += cat(' ', extent);
    head += '\n';
    hasher.update(head);
    const std::int64_t row_bytes = info.row_elements() * static_cast<std::int64_t>(h5::bytes_of(info.type));
    if (row_bytes == 0)
        return;
    const std::int64_t step = std::max<std::int64_t>(1, digest_bytes / row_bytes);
    std::vector<std::byte> buffer;
    for (std::int64_t first = 0; first < info.rows(); first += step) {
        const std::int64_t count = std::min(step, info.rows() - first);
        buffer.resize(static_cast<std::size_t>(count * row_bytes));
        file.read_into(path, info.type, first, count, buffer.data());
        hasher.update(buffer.data(), buffer.size());
    }
}

} // namespace

std::string digest_of_datasets(const h5::File& file, const std::vector<std::string>& paths)
{
    Hasher hasher;
    for (const std::string& path : paths)
        digest_dataset(hasher, file, path);
    return hasher.hex();
}

void check_format(const h5::File& file, const std::string& format)
{
    const auto found = file.attribute("/", "format");
    const auto* name = found ? std::get_if<std::string>(&*found) : nullptr;
    if (name == nullptr)
        throw data_error(cat(file.path(), " has no format attribute (a ", format, " file was expected). Give a file that ",
                             format == preferences_format ? "selm_import" : "selm_gen", " wrote"));
    if (*name != format)
        throw data_error(cat(file.path(), " is a ", *name, " file (a ", format, " file was expected). Give a file that ",
                             format == preferences_format ? "selm_import" : "selm_gen", " wrote"));
    const std::int64_t version = file.int_attribute("/", "format_version");
    if (version != file_format_version)
        throw data_error(cat(file.path(), " has format version ", version, " (this program reads version ", file_format_version,
                             "). Make it anew, or use the release that wrote it"));
}

std::string format_of(const std::string& path)
{
    const h5::File file = h5::File::open(path);
    const auto found = file.attribute("/", "format");
    const auto* name = found ? std::get_if<std::string>(&*found) : nullptr;
    return name != nullptr ? *name : "";
}

void write_root_attributes(h5::File& file, const std::string& format, const FileAttributes& attributes)
{
    file.set_attribute("/", "format", format);
    file.set_attribute("/", "format_version", file_format_version);
    file.set_attribute("/", "created", utc_timestamp());
    file.set_attribute("/", "software", software_version());
    file.set_attribute("/", "config", attributes.config);
    file.set_attribute("/", "config_hash", attributes.config_hash);
    file.set_attribute("/", "source_digest", attributes.source_digest);
    file.set_attributes("/", attributes.extra);
}

std::string data_digest(const h5::File& file)
{
    std::vector<std::string> paths = file.datasets();
    std::erase_if(paths, [](const std::string& path) { return is_below(path, "/timing") || is_below(path, "/provenance"); });
    return digest_of_datasets(file, paths);
}

std::string data_digest(const std::string& path)
{
    return data_digest(h5::File::open(path));
}

} // namespace selm
