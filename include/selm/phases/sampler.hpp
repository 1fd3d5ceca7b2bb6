#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "selm/base/rng.hpp"

namespace selm {

struct SamplingOptions {
    double temperature = 0; ///< 0: greedy, nothing is drawn
    double top_p = 1;       ///< smallest set of most probable tokens that holds this mass (after top_k); 1: off
    std::int64_t top_k = 0; ///< this many most probable tokens; 0: off
};

struct SampledToken {
    std::int32_t id = 0;
    float log_prob = 0; ///< of the unscaled distribution over all ids, before temperature, top-k and top-p
};

/**
 * @brief Chooses the next token from logits. Deterministic: a function of the logits, the options and the stream.
 *
 * Tokens of equal logits are ordered by id, lowest first: argmax takes the lowest id, top-k keeps exactly k tokens.
 * Order of filters as in transformers: temperature, top-k, top-p. One draw of the stream per sampled token.
 */
class Sampler {
  public:
    /// @param allowed ids below this may be chosen (ids of the tokenizer; a model may have rows beyond them).
    Sampler(const SamplingOptions& options, std::int64_t allowed);

    /// @param logits f32 [V], V >= allowed. @throws Error bad_data when they are not finite.
    SampledToken sample(std::span<const float> logits, RandomStream& stream);

  private:
    std::int32_t draw(std::span<const float> logits, float largest, RandomStream& stream);

    SamplingOptions options_;
    std::size_t allowed_;
    std::vector<float> weights_;      // scratch: exp((logit - largest) / temperature)
    std::vector<std::int32_t> order_; // scratch: heap of candidates
};

/// log(sum(exp(logits))): terms in float, sums in double in a fixed order.
double log_sum_exp(std::span<const float> logits);

} // namespace selm
