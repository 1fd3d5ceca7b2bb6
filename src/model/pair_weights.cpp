#include "pair_weights.hpp"

#include <utility>

#include "selm/base/error.hpp"

namespace selm {
namespace {

constexpr std::int64_t alignment = 16; // f32 elements: 64 bytes

/// Projections and the head's layers are multiplied with; biases, norms and embeddings are used as they are.
bool is_packed(const DebertaConfig& config, std::int64_t parameter)
{
    if (parameter == PairParameterIndex::head_hidden_weight(config) ||
        parameter == PairParameterIndex::head_output_weight(config))
        return true;
    if (parameter < PairParameterIndex::layer(0, DebertaLayerParameter::query_weight) ||
        parameter >= PairParameterIndex::head(config))
        return false;
    switch (static_cast<DebertaLayerParameter>((parameter - PairParameterIndex::layer(0, {})) %
                                               static_cast<std::int64_t>(DebertaLayerParameter::count))) {
    case DebertaLayerParameter::query_weight:
    case DebertaLayerParameter::key_weight:
    case DebertaLayerParameter::value_weight:
    case DebertaLayerParameter::attention_output_weight:
    case DebertaLayerParameter::intermediate_weight:
    case DebertaLayerParameter::output_weight:
        return true;
    default:
        return false;
    }
}

/// f32 elements of one block that a parameter takes. A device's engine makes its own copy of what it multiplies with.
std::int64_t block_elements(const DebertaConfig& config, const Engine& engine, const ParameterSpec& spec,
                            std::int64_t parameter, bool with_backward)
{
    if (!is_packed(config, parameter))
        return spec.elements();
    const std::int64_t elements = engine.packed_elements(spec.rows, spec.columns, with_backward);
    return elements > 0 ? elements : engine.device() == Device::cpu ? spec.elements() : 0;
}

std::int64_t aligned(std::int64_t elements) { return (elements + alignment - 1) / alignment * alignment; }

std::int64_t total_elements(const DebertaConfig& config, const Engine& engine, bool with_backward)
{
    std::int64_t total = 0, parameter = 0;
    for (const ParameterSpec& spec : pair_parameters(config))
        total += aligned(block_elements(config, engine, spec, parameter++, with_backward));
    return total;
}

} // namespace

PairWeights::Impl::Impl(const DebertaConfig& model, Engine& used_engine, const Options& used_options)
    : config(model), engine(used_engine), options(used_options), specs(pair_parameters(model)), panels(specs.size()),
      dense(specs.size()), packed(specs.size())
{
}

void PairWeights::Impl::load(const SafetensorsReader& reader)
{
    std::vector<float> buffer;
    std::int64_t begin = 0;
    for (std::size_t i = 0; i < specs.size(); ++i) {
        const auto parameter = static_cast<std::int64_t>(i);
        const ParameterSpec& spec = specs[i];
        const bool mine = parameter % options.parts == options.part;
        const std::int64_t elements = block_elements(config, engine, spec, parameter, options.with_backward);
        Tensor place = block;
        place.data = block.f32() + begin;
        begin += aligned(elements);
        if (mine) {
            buffer.resize(static_cast<std::size_t>(spec.elements()));
            read_pair_parameter(reader, spec, 0, buffer);
            if (options.dtype == DType::bf16)
                round_to_bf16(buffer);
        }
        if (!is_packed(config, parameter)) {
            place.rows = spec.rows;
            place.columns = place.stride = spec.columns;
            if (mine)
                engine.copy_from_host(buffer.data(), place);
            dense[i] = place;
            continue;
        }
        Tensor values{nullptr, nullptr, spec.rows, spec.columns, spec.columns, DType::f32, Device::cpu};
        if (mine)
            values = borrow_f32(buffer.data(), spec.rows, spec.columns);
        place.rows = 1;
        place.columns = place.stride = elements;
        packed[i] = engine.pack(values, options.with_backward, elements > 0 ? place : Tensor{}, !mine);
    }
}

void PairWeights::Impl::pack_flat()
{
    for (std::size_t i = 0; i < specs.size(); ++i) {
        const auto parameter = static_cast<std::int64_t>(i);
        if (!is_packed(config, parameter)) {
            dense[i] = flat[i];
            continue;
        }
        const std::int64_t elements = engine.packed_elements(specs[i].rows, specs[i].columns, options.with_backward);
        if (elements > 0 && panels[i].empty())
            panels[i] = engine.allocate(1, elements, DType::f32);
        packed[i] = engine.pack(flat[i], options.with_backward, panels[i], false);
    }
}

std::int64_t PairWeights::memory_elements(const DebertaConfig& config, const Engine& engine, bool with_backward)
{
    return engine.device() == Device::cpu ? total_elements(config, engine, with_backward) : 0;
}

PairWeights::PairWeights(const DebertaConfig& config, Engine& engine, const SafetensorsReader& reader,
                         const Options& options, const Tensor& memory)
    : impl_(std::make_unique<Impl>(config, engine, options))
{
    SELM_EXPECT(options.parts >= 1 && options.part >= 0 && options.part < options.parts);
    for (std::int64_t i = PairParameterIndex::head(config); i < PairParameterIndex::count(config); ++i) {
        const ParameterSpec& spec = impl_->specs[static_cast<std::size_t>(i)];
        if (!has_pair_parameter(reader, spec))
            throw config_error(cat("the checkpoint has no tensor '", spec.name,
                                   "' (it is an encoder without the head of a pair ranker). Pass a pair ranker's"));
    }
    const std::int64_t total = total_elements(config, engine, options.with_backward);
    if (engine.device() != Device::cpu) { // every rank has a device, and all weights on it
        impl_->options.part = 0;
        impl_->options.parts = 1;
        impl_->block = engine.allocate(1, total, DType::f32);
    } else {
        SELM_EXPECT(!memory.empty() || options.parts == 1); // several ranks fill the parts: their memory is shared
        impl_->block = memory.empty() ? engine.allocate(1, total, DType::f32) : memory;
        SELM_EXPECT(impl_->block.rows * impl_->block.columns >= total);
    }
    impl_->load(reader);
}

PairWeights::PairWeights(const DebertaConfig& config, Engine& engine, std::vector<Tensor> parameters,
                         const Options& options)
    : impl_(std::make_unique<Impl>(config, engine, options))
{
    SELM_EXPECT(options.parts == 1 && parameters.size() == impl_->specs.size());
    for (std::size_t i = 0; i < parameters.size(); ++i)
        SELM_EXPECT(parameters[i].rows == impl_->specs[i].rows && parameters[i].columns == impl_->specs[i].columns);
    impl_->flat = std::move(parameters);
    impl_->pack_flat();
}

PairWeights::~PairWeights() = default;

void PairWeights::refresh()
{
    SELM_EXPECT(!impl_->flat.empty());
    impl_->pack_flat();
}

} // namespace selm
