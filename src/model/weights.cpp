#include "selm/model/weights.hpp"

#include <algorithm>
#include <utility>

#include "selm/base/error.hpp"
#include "selm/model/model_files.hpp"

namespace selm {
namespace {

constexpr std::int64_t alignment = 16; // f32 elements: 64 bytes

std::int64_t aligned(std::int64_t elements) { return (elements + alignment - 1) / alignment * alignment; }

/// Norm gains and the embedding are used as they are; all else is multiplied with, in the engine's packing.
bool is_dense(const DecoderConfig& config, std::int64_t parameter)
{
    if (parameter == ParameterIndex::embedding || parameter == ParameterIndex::final_norm(config))
        return true;
    const std::int64_t last_layer = ParameterIndex::down(config.layers - 1);
    return parameter <= last_layer && ((parameter - 1) % 6 == 0 || (parameter - 1) % 6 == 3);
}

/// Where each parameter lies in one block of f32 elements. The entry after the last parameter is the packed embedding of a
/// tied head; a size of 0 there means that the engine multiplies with the embedding itself. A device's engine makes its own
/// copy of what it multiplies with: only the embedding and the norms are in the block.
struct BlockLayout {
    struct Place {
        std::int64_t begin = 0;
        std::int64_t elements = 0;
        bool packed = false;
    };
    std::vector<Place> places;
    std::int64_t total = 0;

    enum class Holds { everything, panels };

    BlockLayout(const DecoderConfig& config, const Engine& engine, std::span<const ParameterSpec> specs, bool with_backward,
                DType embedding, Holds holds)
    {
        for (std::size_t i = 0; i < specs.size(); ++i) {
            const ParameterSpec& spec = specs[i];
            const bool dense = is_dense(config, static_cast<std::int64_t>(i));
            const std::int64_t packed = dense ? 0 : engine.packed_elements(spec.rows, spec.columns, with_backward);
            const bool in_place = holds == Holds::everything && (dense || engine.device() == Device::cpu);
            const bool halves = i == ParameterIndex::embedding && embedding == DType::bf16;
            add(packed > 0 ? packed : in_place ? (spec.elements() + halves) / (halves ? 2 : 1) : 0, packed > 0);
        }
        const bool tied = ParameterIndex::head(config) == ParameterIndex::embedding;
        const std::int64_t head = tied ? engine.packed_elements(config.vocabulary, config.hidden, with_backward) : 0;
        add(head, head > 0);
    }
    void add(std::int64_t elements, bool packed)
    {
        places.push_back({total, elements, packed});
        total += aligned(elements);
    }
};

/// Type of the embedding in memory that is read from a checkpoint: each rank looks up a few rows, so that it need not be
/// expanded to f32.
DType embedding_dtype(const Engine& engine, DType dtype) { return engine.device() == Device::cpu ? dtype : DType::f32; }

/// Reads a parameter into f32 [rows, columns].
void read_parameter(const SafetensorsReader& reader, const ParameterSpec& spec, DType dtype, std::span<float> out)
{
    read_model_parameter(reader, spec, out);
    if (dtype == DType::bf16)
        round_to_bf16(out);
}

/// Reads a parameter into bf16 [rows, columns].
void read_bf16(const SafetensorsReader& reader, const ParameterSpec& spec, std::uint16_t* out)
{
    constexpr std::int64_t most = std::int64_t{1} << 20;
    std::vector<float> block(static_cast<std::size_t>(std::min(most, spec.elements())));
    for (const ParameterSpec::Part& part : spec.parts) {
        const std::int64_t elements = part.rows * spec.columns;
        for (std::int64_t begin = 0; begin < elements; begin += most) {
            const auto values = std::span(block).first(static_cast<std::size_t>(std::min(most, elements - begin)));
            reader.read_f32(part.name, part.shape, begin, values);
            std::transform(values.begin(), values.end(), out + part.row_begin * spec.columns + begin, float_to_bf16);
        }
    }
}

/// Room for one parameter on its way from the checkpoint into the engine's packing.
struct LoadBuffer {
    std::vector<float> f32;
    std::vector<std::uint16_t> bf16;
};

/// A parameter's values, f32 or bf16: where they lie in the mapped file if they can be used as they are there, otherwise in
/// the buffer. The output head of a large vocabulary alone takes gigabytes.
Tensor parameter_values(const SafetensorsReader& reader, const ParameterSpec& spec, DType dtype, LoadBuffer& buffer)
{
    if (spec.parts.size() == 1) {
        const Tensor view = reader.view(spec.parts[0].name, spec.parts[0].shape);
        if (!view.empty() && (view.dtype == DType::bf16 || dtype == DType::f32))
            return view;
    }
    if (dtype == DType::bf16) {
        buffer.bf16.resize(static_cast<std::size_t>(spec.elements()));
        read_bf16(reader, spec, buffer.bf16.data());
        return {nullptr, buffer.bf16.data(), spec.rows, spec.columns, spec.columns, DType::bf16, Device::cpu};
    }
    buffer.f32.resize(static_cast<std::size_t>(spec.elements()));
    read_model_parameter(reader, spec, buffer.f32);
    return borrow_f32(buffer.f32.data(), spec.rows, spec.columns);
}

/// Shape alone, for a handle to panels that another rank filled.
Tensor shape_only(const ParameterSpec& spec)
{
    return {nullptr, nullptr, spec.rows, spec.columns, spec.columns, DType::f32, Device::cpu};
}

} // namespace

struct ResidentWeights::Impl {
    Impl(const DecoderConfig& model, Engine& used_engine, const Options& used_options, DType embedding,
         BlockLayout::Holds holds)
        : config(model), engine(used_engine), options(used_options), specs(decoder_parameters(model)),
          layout(model, used_engine, specs, used_options.with_backward, embedding, holds), layers(static_cast<std::size_t>(model.layers))
    {
    }

    DecoderConfig config;
    Engine& engine;
    Options options;
    std::vector<ParameterSpec> specs;
    BlockLayout layout;
    std::vector<Tensor> flat; ///< parameters of the caller; empty when read from a checkpoint
    std::vector<Tensor> device_copies; ///< of dense flat parameters
    std::vector<Tensor> panels; ///< storage of packed parameters of the flat form
    Tensor block;               ///< storage of everything when read from a checkpoint; panels that several parts fill

    std::vector<LayerWeights> layers;
    Tensor embedding;
    Tensor final_norm;
    PackedWeight head;

    std::int64_t head_index() const { return ParameterIndex::head(config); }
    bool is_mine(std::int64_t parameter) const { return parameter % options.parts == options.part; }
    bool tied() const { return head_index() == ParameterIndex::embedding; }

    Tensor carve(std::size_t place, std::int64_t rows, std::int64_t columns, DType dtype = DType::f32) const
    {
        Tensor view = block;
        view.dtype = dtype;
        view.data = block.f32() + layout.places[place].begin;
        view.rows = rows;
        view.columns = view.stride = columns;
        return view;
    }

    void set_dense(std::int64_t parameter, const Tensor& values)
    {
        if (parameter == ParameterIndex::embedding)
            embedding = values;
        else if (parameter == ParameterIndex::final_norm(config))
            final_norm = values;
        else if ((parameter - 1) % 6 == 0)
            layers[static_cast<std::size_t>((parameter - 1) / 6)].input_norm = values;
        else
            layers[static_cast<std::size_t>((parameter - 1) / 6)].post_norm = values;
    }
    void set_linear(std::int64_t parameter, PackedWeight weight)
    {
        if (parameter == head_index()) {
            head = std::move(weight);
            return;
        }
        LayerWeights& layer = layers[static_cast<std::size_t>((parameter - 1) / 6)];
        const std::int64_t which = (parameter - 1) % 6;
        PackedWeight& place = which == 1 ? layer.qkv : which == 2 ? layer.out : which == 4 ? layer.gate_up : layer.down;
        place = std::move(weight);
    }

    void load(const SafetensorsReader& reader);
    void load_one(const SafetensorsReader& reader, std::size_t index, LoadBuffer& buffer);
    Tensor place_of(std::size_t index) const;
    void load_in_place(const SafetensorsReader& reader, std::size_t index, LoadBuffer& buffer);
    Tensor on_device(std::size_t index);
    void pack_flat();
};

/// Where values stand that the engine uses unpacked.
Tensor ResidentWeights::Impl::place_of(std::size_t index) const
{
    const bool is_embedding = static_cast<std::int64_t>(index) == ParameterIndex::embedding;
    return carve(index, specs[index].rows, specs[index].columns,
                 is_embedding ? embedding_dtype(engine, options.dtype) : DType::f32);
}

void ResidentWeights::Impl::load_in_place(const SafetensorsReader& reader, std::size_t index, LoadBuffer& buffer)
{
    const ParameterSpec& spec = specs[index];
    const Tensor place = place_of(index);
    if (place.dtype == DType::bf16) {
        read_bf16(reader, spec, place.bf16());
    } else if (engine.device() == Device::cpu) {
        read_parameter(reader, spec, options.dtype, {place.f32(), static_cast<std::size_t>(spec.elements())});
    } else {
        buffer.f32.resize(static_cast<std::size_t>(spec.elements()));
        read_parameter(reader, spec, options.dtype, buffer.f32);
        engine.copy_from_host(buffer.f32.data(), place);
    }
}

void ResidentWeights::Impl::load_one(const SafetensorsReader& reader, std::size_t index, LoadBuffer& buffer)
{
    const auto parameter = static_cast<std::int64_t>(index);
    const ParameterSpec& spec = specs[index];
    const bool mine = is_mine(parameter);
    const BlockLayout::Place& place = layout.places[index];
    Tensor values = shape_only(spec);
    if (!place.packed && place.elements > 0) {
        values = place_of(index);
        if (mine)
            load_in_place(reader, index, buffer);
    } else if (mine) {
        values = parameter_values(reader, spec, options.dtype, buffer);
    }
    if (is_dense(config, parameter)) {
        set_dense(parameter, values);
    } else {
        const Tensor storage = place.packed ? carve(index, 1, place.elements) : Tensor{};
        set_linear(parameter, engine.pack(values, options.with_backward, storage, !mine));
    }
    if (parameter == ParameterIndex::embedding && tied()) {
        const BlockLayout::Place& packed = layout.places.back();
        const Tensor storage = packed.packed ? carve(layout.places.size() - 1, 1, packed.elements) : Tensor{};
        head = engine.pack(values, options.with_backward, storage, !mine);
    }
}

void ResidentWeights::Impl::load(const SafetensorsReader& reader)
{
    LoadBuffer buffer;
    for (std::size_t i = 0; i < specs.size(); ++i)
        load_one(reader, i, buffer);
}

/// A flat parameter where the engine can use it: as it is, or copied to the engine's device.
Tensor ResidentWeights::Impl::on_device(std::size_t index)
{
    if (engine.device() == Device::cpu)
        return flat[index];
    device_copies.resize(flat.size());
    Tensor& copy = device_copies[index];
    if (copy.empty())
        copy = engine.allocate(specs[index].rows, specs[index].columns, DType::f32);
    engine.copy_from_host(flat[index].data, copy);
    return copy;
}

void ResidentWeights::Impl::pack_flat()
{
    panels.resize(layout.places.size());
    const auto storage_of = [&](std::size_t place) {
        const BlockLayout::Place& needed = layout.places[place];
        if (needed.packed && !block.empty())
            return carve(place, 1, needed.elements);
        if (needed.packed && panels[place].empty())
            panels[place] = engine.allocate(1, needed.elements, DType::f32);
        return panels[place];
    };
    for (std::size_t i = 0; i < specs.size(); ++i) {
        const auto parameter = static_cast<std::int64_t>(i);
        if (is_dense(config, parameter))
            set_dense(parameter, on_device(i));
        else
            set_linear(parameter, engine.pack(flat[i], options.with_backward, storage_of(i), !is_mine(parameter)));
    }
    if (tied())
        head = engine.pack(flat[0], options.with_backward, storage_of(layout.places.size() - 1), !is_mine(0));
}

std::int64_t ResidentWeights::memory_elements(const DecoderConfig& config, const Engine& engine, bool with_backward,
                                              DType dtype)
{
    if (engine.device() != Device::cpu)
        return 0;
    return BlockLayout(config, engine, decoder_parameters(config), with_backward, embedding_dtype(engine, dtype),
                       BlockLayout::Holds::everything)
        .total;
}

std::int64_t ResidentWeights::panel_elements(const DecoderConfig& config, const Engine& engine, bool with_backward)
{
    return BlockLayout(config, engine, decoder_parameters(config), with_backward, DType::f32, BlockLayout::Holds::panels).total;
}

ResidentWeights::ResidentWeights(const DecoderConfig& config, Engine& engine, const SafetensorsReader& reader,
                                 const Options& options, const Tensor& memory)
    : impl_(std::make_unique<Impl>(config, engine, options, embedding_dtype(engine, options.dtype),
                                   BlockLayout::Holds::everything))
{
    SELM_EXPECT(options.parts >= 1 && options.part >= 0 && options.part < options.parts);
    if (engine.device() != Device::cpu) { // every rank has a device, and all weights on it
        impl_->options.part = 0;
        impl_->options.parts = 1;
        impl_->block = engine.allocate(1, impl_->layout.total, DType::f32);
    } else {
        SELM_EXPECT(!memory.empty() || options.parts == 1); // parts are filled by several ranks: the memory must be shared
        impl_->block = memory.empty() ? engine.allocate(1, impl_->layout.total, DType::f32) : memory;
        SELM_EXPECT(impl_->block.rows * impl_->block.columns >= impl_->layout.total);
    }
    impl_->load(reader);
}

ResidentWeights::ResidentWeights(const DecoderConfig& config, Engine& engine, std::vector<Tensor> parameters,
                                 const Options& options, const Tensor& panels)
    : impl_(std::make_unique<Impl>(config, engine, options, DType::f32, BlockLayout::Holds::panels))
{
    SELM_EXPECT(parameters.size() == impl_->specs.size());
    SELM_EXPECT(options.parts >= 1 && options.part >= 0 && options.part < options.parts);
    SELM_EXPECT(!panels.empty() || options.parts == 1); // parts are filled by several ranks: the memory must be shared
    SELM_EXPECT(panels.empty() || panels.rows * panels.columns >= impl_->layout.total);
    impl_->block = panels;
    for (std::size_t i = 0; i < parameters.size(); ++i)
        SELM_EXPECT(parameters[i].rows == impl_->specs[i].rows && parameters[i].columns == impl_->specs[i].columns);
    impl_->flat = std::move(parameters);
    impl_->pack_flat();
}

ResidentWeights::~ResidentWeights() = default;

void ResidentWeights::refresh()
{
    SELM_EXPECT(!impl_->flat.empty());
    impl_->pack_flat();
}

const LayerWeights& ResidentWeights::layer(std::int64_t index, WeightUse use)
{
    SELM_EXPECT(index >= 0 && index < impl_->config.layers);
    SELM_EXPECT(use == WeightUse::forward || impl_->options.with_backward);
    return impl_->layers[static_cast<std::size_t>(index)];
}
const Tensor& ResidentWeights::embedding() { return impl_->embedding; }
const Tensor& ResidentWeights::final_norm() { return impl_->final_norm; }

const PackedWeight& ResidentWeights::head(WeightUse use)
{
    SELM_EXPECT(use == WeightUse::forward || impl_->options.with_backward);
    return impl_->head;
}

std::vector<std::int64_t> decoder_parameter_groups(const DecoderConfig& config)
{
    std::vector<std::int64_t> ends = {ParameterIndex::embedding + 1};
    for (std::int64_t layer = 0; layer < config.layers; ++layer)
        ends.push_back(ParameterIndex::down(layer) + 1);
    ends.push_back(ParameterIndex::final_norm(config) + (config.sequence_classifier ? 2 : 1));
    if (!config.sequence_classifier && !config.tied_embeddings)
        ends.push_back(ParameterIndex::head(config) + 1);
    return ends;
}

} // namespace selm
