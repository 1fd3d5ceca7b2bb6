#include "selm/shard/staged_gradient.hpp"

#include "selm/base/error.hpp"

namespace selm {

StagedGradient::StagedGradient(std::span<const ParameterSpec> parameters, Engine& engine, GradientSink& host)
    : parameters_(parameters), engine_(engine), host_(host), open_(parameters.size())
{
}

Tensor StagedGradient::gradient(std::int64_t parameter)
{
    Tensor& open = open_[static_cast<std::size_t>(parameter)];
    if (open.empty()) {
        if (host_.gradient(parameter).empty())
            return {}; // frozen
        const ParameterSpec& spec = parameters_[static_cast<std::size_t>(parameter)];
        open = engine_.allocate(spec.rows, spec.columns, DType::f32);
        engine_.fill_zero(open);
    }
    return open;
}

void StagedGradient::ready(std::int64_t parameter)
{
    Tensor& open = open_[static_cast<std::size_t>(parameter)];
    if (!open.empty()) { // else: frozen, or a pass without rows
        arrived_.resize(static_cast<std::size_t>(open.rows * open.columns));
        engine_.copy_to_host(open, arrived_.data());
        open = {};
        float* const sum = host_.gradient(parameter).f32();
        for (std::size_t i = 0; i < arrived_.size(); ++i)
            sum[i] += arrived_[i];
    }
    host_.ready(parameter);
}

} // namespace selm
