#include "checkpoint_manifest.hpp"

#include <algorithm>
#include <bit>
#include <fstream>

#include <nlohmann/json.hpp>

#include "selm/base/error.hpp"
#include "selm/base/hash.hpp"
#include "selm/base/provenance.hpp"
#include "selm/h5/file.hpp"

namespace selm {

using nlohmann::json;

namespace {

constexpr const char* manifest_format = "selm-checkpoint";
constexpr std::int64_t manifest_version = 2;
constexpr const char* own_checksum = "manifest_checksum";

/// The finaliser of splitmix64 (Steele, Lea & Flood 2014): a bijection of 64-bit numbers.
std::uint64_t mix(std::uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

} // namespace

std::uint64_t element_checksum(std::uint64_t tensor, std::size_t first_element, std::span<const float> values)
{
    std::uint64_t sum = 0;
    for (std::size_t i = 0; i < values.size(); ++i)
        sum += mix(tensor + (static_cast<std::uint64_t>(first_element + i) << 32) + std::bit_cast<std::uint32_t>(values[i]));
    return sum;
}

std::vector<ByteRange> tensor_ranges(const std::string& h5_path)
{
    const h5::File file = h5::File::open(h5_path);
    std::vector<ByteRange> ranges;
    for (const std::string& dataset : file.datasets())
        if (const ByteRange range = file.extent(dataset); range.second > 0)
            ranges.push_back(range);
    std::sort(ranges.begin(), ranges.end());
    std::vector<ByteRange> joined;
    for (const ByteRange& range : ranges) {
        if (!joined.empty() && joined.back().first + joined.back().second == range.first)
            joined.back().second += range.second;
        else
            joined.push_back(range);
    }
    return joined;
}

std::string checksum_outside(const std::string& path, std::int64_t bytes, const std::vector<ByteRange>& ranges)
{
    std::ifstream file(path, std::ios::binary);
    Hasher hasher;
    std::vector<char> block(std::size_t{1} << 16);
    std::int64_t at = 0;
    const auto take = [&](std::int64_t end) {
        file.seekg(at);
        while (at < end && file) {
            const auto count = std::min<std::int64_t>(static_cast<std::int64_t>(block.size()), end - at);
            file.read(block.data(), count);
            hasher.update(block.data(), static_cast<std::size_t>(count));
            at += count;
        }
    };
    for (const auto& [begin, length] : ranges) {
        SELM_VALIDATE(begin >= at && length >= 0 && begin + length <= bytes, ExitCode::bad_data,
                      path << ": its manifest places tensors outside of it");
        take(begin);
        at = begin + length;
    }
    take(bytes);
    SELM_VALIDATE(!file.fail(), ExitCode::bad_data, path << " cannot be read");
    return hasher.hex();
}

std::string CheckpointManifest::text() const
{
    json manifest{{"format", manifest_format},
                  {"format_version", manifest_version},
                  {"step", state.step},
                  {"epoch", state.epoch},
                  {"epoch_step", state.epoch_step},
                  {"numerics", state.numerics},
                  {"optimizer_steps", optimizer_steps},
                  {"file", file},
                  {"bytes", bytes},
                  {"elements", elements},
                  {"checksums", checksums},
                  {"tensors", tensors},
                  {"structure_checksum", structure_checksum},
                  {"binding", binding},
                  {"created", utc_timestamp()},
                  {"software", software_version()}};
    manifest[own_checksum] = hash_hex(manifest.dump());
    return manifest.dump(1) + "\n";
}

CheckpointManifest CheckpointManifest::parse(const std::string& text, const std::string& path)
{
    try {
        json stored = json::parse(text);
        SELM_VALIDATE(stored.at("format") == manifest_format && stored.at("format_version") == manifest_version,
                      ExitCode::bad_data, path << " is not a checkpoint manifest of this version");
        const auto checksum = stored.at(own_checksum).get<std::string>();
        stored.erase(own_checksum);
        SELM_VALIDATE(hash_hex(stored.dump()) == checksum, ExitCode::bad_data,
                      path << " is damaged (its content does not agree with its checksum)");
        CheckpointManifest manifest;
        manifest.state = {.step = stored.at("step").get<std::int64_t>(),
                          .epoch = stored.at("epoch").get<std::int64_t>(),
                          .epoch_step = stored.at("epoch_step").get<std::int64_t>(),
                          .numerics = stored.value("numerics", std::string())};
        manifest.optimizer_steps = stored.at("optimizer_steps").get<std::int64_t>();
        manifest.file = stored.at("file").get<std::string>();
        manifest.bytes = stored.at("bytes").get<std::int64_t>();
        manifest.elements = stored.at("elements").get<std::int64_t>();
        stored.at("checksums").get_to(manifest.checksums);
        stored.at("tensors").get_to(manifest.tensors);
        manifest.structure_checksum = stored.at("structure_checksum").get<std::string>();
        stored.at("binding").get_to(manifest.binding);
        return manifest;
    } catch (const json::exception& error) {
        throw data_error(cat(path, " is damaged (", error.what(), ")"));
    }
}

} // namespace selm
