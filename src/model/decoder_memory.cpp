#include <algorithm>

#include "decoder_impl.hpp"
#include "selm/base/error.hpp"
#include "selm/model/decoder.hpp"

namespace selm {
namespace {

constexpr std::int64_t f32_bytes = 4;

std::int64_t width_of(DType dtype) { return static_cast<std::int64_t>(size_of(dtype)); }

/// Columns of qkv, attended and gate_up.
std::int64_t saved_columns(const DecoderConfig& c) { return c.qkv_width() + c.heads * c.head_dim + 2 * c.intermediate; }

/// What one layer saves for backward per token, but for its input.
std::int64_t saved_bytes(const DecoderConfig& c, DType saved)
{
    return f32_bytes * (c.hidden + c.heads + 2) + width_of(saved) * saved_columns(c); // x_mid, lse, rstd_in, rstd_mid
}

} // namespace

std::int64_t Decoder::activation_bytes(std::int64_t tokens, std::int64_t scored) const
{
    return decoder_activation_bytes(impl_->config, activation_types(impl_->engine), tokens, scored, true, impl_->recomputed);
}

ActivationTypes activation_types(const Engine& engine) { return {engine.activation_dtype(), engine.saved_dtype()}; }

std::int64_t decoder_activation_bytes(const DecoderConfig& c, const ActivationTypes& types, std::int64_t tokens,
                                      std::int64_t scored, bool keep, std::int64_t recomputed_layers)
{
    SELM_EXPECT(recomputed_layers >= 0 && recomputed_layers <= c.layers);
    const std::int64_t width = width_of(types.working);
    const std::int64_t attended = c.heads * c.head_dim;
    const std::int64_t tables = RopeTables::bytes(c, std::min(tokens, c.max_positions));
    if (!keep) {
        // One layer's x, lse, qkv, attended, gate_up; normed, activated. x_selected, hidden.
        const std::int64_t working =
            f32_bytes * (c.hidden + c.heads) + width * (c.qkv_width() + attended + 3 * c.intermediate + c.hidden);
        return tokens * working + scored * (f32_bytes + width) * c.hidden + tables;
    }
    const std::int64_t kept_layers = c.layers - std::min(recomputed_layers, c.layers - 1);
    const std::int64_t saved = c.layers * f32_bytes * c.hidden + kept_layers * saved_bytes(c, types.saved);
    // The last layer's output or d_x; normed; activated or d_qkv; d_activated or d_attended; where they are saved in another
    // type, one layer's qkv, attended and gate_up.
    const std::int64_t working =
        f32_bytes * c.hidden +
        width * (c.hidden + std::max(c.intermediate, c.qkv_width()) + std::max(c.intermediate, attended) +
                 (types.saved != types.working ? saved_columns(c) : 0));
    // x_selected, d_selected, rstd; hidden, d_hidden
    const std::int64_t per_scored = f32_bytes * (2 * c.hidden + 1) + width * 2 * c.hidden;
    return tokens * (saved + working) + scored * per_scored + tables;
}

RecomputePlan plan_recompute(const DecoderConfig& config, const ActivationTypes& types, std::int64_t tokens,
                             std::int64_t scored, std::int64_t budget_bytes)
{
    RecomputePlan plan;
    for (plan.layers = 0;; ++plan.layers) {
        plan.bytes = decoder_activation_bytes(config, types, tokens, scored, true, plan.layers);
        plan.fits = plan.bytes <= budget_bytes;
        if (plan.fits || plan.layers + 1 >= config.layers)
            return plan;
    }
}

} // namespace selm
