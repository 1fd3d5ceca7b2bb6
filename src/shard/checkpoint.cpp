#include "selm/shard/checkpoint.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>

#include <nlohmann/json.hpp>

#include "checkpoint_manifest.hpp"
#include "selm/base/attempt.hpp"
#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/base/hash.hpp"
#include "selm/base/log.hpp"
#include "selm/comm/agree.hpp"
#include "selm/h5/file.hpp"
#include "selm/h5/publish.hpp"

namespace selm {

namespace fs = std::filesystem;

namespace {

constexpr const char* state_format = "selm-checkpoint";
constexpr std::int64_t state_version = 1;

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

bool has(const FlatLayout& layout, const PartSlice& slice, const StateKind& kind)
{
    return kind.of_frozen || !layout.unit(slice.unit).frozen;
}

/// A slice of a rank's own shard, also where the rank holds the whole unit.
std::span<const float> own_values(const StateKind& kind, const ShardedAdamW& optimizer, const PartSlice& slice, int rank)
{
    const std::size_t skip = optimizer.layout().shard(slice.unit, rank).offset - optimizer.pieces()[slice.unit].offset;
    return kind.values(optimizer, slice.unit).subspan(skip + slice.piece_begin, slice.count);
}

std::string dataset_path(const ParameterSpec::Part& part, const char* kind)
{
    return cat("/parameters/", part.name, "/", kind);
}

std::string shape_text(const std::vector<std::int64_t>& shape)
{
    return nlohmann::json(shape).dump();
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

/// Size and structures of the state file, before HDF5 reads them: it is not made for damaged ones.
void check_structure(const std::string& path, const CheckpointManifest& manifest)
{
    std::error_code error;
    const auto found = fs::file_size(path, error);
    SELM_VALIDATE(!error, ExitCode::bad_data, path << " is missing (" << error.message() << ")");
    SELM_VALIDATE(found == static_cast<std::uintmax_t>(manifest.bytes), ExitCode::bad_data,
                  path << " has " << found << " bytes, its manifest says " << manifest.bytes);
    SELM_VALIDATE(checksum_outside(path, manifest.bytes, manifest.tensors) == manifest.structure_checksum,
                  ExitCode::bad_data, path << " is damaged (its structures do not agree with the manifest's checksum)");
}

/// Reads this rank's part of the optimizer's state. Does not communicate.
void read_state(const std::string& path, std::span<const ParameterSpec> parameters, const FlatLayout& layout,
                ShardedAdamW& optimizer)
{
    const h5::File file = h5::File::open(path);
    for (const PartSlice& slice : part_slices(parameters, layout, optimizer.pieces())) {
        SELM_VALIDATE(file.string_attribute(cat("/parameters/", slice.part->name), "shape") ==
                          shape_text(slice.part->shape),
                      ExitCode::bad_data, path << ": " << slice.part->name << " has another shape than the model's");
        for (const StateKind& kind : state_kinds)
            if (slice.count > 0 && has(layout, slice, kind))
                file.read_into(dataset_path(*slice.part, kind.name), h5::ElementType::float32,
                               static_cast<std::int64_t>(slice.part_begin), static_cast<std::int64_t>(slice.count),
                               kind.writable(optimizer, slice.unit).subspan(slice.piece_begin, slice.count).data());
    }
}

void check_binding(const CheckpointManifest& manifest, const std::string& path, const CheckpointBinding& binding)
{
    for (const auto& [name, value] : binding) {
        const auto stored = manifest.binding.find(name);
        const std::string found = stored == manifest.binding.end() ? "(nothing)" : stored->second;
        SELM_VALIDATE(found == value, ExitCode::bad_data,
                      path << " belongs to another run: its " << name << " is " << found << ", this run's is " << value
                           << " (going on would mix the two). Choose another --output, delete the checkpoints, or pass "
                              "--resume never");
    }
}

/// N of a file name "step-N" + ending; nothing for other names.
std::optional<std::int64_t> step_of(const std::string& name, const char* ending)
{
    long long step = 0;
    int used = 0;
    if (std::sscanf(name.c_str(), "step-%lld%n", &step, &used) != 1 || name.substr(static_cast<std::size_t>(used)) != ending)
        return std::nullopt;
    return step;
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
    for (const auto& entry : fs::directory_iterator(directory_, ignored))
        if (const auto step = step_of(entry.path().filename().string(), ".json"))
            steps.push_back(*step);
    std::sort(steps.rbegin(), steps.rend());
    return steps;
}

std::string CheckpointStore::newest() const
{
    const auto steps = steps_on_disk();
    return steps.empty() ? std::string() : stem(steps.front()) + ".json";
}

std::map<std::string, std::string> CheckpointStore::checksums(const ShardedAdamW& optimizer) const
{
    std::array<std::uint64_t, 3> sums{};
    for (const PartSlice& slice : part_slices(parameters_, layout_, rank_pieces(layout_, comm_.rank()))) {
        const std::uint64_t tensor = hash64(slice.part->name.data(), slice.part->name.size());
        for (std::size_t i = 0; i < state_kinds.size(); ++i)
            if (slice.count > 0 && has(layout_, slice, state_kinds[i]))
                sums[i] += element_checksum(tensor, slice.part_begin,
                                            own_values(state_kinds[i], optimizer, slice, comm_.rank()));
    }
    std::array<std::uint64_t, 3> total{};
    for (const auto& of_rank : all_gather_value(comm_, sums, "checkpoint checksums"))
        for (std::size_t i = 0; i < total.size(); ++i)
            total[i] += of_rank[i];
    std::map<std::string, std::string> named;
    for (std::size_t i = 0; i < state_kinds.size(); ++i)
        named[state_kinds[i].name] = hex(total[i]);
    return named;
}

void CheckpointStore::save(const CheckpointState& state, const CheckpointBinding& binding,
                           const ShardedAdamW& optimizer)
{
    const std::string manifest_path = stem(state.step) + ".json";
    const std::string h5_path = stem(state.step) + ".h5";
    agree(comm_, "checkpoint directory", [&] {
        if (!comm_.is_root())
            return;
        std::error_code error;
        fs::create_directories(directory_, error);
        SELM_VALIDATE(!error, ExitCode::io, "cannot create '" << directory_ << "' (" << error.message() << ")");
        check_newest_attempt(manifest_path);
        fs::remove(manifest_path, error); // the file that it describes is about to change
        remove_leftovers();
    });
    write_state(h5_path, state, optimizer); // on the disk, under its name
    const auto sums = checksums(optimizer);
    agree(comm_, "checkpoint manifest", [&] {
        if (!comm_.is_root())
            return;
        CheckpointManifest manifest;
        manifest.state = state;
        manifest.optimizer_steps = optimizer.steps_done();
        manifest.file = fs::path(h5_path).filename().string();
        manifest.bytes = static_cast<std::int64_t>(fs::file_size(h5_path));
        manifest.elements = checkpoint_elements(parameters_);
        manifest.checksums = sums;
        manifest.tensors = tensor_ranges(h5_path);
        manifest.structure_checksum = checksum_outside(h5_path, manifest.bytes, manifest.tensors);
        manifest.binding.insert(binding.begin(), binding.end());
        write_file_atomically(manifest_path, manifest.text()); // from here on the checkpoint exists
        std::erase(damaged_, state.step);
        remove_old();
    });
}

void CheckpointStore::write_state(const std::string& path, const CheckpointState& state,
                                  const ShardedAdamW& optimizer) const
{
    const auto slices = part_slices(parameters_, layout_, rank_pieces(layout_, comm_.rank()));
    h5::write_and_publish(path, comm_, [&](h5::File& file) {
        file.set_attributes(
            "/", {{"format", std::string(state_format)}, {"format_version", state_version}, {"step", state.step}});
        for (const PartSlice& slice : slices) {
            for (const StateKind& kind : state_kinds) {
                if (!has(layout_, slice, kind))
                    continue;
                const std::string dataset = dataset_path(*slice.part, kind.name);
                file.create_dataset(dataset, h5::ElementType::float32, {part_elements(*slice.part)});
                file.write_slab(dataset, static_cast<std::int64_t>(slice.part_begin),
                                own_values(kind, optimizer, slice, comm_.rank()));
            }
            file.set_attribute(cat("/parameters/", slice.part->name), "shape", shape_text(slice.part->shape));
        }
    });
}

void CheckpointStore::remove_old()
{
    std::vector<std::int64_t> steps = steps_on_disk();
    std::vector<std::int64_t> removed = std::move(damaged_); // a whole one has been written since
    damaged_.clear();
    std::erase_if(steps, [&](std::int64_t step) { return std::find(removed.begin(), removed.end(), step) != removed.end(); });
    if (steps.size() > static_cast<std::size_t>(keep_))
        removed.insert(removed.end(), steps.begin() + keep_, steps.end());
    std::error_code ignored; // one that cannot be removed does no harm
    for (const std::int64_t step : removed) {
        fs::remove(stem(step) + ".json", ignored); // first: without it the checkpoint does not exist
        fs::remove(stem(step) + ".h5", ignored);
    }
}

void CheckpointStore::remove_leftovers() const
{
    std::error_code ignored; // what cannot be removed does no harm
    std::vector<fs::path> leftovers;
    for (const auto& entry : fs::directory_iterator(directory_, ignored)) {
        const std::string name = entry.path().filename().string();
        const auto step = step_of(name, ".h5");
        const bool orphan = step && !fs::exists(stem(*step) + ".json", ignored);
        if (orphan || (name.starts_with("step-") && name.find(".partial-") != std::string::npos))
            leftovers.push_back(entry.path());
    }
    for (const fs::path& path : leftovers)
        fs::remove(path, ignored);
}

std::optional<CheckpointState> CheckpointStore::load_latest(const CheckpointBinding& binding, ShardedAdamW& optimizer)
{
    std::vector<std::int64_t> steps = comm_.is_root() ? steps_on_disk() : std::vector<std::int64_t>{};
    auto count = static_cast<std::int64_t>(steps.size());
    broadcast_value(comm_, count, 0, "number of checkpoints");
    steps.resize(static_cast<std::size_t>(count));
    comm_.broadcast(std::as_writable_bytes(std::span(steps)), 0, "checkpoints");
    std::string reason;
    for (const std::int64_t step : steps) {
        std::string why;
        if (auto state = load(step, binding, optimizer, why))
            return state;
        if (reason.empty())
            reason = why;
        damaged_.push_back(step);
        if (step != steps.back())
            SELM_LOG(warning, "checkpoint of step " << step << " cannot be used (" << why << "); trying the one before it");
    }
    SELM_VALIDATE(steps.empty(), ExitCode::bad_data,
                  "none of the " << count << " checkpoint(s) in " << directory_ << " can be used; the newest: " << reason
                                 << " (going on from nothing would silently do all steps again). Restore one of them, or pass "
                                    "--resume never to start anew");
    return std::nullopt;
}

std::optional<CheckpointState> CheckpointStore::load(std::int64_t step, const CheckpointBinding& binding,
                                                     ShardedAdamW& optimizer, std::string& why)
{
    const std::string path = stem(step) + ".json";
    CheckpointManifest manifest;
    try {
        manifest = CheckpointManifest::parse(root_string(comm_, "checkpoint manifest", [&] { return read_file(path); }), path);
        SELM_VALIDATE(manifest.state.step == step, ExitCode::bad_data, path << " describes step " << manifest.state.step);
    } catch (const Error& error) { // the same on every rank
        why = error.what();
        return std::nullopt;
    }
    check_binding(manifest, path, binding);
    const std::string h5_path = stem(step) + ".h5";
    try {
        agree(comm_, "checking a checkpoint", [&] {
            if (comm_.is_root())
                check_structure(h5_path, manifest);
        });
        agree(comm_, "reading a checkpoint", [&] { read_state(h5_path, parameters_, layout_, optimizer); });
        for (const auto& [kind, sum] : checksums(optimizer))
            SELM_VALIDATE(manifest.checksums.contains(kind) && manifest.checksums.at(kind) == sum, ExitCode::bad_data,
                          h5_path << " is damaged (the values of " << kind << " do not agree with the manifest's checksum)");
    } catch (const Error& error) {
        if (error.code() == ExitCode::internal) // out of memory, say: no fault of the file
            throw;
        why = error.what();
        optimizer.reset();
        return std::nullopt;
    }
    optimizer.set_steps_done(manifest.optimizer_steps);
    return manifest.state;
}

} // namespace selm
