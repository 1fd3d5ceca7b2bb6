#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "selm/kernels/engine.hpp"
#include "selm/model/decoder_config.hpp"

namespace selm {

/// Inverse frequencies f32 [D/2] of rotary embeddings: theta^(-2i/D), stretched where @p scaling says so, in the arithmetic
/// of transformers (all in float32).
std::vector<float> rope_inverse_frequencies(double theta, std::int64_t head_dim,
                                            const std::optional<Llama3RopeScaling>& scaling = {});

/**
 * @brief Cosine and sine tables f32 [positions, D/2] on the engine's device, grown as positions are asked for, by 256 at least.
 *
 * transformers multiplies position and inverse frequency in float32 and takes the cosine of that rounded angle; at
 * position 2000 the rounding is worth 1e-4 in the angle. The tables do the same, or logits would differ by as much.
 */
class RopeTables {
  public:
    RopeTables(Engine& engine, const DecoderConfig& config);
    void cover(std::int64_t positions);
    /// Of the tables that cover these positions.
    static std::int64_t bytes(const DecoderConfig& config, std::int64_t positions);
    const Tensor& cosines() const { return cosines_; }
    const Tensor& sines() const { return sines_; }

  private:
    Engine& engine_;
    std::vector<float> inverse_frequencies_;
    Tensor cosines_;
    Tensor sines_;
};

} // namespace selm
