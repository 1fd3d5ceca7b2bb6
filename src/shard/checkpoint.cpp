#include "selm/shard/checkpoint.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <map>

#include <nlohmann/json.hpp>

#include "selm/base/attempt.hpp"
#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/base/hash.hpp"
#include "selm/base/log.hpp"
#include "selm/base/provenance.hpp"
#include "selm/comm/agree.hpp"
#include "selm/h5/file.hpp"
#include "selm/h5/publish.hpp"

namespace selm {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr const char* checkpoint_format = "selm-checkpoint";
constexpr std::int64_t checkpoint_version = 1;

/// The three kinds of numbers of the optimizer's state, by the name of their datasets; frozen units have weights alone.
struct StateKind {
    const char* name;
    std::span<const float> (*values)(const ShardedAdamW& optimizer, std::size_t unit);
    std::span<float> (*writable)(ShardedAdamW& optimizer, std::size_t unit);
    bool of_frozen;
};

constexpr std::array<StateKind, 3> state_kinds{
    StateKind{"fp32", [](const ShardedAdamW& o, std::size_t unit) { return o.master(unit); },
              [](ShardedAdamW& o, std::size_t unit) { return o.master(unit); }, true},
    StateKind{"exp_avg", [](const ShardedAdamW& o, std::size_t unit) { return o.exp_avg(unit); },
              [](ShardedAdamW& o, std::size_t unit) { return o.exp_avg(unit); }, false},
    StateKind{"exp_avg_sq", [](const ShardedAdamW& o, std::size_t unit) { return o.exp_avg_sq(unit); },
              [](ShardedAdamW& o, std::size_t unit) { return o.exp_avg_sq(unit); }, false}};

/// A rank's own shard of a unit, also where it holds the whole unit.
std::span<const float> own_values(const StateKind& kind, const ShardedAdamW& optimizer, std::size_t unit, int rank)
{
    const ShardInfo own = optimizer.layout().shard(unit, rank);
    return kind.values(optimizer, unit).subspan(own.offset - optimizer.pieces()[unit].offset, own.size);
}

std::string dataset_path(const ParameterSpec::Part& part, const char* kind)
{
    return cat("/parameters/", part.name, "/", kind);
}

std::string shape_text(const std::vector<std::int64_t>& shape)
{
    return json(shape).dump();
}

/// Sum over blocks of hash(block) mixed with the block's place: independent of how the blocks are dealt to ranks.
std::uint64_t block_checksum(std::span<const float> values, std::size_t first_element, std::size_t block)
{
    std::uint64_t sum = 0;
    for (std::size_t begin = 0; begin < values.size(); begin += block) {
        const auto part = values.subspan(begin, std::min(block, values.size() - begin));
        const std::array<std::uint64_t, 2> placed{hash64(part.data(), part.size_bytes()),
                                                  (first_element + begin) / block};
        sum += hash64(placed.data(), sizeof placed);
    }
    return sum;
}

std::string hex(std::uint64_t value)
{
    char text[17];
    std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
    return text;
}

std::int64_t part_elements(const ParameterSpec::Part& part)
{
    std::int64_t elements = 1;
    for (const std::int64_t dimension : part.shape)
        elements *= dimension;
    return elements;
}

std::int64_t checkpoint_elements(std::span<const ParameterSpec> parameters)
{
    std::int64_t elements = 0;
    for (const ParameterSpec& parameter : parameters)
        elements += parameter.elements();
    return elements;
}

/// @throws Error bad_data. Every rank parses the same text, so all come to the same result.
json parse_manifest(const std::string& text, const std::string& path)
{
    try {
        json manifest = json::parse(text);
        SELM_VALIDATE(manifest.at("format") == checkpoint_format && manifest.at("format_version") == checkpoint_version,
                      ExitCode::bad_data, path << " is not a checkpoint manifest of this version");
        for (const char* key : {"step", "epoch", "epoch_step", "optimizer_steps", "bytes"})
            (void)manifest.at(key).get<std::int64_t>();
        (void)manifest.at("checksums").get<std::map<std::string, std::string>>();
        (void)manifest.at("binding").get<std::map<std::string, std::string>>();
        return manifest;
    } catch (const json::exception& error) {
        throw data_error(cat(path, " is damaged (", error.what(), ")"));
    }
}

/// Reads this rank's part of the optimizer's state. Does not communicate.
void read_state(const std::string& path, std::int64_t bytes, std::span<const ParameterSpec> parameters,
                const FlatLayout& layout, ShardedAdamW& optimizer)
{
    std::error_code error;
    const auto found = fs::file_size(path, error);
    SELM_VALIDATE(!error && found == static_cast<std::uintmax_t>(bytes), ExitCode::bad_data,
                  path << " is missing or does not have the size that its manifest tells");
    const h5::File file = h5::File::open(path);
    for (const PartSlice& slice : part_slices(parameters, layout, optimizer.pieces())) {
        SELM_VALIDATE(file.string_attribute(cat("/parameters/", slice.part->name), "shape") ==
                          shape_text(slice.part->shape),
                      ExitCode::bad_data, path << ": " << slice.part->name << " has another shape than the model's");
        for (const StateKind& kind : state_kinds) {
            if (slice.count == 0 || (layout.unit(slice.unit).frozen && !kind.of_frozen))
                continue;
            file.read_into(dataset_path(*slice.part, kind.name), h5::ElementType::float32,
                           static_cast<std::int64_t>(slice.part_begin), static_cast<std::int64_t>(slice.count),
                           kind.writable(optimizer, slice.unit).subspan(slice.piece_begin, slice.count).data());
        }
    }
}

void check_binding(const json& manifest, const std::string& path, const CheckpointBinding& binding)
{
    const json& stored = manifest.at("binding");
    for (const auto& [name, value] : binding) {
        const std::string found = stored.value(name, std::string("(nothing)"));
        SELM_VALIDATE(found == value, ExitCode::bad_data,
                      path << " belongs to another run: its " << name << " is " << found << ", this run's is " << value
                           << " (going on would mix the two). Choose another --output, delete the checkpoints, or pass "
                              "--resume never");
    }
}

} // namespace

CheckpointStore::CheckpointStore(std::string directory, std::int64_t keep, std::span<const ParameterSpec> parameters,
                                 const FlatLayout& layout, Communicator& comm)
    : directory_(std::move(directory)), keep_(std::max<std::int64_t>(1, keep)), parameters_(parameters),
      layout_(layout), comm_(comm)
{
}

std::string CheckpointStore::stem(std::int64_t step) const
{
    char name[32];
    std::snprintf(name, sizeof name, "step-%06lld", static_cast<long long>(step));
    return directory_ + "/" + name;
}

std::vector<std::int64_t> CheckpointStore::steps_on_disk() const
{
    std::vector<std::int64_t> steps;
    std::error_code ignored; // a directory that is not there holds no checkpoints
    for (const auto& entry : fs::directory_iterator(directory_, ignored)) {
        const std::string name = entry.path().filename().string();
        long long step = 0;
        int used = 0;
        if (std::sscanf(name.c_str(), "step-%lld.json%n", &step, &used) == 1 &&
            static_cast<std::size_t>(used) == name.size())
            steps.push_back(step);
    }
    std::sort(steps.rbegin(), steps.rend());
    return steps;
}

std::string CheckpointStore::newest() const
{
    const auto steps = steps_on_disk();
    return steps.empty() ? std::string() : stem(steps.front()) + ".json";
}

std::vector<std::string> CheckpointStore::checksums(const ShardedAdamW& optimizer) const
{
    std::array<std::uint64_t, 3> sums{};
    for (std::size_t u = 0; u < layout_.units(); ++u) {
        const ShardInfo own = layout_.shard(u, comm_.rank());
        for (std::size_t i = 0; i < state_kinds.size(); ++i)
            if (!layout_.unit(u).frozen || state_kinds[i].of_frozen)
                sums[i] += block_checksum(own_values(state_kinds[i], optimizer, u, comm_.rank()), own.offset, layout_.alignment());
    }
    std::array<std::uint64_t, 3> total{};
    for (const auto& of_rank : all_gather_value(comm_, sums, "checkpoint checksums"))
        for (std::size_t i = 0; i < total.size(); ++i)
            total[i] += of_rank[i];
    return {hex(total[0]), hex(total[1]), hex(total[2])};
}

void CheckpointStore::save(const CheckpointState& state, const CheckpointBinding& binding,
                           const ShardedAdamW& optimizer)
{
    const std::string manifest_path = stem(state.step) + ".json";
    agree(comm_, "checkpoint directory", [&] {
        if (!comm_.is_root())
            return;
        std::error_code error;
        fs::create_directories(directory_, error);
        SELM_VALIDATE(!error, ExitCode::io, "cannot create '" << directory_ << "' (" << error.message() << ")");
        check_newest_attempt(manifest_path);
        fs::remove(manifest_path, error); // the file that it describes is about to change
    });
    write_state(stem(state.step) + ".h5", state, optimizer);
    const auto sums = checksums(optimizer);
    agree(comm_, "checkpoint manifest", [&] {
        if (!comm_.is_root())
            return;
        const std::string h5_path = stem(state.step) + ".h5";
        json manifest{{"format", checkpoint_format},
                      {"format_version", checkpoint_version},
                      {"step", state.step},
                      {"epoch", state.epoch},
                      {"epoch_step", state.epoch_step},
                      {"optimizer_steps", optimizer.steps_done()},
                      {"file", fs::path(h5_path).filename().string()},
                      {"bytes", fs::file_size(h5_path)},
                      {"elements", checkpoint_elements(parameters_)},
                      {"created", utc_timestamp()},
                      {"software", software_version()}};
        for (std::size_t i = 0; i < state_kinds.size(); ++i)
            manifest["checksums"][state_kinds[i].name] = sums[i];
        manifest["binding"] = json::object();
        for (const auto& [name, value] : binding)
            manifest["binding"][name] = value;
        write_file_atomically(manifest_path, manifest.dump(2) + "\n");
        remove_old();
    });
}

void CheckpointStore::write_state(const std::string& path, const CheckpointState& state,
                                  const ShardedAdamW& optimizer) const
{
    const auto own = rank_pieces(layout_, comm_.rank());
    const auto slices = part_slices(parameters_, layout_, own);
    h5::write_and_publish(path, comm_, [&](h5::File& file) {
        file.set_attributes(
            "/",
            {{"format", std::string(checkpoint_format)}, {"format_version", checkpoint_version}, {"step", state.step}});
        for (const PartSlice& slice : slices) {
            for (const StateKind& kind : state_kinds) {
                if (layout_.unit(slice.unit).frozen && !kind.of_frozen)
                    continue;
                const std::string dataset = dataset_path(*slice.part, kind.name);
                file.create_dataset(dataset, h5::ElementType::float32, {part_elements(*slice.part)});
                file.write_slab(dataset, static_cast<std::int64_t>(slice.part_begin),
                                own_values(kind, optimizer, slice.unit, comm_.rank()).subspan(slice.piece_begin, slice.count));
            }
            file.set_attribute(cat("/parameters/", slice.part->name), "shape", shape_text(slice.part->shape));
        }
    });
}

void CheckpointStore::remove_old() const
{
    const auto steps = steps_on_disk();
    std::error_code ignored; // one that cannot be removed does no harm
    for (std::size_t i = static_cast<std::size_t>(keep_); i < steps.size(); ++i) {
        fs::remove(stem(steps[i]) + ".json", ignored); // first: without it the checkpoint does not exist
        fs::remove(stem(steps[i]) + ".h5", ignored);
    }
}

std::optional<CheckpointState> CheckpointStore::load_latest(const CheckpointBinding& binding, ShardedAdamW& optimizer)
{
    std::vector<std::int64_t> steps = comm_.is_root() ? steps_on_disk() : std::vector<std::int64_t>{};
    auto count = static_cast<std::int64_t>(steps.size());
    broadcast_value(comm_, count, 0, "number of checkpoints");
    steps.resize(static_cast<std::size_t>(count));
    comm_.broadcast(std::as_writable_bytes(std::span(steps)), 0, "checkpoints");
    for (const std::int64_t step : steps)
        if (auto state = load(step, binding, optimizer))
            return state;
    return std::nullopt;
}

std::optional<CheckpointState> CheckpointStore::load(std::int64_t step, const CheckpointBinding& binding,
                                                     ShardedAdamW& optimizer)
{
    const std::string path = stem(step) + ".json";
    json manifest;
    try {
        manifest = parse_manifest(root_string(comm_, "checkpoint manifest", [&] { return read_file(path); }), path);
    } catch (const Error& error) {
        SELM_LOG(warning,
                 "checkpoint of step " << step << " cannot be used (" << error.what() << "); trying an older one");
        return std::nullopt;
    }
    check_binding(manifest, path, binding);
    try {
        agree(comm_, "reading a checkpoint", [&] {
            read_state(stem(step) + ".h5", manifest["bytes"].get<std::int64_t>(), parameters_, layout_, optimizer);
        });
        const auto sums = checksums(optimizer);
        for (std::size_t i = 0; i < state_kinds.size(); ++i)
            SELM_VALIDATE(manifest["checksums"].value(state_kinds[i].name, std::string()) == sums[i],
                          ExitCode::bad_data,
                          stem(step) << ".h5: the checksum of " << state_kinds[i].name
                                     << " does not agree with the manifest");
    } catch (const Error& error) {
        SELM_LOG(warning,
                 "checkpoint of step " << step << " cannot be used (" << error.what() << "); trying an older one");
        optimizer.reset();
        return std::nullopt;
    }
    optimizer.set_steps_done(manifest["optimizer_steps"].get<std::int64_t>());
    return CheckpointState{manifest["step"].get<std::int64_t>(), manifest["epoch"].get<std::int64_t>(),
                           manifest["epoch_step"].get<std::int64_t>()};
}

} // namespace selm
