#include "selm/model/decoder.hpp"

#include <algorithm>
#include <utility>

#include "decoder_impl.hpp"
#include "selm/base/error.hpp"

namespace selm {

Decoder::Impl::Impl(DecoderConfig model, Engine& used_engine, WeightStore& store)
    : config(std::move(model)), engine(used_engine), weights(store), shape(config.attention()),
      eps(static_cast<float>(config.rms_norm_eps)), activation(used_engine.activation_dtype()),
      rope(used_engine, config)
{
}

void Decoder::Impl::check_tokens(std::span<const std::int32_t> tokens, std::span<const std::int32_t> positions) const
{
    SELM_EXPECT(tokens.size() == positions.size());
    for (const std::int32_t token : tokens) {
        if (token < 0 || token >= config.vocabulary)
            throw data_error(cat("token id ", token, " is not in the model's vocabulary of ", config.vocabulary,
                                 " (the tokenizer does not belong to this model). Use the model directory's own tokenizer"));
    }
    for (const std::int32_t position : positions) {
        if (position < 0 || position >= config.max_positions)
            throw data_error(cat("position ", position, " is beyond the model's context of ", config.context(),
                                 ". Use a smaller maximum length"));
    }
}

void Decoder::Impl::copy(const Tensor& from, const Tensor& to)
{
    if (from.data == to.data)
        return;
    while (static_cast<std::int64_t>(identity.size()) < from.rows)
        identity.push_back(static_cast<std::int64_t>(identity.size()));
    engine.gather_rows(from, std::span(identity).first(static_cast<std::size_t>(from.rows)), to);
}

LayerActivations Decoder::Impl::activations(Buffer& x_in, LayerBuffers& buffers, std::int64_t tokens, bool keep)
{
    LayerActivations a;
    a.x_in = x_in.view(engine, tokens, config.hidden, DType::f32);
    a.lse = buffers.lse.view(engine, config.heads, tokens, DType::f32);
    const DType saved = engine.saved_dtype();
    const bool apart = keep && saved != activation;
    LayerBuffers& at_work = apart ? work : buffers;
    a.qkv = at_work.qkv.view(engine, tokens, config.qkv_width(), activation);
    a.attended = at_work.attended.view(engine, tokens, config.heads * config.head_dim, activation);
    a.gate_up = at_work.gate_up.view(engine, tokens, 2 * config.intermediate, activation);
    if (apart) {
        a.saved_qkv = buffers.qkv.view(engine, tokens, a.qkv.columns, saved);
        a.saved_attended = buffers.attended.view(engine, tokens, a.attended.columns, saved);
        a.saved_gate_up = buffers.gate_up.view(engine, tokens, a.gate_up.columns, saved);
    }
    a.x_mid = a.x_out = a.x_in;
    if (keep) {
        a.x_mid = buffers.x_mid.view(engine, tokens, config.hidden, DType::f32);
        a.rstd_in = buffers.rstd_in.view(engine, 1, tokens, DType::f32);
        a.rstd_mid = buffers.rstd_mid.view(engine, 1, tokens, DType::f32);
    }
    return a;
}

void Decoder::Impl::save(const LayerActivations& a)
{
    if (a.saved_qkv.data == nullptr)
        return;
    engine.convert(a.qkv, a.saved_qkv);
    engine.convert(a.attended, a.saved_attended);
    engine.convert(a.gate_up, a.saved_gate_up);
}

void Decoder::Impl::restore(const LayerActivations& a)
{
    if (a.saved_qkv.data == nullptr)
        return;
    engine.convert(a.saved_qkv, a.qkv);
    engine.convert(a.saved_attended, a.attended);
    engine.convert(a.saved_gate_up, a.gate_up);
}

Decoder::Impl::Attention Decoder::Impl::packed_attention(std::span<const Segment> segments, const Tensor& lse)
{
    return [this, segments, lse](const Tensor& qkv, const Tensor& attended) {
        engine.attention(qkv, shape, segments, attended, lse);
    };
}

void Decoder::Impl::forward_to_gate_up(const LayerWeights& w, const LayerActivations& a,
                                       std::span<const std::int32_t> positions, const Attention& attention)
{
    const Tensor normed_TH = scratch(normed, a.x_in.rows, config.hidden);
    engine.rms_norm(a.x_in, w.input_norm, eps, normed_TH, a.rstd_in);
    engine.linear(normed_TH, w.qkv, a.qkv);
    engine.rope(a.qkv, shape, positions, rope.cosines(), rope.sines(), false);
    attention(a.qkv, a.attended);
    copy(a.x_in, a.x_mid);
    engine.linear_add(a.attended, w.out, a.x_mid);
    engine.rms_norm(a.x_mid, w.post_norm, eps, normed_TH, a.rstd_mid);
    engine.linear(normed_TH, w.gate_up, a.gate_up);
}

void Decoder::Impl::forward_layer(const LayerWeights& w, const LayerActivations& a,
                                  std::span<const std::int32_t> positions, const Attention& attention)
{
    forward_to_gate_up(w, a, positions, attention);
    const Tensor activated_TI = scratch(wide, a.x_in.rows, config.intermediate);
    engine.swiglu(a.gate_up, activated_TI);
    copy(a.x_mid, a.x_out);
    engine.linear_add(activated_TI, w.down, a.x_out);
}

void Decoder::Impl::final_norm(const Tensor& x, std::span<const std::int64_t> rows, const Tensor& x_selected,
                               const Tensor& rstd, const Tensor& hidden)
{
    engine.gather_rows(x, rows, x_selected);
    engine.rms_norm(x_selected, weights.final_norm(), eps, hidden, rstd);
}

void Decoder::Impl::head_log_probs(const Tensor& hidden, std::span<const std::int32_t> targets, std::span<float> log_probs,
                                   std::span<float> lse)
{
    const PackedWeight& head = weights.head(WeightUse::forward);
    if (!targets.empty())
        engine.head_log_probs(hidden, head, targets, log_probs, lse);
    weights.release_head();
}

Decoder::Decoder(DecoderConfig config, Engine& engine, WeightStore& weights)
    : impl_(std::make_unique<Impl>(std::move(config), engine, weights))
{
}

Decoder::~Decoder() = default;

void Decoder::set_recompute(std::int64_t layers)
{
    SELM_EXPECT(layers >= 0 && layers <= impl_->config.layers);
    impl_->recomputed = std::min(layers, impl_->config.layers - 1);
    impl_->spare->clear();
}

const DecoderConfig& Decoder::config() const { return impl_->config; }
Engine& Decoder::engine() const { return impl_->engine; }

namespace {

/// What the pass saves for backward; its layers' activations are set up.
void keep(PassState& pass, const PackedBatch& batch, Decoder::Impl& d)
{
    pass.kept = true;
    pass.recomputed = d.recomputed;
    pass.spare = d.spare;
    pass.batch = {batch.tokens, batch.positions, batch.segments, batch.selected, {}, {}, 0};
    if (pass.tokens() == 0)
        return;
    const auto scored = static_cast<std::int64_t>(batch.selected.size());
    pass.x_selected = d.engine.allocate(scored, d.config.hidden, DType::f32);
    pass.rstd = d.engine.allocate(1, scored, DType::f32);
    if (d.spare->empty()) {
        pass.saved = std::make_unique<SavedLayers>();
        pass.saved->layers.resize(static_cast<std::size_t>(d.config.layers));
    } else {
        pass.saved = std::move(d.spare->back());
        d.spare->pop_back();
    }
    std::vector<LayerBuffers>& saved = pass.saved->layers;
    for (std::size_t i = 0; i < saved.size(); ++i) {
        LayerBuffers& buffers = saved[std::max(i, static_cast<std::size_t>(pass.recomputed))];
        pass.layers.push_back(d.activations(saved[i].x_in, buffers, pass.tokens(), true));
    }
    for (std::size_t i = 0; i + 1 < pass.layers.size(); ++i)
        pass.layers[i].x_out = pass.layers[i + 1].x_in;
    pass.layers.back().x_out = d.x_last.view(d.engine, pass.tokens(), d.config.hidden, DType::f32);
}

} // namespace

std::unique_ptr<Decoder::Pass> Decoder::forward(const PackedBatch& batch, bool keep_activations)
{
    Impl& d = *impl_;
    const auto tokens = static_cast<std::int64_t>(batch.tokens.size());
    const auto scored = static_cast<std::int64_t>(batch.selected.size());
    SELM_EXPECT(tokens > 0 || scored == 0);
    d.check_tokens(batch.tokens, batch.positions);
    auto pass = std::make_unique<PassState>();
    if (tokens > 0) {
        d.rope.cover(*std::max_element(batch.positions.begin(), batch.positions.end()) + 1);
        pass->hidden_RH = d.engine.allocate(scored, d.config.hidden, d.activation);
    }
    if (keep_activations)
        keep(*pass, batch, d);
    else if (tokens > 0)
        pass->layers.assign(static_cast<std::size_t>(d.config.layers), d.activations(d.work.x_in, d.work, tokens, false));
    const Tensor& embedding = d.weights.embedding();
    if (tokens > 0)
        d.engine.embed(batch.tokens, embedding, pass->layers.front().x_in);
    d.weights.release_embedding();
    for (std::int64_t i = 0; i < d.config.layers; ++i) {
        const LayerWeights& w = d.weights.layer(i, WeightUse::forward);
        if (tokens > 0) {
            const LayerActivations& a = pass->layers[static_cast<std::size_t>(i)];
            d.forward_layer(w, a, batch.positions, d.packed_attention(batch.segments, a.lse));
            if (keep_activations && i >= pass->recomputed)
                d.save(a);
        }
        d.weights.release(i);
    }
    if (scored > 0) {
        const Tensor x_selected =
            pass->kept ? pass->x_selected : d.selected_rows.view(d.engine, scored, d.config.hidden, DType::f32);
        d.final_norm(pass->layers.back().x_out, batch.selected, x_selected, pass->rstd, pass->hidden_RH);
    }
    if (!pass->kept)
        pass->layers.clear();
    else if (tokens > 0)
        pass->layers.back().x_out = {}; // the next pass's too
    return pass;
}

namespace {

void check_targets(const DecoderConfig& config, std::span<const std::int32_t> targets, std::size_t scored)
{
    SELM_EXPECT(!config.sequence_classifier && targets.size() == scored);
    for (const std::int32_t target : targets)
        SELM_EXPECT(target >= 0 && target < config.vocabulary);
}

} // namespace

std::vector<float> Decoder::log_probs(const PackedBatch& batch)
{
    check_targets(impl_->config, batch.targets, batch.selected.size());
    const auto pass = forward(batch, false);
    std::vector<float> values(batch.targets.size());
    std::vector<float> lse(values.size());
    impl_->head_log_probs(pass->hidden(), batch.targets, values, lse);
    return values;
}

std::unique_ptr<Decoder::ScoredPass> Decoder::forward_scored(const PackedBatch& batch)
{
    check_targets(impl_->config, batch.targets, batch.selected.size());
    auto scored = std::make_unique<ScoredPassState>();
    scored->pass = forward(batch, true);
    scored->targets = batch.targets;
    scored->values.resize(batch.targets.size());
    scored->lse.resize(batch.targets.size());
    impl_->head_log_probs(scored->pass->hidden(), scored->targets, scored->values, scored->lse);
    return scored;
}

} // namespace selm
