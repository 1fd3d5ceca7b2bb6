#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "selm/kernels/engine.hpp"
#include "selm/model/decoder.hpp"

namespace selm {

/**
 * @brief Gradients of passes that run on a device while sums, optimizer state and master weights are on the host
 * (`--offload optimizer`): a parameter's gradient is made on the device, comes down when it is complete, and is added to
 * the host's sink. At most the parameters that backward has open are on the device.
 */
class StagedGradient final : public GradientSink {
  public:
    /// All borrowed. @param host gives host buffers.
    StagedGradient(std::span<const ParameterSpec> parameters, Engine& engine, GradientSink& host);

    /// f32 [rows, columns] on the engine's device, zero when a pass first asks for it; empty for a frozen parameter.
    Tensor gradient(std::int64_t parameter) override;
    void ready(std::int64_t parameter) override;

  private:
    std::span<const ParameterSpec> parameters_;
    Engine& engine_;
    GradientSink& host_;
    std::vector<Tensor> open_; ///< by parameter
    std::vector<float> arrived_;
};

} // namespace selm
