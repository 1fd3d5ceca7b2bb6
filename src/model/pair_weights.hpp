#pragma once

#include <cstdint>
#include <vector>

#include "selm/model/pair_model.hpp"

namespace selm {

/// Tensors by their index in pair_parameters(): what is multiplied with is packed, the rest is as it is.
struct PairWeights::Impl {
    Impl(const DebertaConfig& model, Engine& used_engine, const Options& used_options);

    DebertaConfig config;
    Engine& engine;
    Options options;
    std::vector<ParameterSpec> specs;
    std::vector<Tensor> flat;         ///< parameters of the caller; empty when read from a checkpoint
    Tensor block;                     ///< storage of everything when read from a checkpoint
    std::vector<Tensor> panels;       ///< storage of packed parameters of the flat form
    std::vector<Tensor> dense;        ///< f32 [rows, columns]; empty for packed ones
    std::vector<PackedWeight> packed; ///< empty for dense ones

    const Tensor& values(std::int64_t parameter) const { return dense[static_cast<std::size_t>(parameter)]; }
    const PackedWeight& weight(std::int64_t parameter) const { return packed[static_cast<std::size_t>(parameter)]; }

    void load(const SafetensorsReader& reader);
    void pack_flat();
};

} // namespace selm
