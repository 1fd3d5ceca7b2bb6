#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "selm/base/rng.hpp"
#include "selm/kernels/tensor.hpp"
#include "selm/model/decoder.hpp"
#include "selm/phases/sampler.hpp"

namespace selm {

/// A prompt to answer. `row` names the random stream and the result; the prompt is borrowed until the answer is out.
struct GenerationRow {
    std::int64_t row = 0;
    std::span<const std::int32_t> prompt; ///< at least one token
    std::int64_t max_new_tokens = 1;      ///< at least one
};

/// What came of a GenerationRow.
struct SampledAnswer {
    std::int64_t row = 0;
    std::vector<std::int32_t> tokens; ///< the end token included
    std::vector<float> log_probs;     ///< of the tokens, unscaled
    bool ended = false;               ///< by an end token; else by length
};

/**
 * @brief Continuous batching of one rank: rows take free slots, prompts are read in chunks beside the decoding rows, a
 * finished row leaves and makes room at once.
 *
 * An answer is a function of (prompt, max_new_tokens, model, sampling options, seed, iteration, row) alone where the
 * engine is row invariant: chunks of a prompt begin at multiples of prefill_tile of its own positions, decode steps
 * have one token, and random streams belong to rows. How many rows share a step, and which, does not matter.
 *
 * Prompts of chat models begin alike (the system message). What a prompt has in common with one that is in flight is not
 * computed again: its keys and values are copied. They have the bits that reading it would have given.
 */
class ContinuousBatch {
  public:
    struct Options {
        std::int64_t slots = 1;
        std::int64_t prefill_tokens = 256; ///< of prompts per step (rounded down to tiles, at least one tile)
        /// A prompt that begins as another one in flight is read from where they part, rounded down to a multiple of this
        /// (Engine::prefix_granularity); 0: every prompt is read whole.
        std::int64_t prefix_granularity = 0;
        std::vector<std::int32_t> end_tokens;
        SamplingOptions sampling;
        std::int64_t allowed_ids = 0; ///< see Sampler
        std::uint64_t seed = 0;
        std::uint64_t iteration = 0;
    };
    /// Runs the model on one step's work: f32 logits on the host, one row per work that wants them, in order.
    using Step = std::function<Tensor(std::span<const DecodeWork>)>;

    ContinuousBatch(const Options& options, Step step);

    std::int64_t free_slots() const;
    bool empty() const; ///< no row in flight
    /// A slot is free and the prompts in flight do not fill the next step. Rows that are taken only then stay with those
    /// who can read them soonest: ranks that are ahead take more.
    bool wants_row() const;
    void add(const GenerationRow& row); ///< needs a free slot
    /// One model step (nothing when empty); answers that it finished, in order of slots.
    std::vector<SampledAnswer> step();
    std::int64_t new_tokens() const { return new_tokens_; }       ///< sampled so far
    std::int64_t prompt_tokens() const { return prompt_tokens_; } ///< read so far, copied ones included
    std::int64_t copied_tokens() const { return copied_tokens_; } ///< of those, taken from other prompts

  private:
    struct Slot {
        std::span<const std::int32_t> prompt;
        std::int64_t max_new_tokens = 0;
        std::int64_t prefilled = 0;
        std::int64_t arrival = 0;
        std::int32_t last_token = 0;
        RandomStream stream;
        SampledAnswer answer;
    };
    void plan();
    void plan_prefill();
    /// Tokens that prompt @p i can take from another slot, and that slot; 0: none.
    std::pair<std::int64_t, std::size_t> find_prefix(std::size_t i) const;
    bool take_token(Slot& slot, std::span<const float> logits); ///< true: the answer is complete

    Options options_;
    Step step_;
    Sampler sampler_;
    std::vector<std::optional<Slot>> slots_;
    std::vector<DecodeWork> work_; // of the step being planned
    std::int64_t arrivals_ = 0, new_tokens_ = 0, prompt_tokens_ = 0, copied_tokens_ = 0;
};

} // namespace selm
