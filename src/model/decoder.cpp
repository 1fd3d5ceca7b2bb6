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

LayerActivations Decoder::Impl::activations(LayerBuffers& buffers, std::int64_t tokens, bool keep)
{
    LayerActivations a;
    a.x_in = buffers.x_in.view(engine, tokens, config.hidden, DType::f32);
    a.qkv = buffers.qkv.view(engine, tokens, config.qkv_width(), activation);
    a.attended = buffers.attended.view(engine, tokens, config.heads * config.head_dim, activation);
    a.lse = buffers.lse.view(engine, config.heads, tokens, DType::f32);
    a.gate_up = buffers.gate_up.view(engine, tokens, 2 * config.intermediate, activation);
    a.x_mid = a.x_out = a.x_in;
    if (keep) {
        a.x_mid = buffers.x_mid.view(engine, tokens, config.hidden, DType::f32);
        a.rstd_in = buffers.rstd_in.view(engine, 1, tokens, DType::f32);
        a.rstd_mid = buffers.rstd_mid.view(engine, 1, tokens, DType::f32);
    }
    return a;
}

void Decoder::Impl::forward_layer(std::int64_t layer, const LayerActivations& a, std::span<const std::int32_t> positions,
                                  const Attention& attention)
{
    const LayerWeights& w = weights.layer(layer);
    const Tensor normed_TH = normed.view(engine, a.x_in.rows, config.hidden, activation);
    const Tensor activated_TI = activated.view(engine, a.x_in.rows, config.intermediate, activation);
    engine.rms_norm(a.x_in, w.input_norm, eps, normed_TH, a.rstd_in);
    engine.linear(normed_TH, w.qkv, a.qkv);
    engine.rope(a.qkv, shape, positions, rope.cosines(), rope.sines(), false);
    attention(a.qkv, a.attended);
    copy(a.x_in, a.x_mid);
    engine.linear_add(a.attended, w.out, a.x_mid);
    engine.rms_norm(a.x_mid, w.post_norm, eps, normed_TH, a.rstd_mid);
    engine.linear(normed_TH, w.gate_up, a.gate_up);
    engine.swiglu(a.gate_up, activated_TI);
    copy(a.x_mid, a.x_out);
    engine.linear_add(activated_TI, w.down, a.x_out);
    weights.release(layer);
}

void Decoder::Impl::final_norm(const Tensor& x, std::span<const std::int64_t> rows, const Tensor& x_selected,
                               const Tensor& rstd, const Tensor& hidden)
{
    engine.gather_rows(x, rows, x_selected);
    engine.rms_norm(x_selected, weights.final_norm(), eps, hidden, rstd);
}

namespace {

/// A pass, and for a kept one what backward needs. A pass without tokens (a rank without rows) has empty tensors.
class PassState final : public Decoder::Pass {
  public:
    ~PassState() override
    {
        if (saved)
            spare->push_back(std::move(saved)); // the next kept pass takes the memory over
    }
    Tensor hidden() const override { return hidden_RH; }

    PackedBatch batch; ///< tokens, positions, segments and selected only
    bool kept = false;
    Tensor hidden_RH;
    Tensor x_selected; ///< f32 [R, H], before the final norm
    Tensor rstd;       ///< f32 [1, R]
    std::unique_ptr<SavedLayers> saved;
    std::vector<LayerActivations> layers;
    std::shared_ptr<std::vector<std::unique_ptr<SavedLayers>>> spare;
};

class ScoredPassState final : public Decoder::ScoredPass {
  public:
    std::span<const float> log_probs() const override { return values; }

    std::unique_ptr<Decoder::Pass> pass;
    std::vector<std::int32_t> targets;
    std::vector<float> values;
    std::vector<float> lse;
};

} // namespace

Decoder::Decoder(DecoderConfig config, Engine& engine, WeightStore& weights)
    : impl_(std::make_unique<Impl>(std::move(config), engine, weights))
{
}

Decoder::~Decoder() = default;
const DecoderConfig& Decoder::config() const { return impl_->config; }
Engine& Decoder::engine() const { return impl_->engine; }

std::unique_ptr<Decoder::Pass> Decoder::forward(const PackedBatch& batch, bool keep)
{
    Impl& d = *impl_;
    auto pass = std::make_unique<PassState>();
    pass->kept = keep;
    const auto tokens = static_cast<std::int64_t>(batch.tokens.size());
    const auto scored = static_cast<std::int64_t>(batch.selected.size());
    if (tokens == 0) {
        SELM_EXPECT(scored == 0);
        return pass;
    }
    d.check_tokens(batch.tokens, batch.positions);
    d.rope.cover(*std::max_element(batch.positions.begin(), batch.positions.end()) + 1);
    pass->hidden_RH = d.engine.allocate(scored, d.config.hidden, d.activation);
    if (keep) {
        pass->batch = {batch.tokens, batch.positions, batch.segments, batch.selected, {}, {}, 0};
        pass->x_selected = d.engine.allocate(scored, d.config.hidden, DType::f32);
        pass->rstd = d.engine.allocate(1, scored, DType::f32);
        pass->spare = d.spare;
        if (d.spare->empty()) {
            pass->saved = std::make_unique<SavedLayers>();
            pass->saved->layers.resize(static_cast<std::size_t>(d.config.layers));
        } else {
            pass->saved = std::move(d.spare->back());
            d.spare->pop_back();
        }
        for (LayerBuffers& buffers : pass->saved->layers)
            pass->layers.push_back(d.activations(buffers, tokens, true));
        for (std::size_t i = 0; i + 1 < pass->layers.size(); ++i)
            pass->layers[i].x_out = pass->layers[i + 1].x_in;
        pass->layers.back().x_out = pass->saved->x_out.view(d.engine, tokens, d.config.hidden, DType::f32);
    } else {
        pass->layers.assign(static_cast<std::size_t>(d.config.layers), d.activations(d.work, tokens, false));
    }
    d.engine.embed(batch.tokens, d.weights.embedding(), pass->layers.front().x_in);
    for (std::int64_t i = 0; i < d.config.layers; ++i) {
        const LayerActivations& a = pass->layers[static_cast<std::size_t>(i)];
        d.forward_layer(i, a, batch.positions, [&](const Tensor& qkv, const Tensor& attended) {
            d.engine.attention(qkv, d.shape, batch.segments, attended, a.lse);
        });
    }
    if (scored > 0) {
        const Tensor x_selected =
            keep ? pass->x_selected : d.selected_rows.view(d.engine, scored, d.config.hidden, DType::f32);
        d.final_norm(pass->layers.back().x_out, batch.selected, x_selected, pass->rstd, pass->hidden_RH);
    }
    if (!keep)
        pass->layers.clear();
    return pass;
}

namespace {

/// Every parameter below the head, in the order in which backward finishes them.
template<typename Visit>
void for_each_in_backward_order(const DecoderConfig& config, Visit&& visit)
{
    visit(ParameterIndex::final_norm(config));
    for (std::int64_t layer = config.layers - 1; layer >= 0; --layer) {
        for (std::int64_t parameter = ParameterIndex::down(layer); parameter >= ParameterIndex::input_norm(layer); --parameter)
            visit(parameter);
    }
    visit(ParameterIndex::embedding);
}

} // namespace

/// One layer's backward: d_x [T, H] comes in as the gradient of x_out and leaves as that of x_in.
struct LayerBackward {
    Decoder::Impl& d;
    GradientSink& gradients;
    const PackedBatch& batch;
    Tensor d_x;

    Tensor scratch(Buffer& buffer, std::int64_t columns) { return buffer.view(d.engine, d_x.rows, columns, d.activation); }
    void finish_weight(std::int64_t parameter, const Tensor& d_output, const Tensor& input)
    {
        d.engine.linear_backward_weight(d_output, input, gradients.gradient(parameter));
        gradients.ready(parameter);
    }
    void mlp(std::int64_t layer, const LayerActivations& a, const LayerWeights& w)
    {
        const Tensor d_activated = scratch(d.d_activated, d.config.intermediate);
        const Tensor activated = scratch(d.activated, d.config.intermediate);
        d.engine.linear_backward_input(d_x, w.down, d_activated);
        d.engine.swiglu_backward(a.gate_up, d_activated, activated);
        finish_weight(ParameterIndex::down(layer), d_x, activated);
        norm_and_linear(ParameterIndex::gate_up(layer), ParameterIndex::post_norm(layer), a.gate_up, w.gate_up, a.x_mid,
                        w.post_norm, a.rstd_mid);
    }
    void attention(std::int64_t layer, const LayerActivations& a, const LayerWeights& w)
    {
        const Tensor d_attended = scratch(d.d_attended, a.attended.columns);
        const Tensor d_qkv = scratch(d.d_qkv, a.qkv.columns);
        d.engine.linear_backward_input(d_x, w.out, d_attended);
        finish_weight(ParameterIndex::out(layer), d_x, a.attended);
        d.engine.attention_backward(a.qkv, d.shape, batch.segments, a.attended, a.lse, d_attended, d_qkv);
        d.engine.rope(d_qkv, d.shape, batch.positions, d.rope.cosines(), d.rope.sines(), true);
        norm_and_linear(ParameterIndex::qkv(layer), ParameterIndex::input_norm(layer), d_qkv, w.qkv, a.x_in, w.input_norm,
                        a.rstd_in);
    }
    /// Backward of linear(rms_norm(x)); the normalised input is recomputed rather than kept.
    void norm_and_linear(std::int64_t weight_parameter, std::int64_t norm_parameter, const Tensor& d_output,
                         const PackedWeight& weight, const Tensor& x, const Tensor& gain, const Tensor& rstd)
    {
        const Tensor normed = scratch(d.normed, d.config.hidden);
        const Tensor d_normed = scratch(d.d_normed, d.config.hidden);
        d.engine.rms_norm(x, gain, d.eps, normed, {});
        finish_weight(weight_parameter, d_output, normed);
        d.engine.linear_backward_input(d_output, weight, d_normed);
        d.engine.rms_norm_backward(x, gain, rstd, d_normed, d_x, gradients.gradient(norm_parameter));
        gradients.ready(norm_parameter);
    }
};

void Decoder::backward(Pass& pass, const Tensor& d_hidden, GradientSink& gradients)
{
    Impl& d = *impl_;
    auto& state = dynamic_cast<PassState&>(pass);
    SELM_EXPECT(state.kept);
    if (state.batch.tokens.empty()) {
        for_each_in_backward_order(d.config, [&](std::int64_t parameter) { gradients.ready(parameter); });
        return;
    }
    SELM_EXPECT(state.saved && d_hidden.rows == state.hidden_RH.rows);
    const auto tokens = static_cast<std::int64_t>(state.batch.tokens.size());
    const Tensor d_x = d.d_x.view(d.engine, tokens, d.config.hidden, DType::f32);
    d.engine.fill_zero(d_x);
    if (d_hidden.rows > 0) {
        const Tensor d_selected = d.selected_rows.view(d.engine, d_hidden.rows, d.config.hidden, DType::f32);
        d.engine.fill_zero(d_selected);
        d.engine.rms_norm_backward(state.x_selected, d.weights.final_norm(), state.rstd, d_hidden, d_selected,
                                   gradients.gradient(ParameterIndex::final_norm(d.config)));
        d.engine.scatter_add_rows(d_selected, state.batch.selected, d_x);
    }
    gradients.ready(ParameterIndex::final_norm(d.config));
    LayerBackward backward{d, gradients, state.batch, d_x};
    for (std::int64_t layer = d.config.layers - 1; layer >= 0; --layer) {
        const LayerWeights& w = d.weights.layer(layer);
        backward.mlp(layer, state.layers[static_cast<std::size_t>(layer)], w);
        backward.attention(layer, state.layers[static_cast<std::size_t>(layer)], w);
        d.weights.release(layer);
    }
    for (std::int64_t i = 0; i < tokens; ++i) { // see DecoderConfig::padding_token
        if (state.batch.tokens[static_cast<std::size_t>(i)] == d.config.padding_token)
            d.engine.fill_zero(d_x.slice_rows(i, 1));
    }
    d.engine.embed_backward(state.batch.tokens, d_x, gradients.gradient(ParameterIndex::embedding));
    gradients.ready(ParameterIndex::embedding);
    state.layers.clear();
    d.spare->push_back(std::move(state.saved)); // gate_up holds gradients now: a second backward would be wrong
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
    if (!values.empty())
        impl_->engine.head_log_probs(pass->hidden(), impl_->weights.head(), batch.targets, values, lse);
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
    if (!scored->values.empty())
        impl_->engine.head_log_probs(scored->pass->hidden(), impl_->weights.head(), scored->targets, scored->values,
                                     scored->lse);
    return scored;
}

void Decoder::backward_scored(ScoredPass& pass, std::span<const float> g, GradientSink& gradients)
{
    Impl& d = *impl_;
    auto& state = dynamic_cast<ScoredPassState&>(pass);
    SELM_EXPECT(g.size() == state.targets.size());
    const std::int64_t head = ParameterIndex::head(d.config);
    const auto scored = static_cast<std::int64_t>(g.size());
    Tensor d_hidden;
    if (scored > 0) {
        d_hidden = d.engine.allocate(scored, d.config.hidden, d.activation);
        d.engine.head_log_probs_backward(state.pass->hidden(), d.weights.head(), state.targets, state.lse, g, d_hidden,
                                         gradients.gradient(head));
    }
    if (head != ParameterIndex::embedding)
        gradients.ready(head);
    backward(*state.pass, d_hidden, gradients);
}

std::int64_t Decoder::activation_bytes(std::int64_t tokens, std::int64_t scored) const
{
    return decoder_activation_bytes(impl_->config, impl_->activation, tokens, scored, true);
}

std::int64_t decoder_activation_bytes(const DecoderConfig& c, DType activation, std::int64_t tokens, std::int64_t scored, bool keep)
{
    const auto width = static_cast<std::int64_t>(size_of(activation));
    const std::int64_t attended = c.heads * c.head_dim;
    if (!keep) {
        // One layer's x, lse, qkv, attended, gate_up; normed, activated. x_selected, hidden.
        const std::int64_t working = 4 * (c.hidden + c.heads) + width * (c.qkv_width() + attended + 3 * c.intermediate + c.hidden);
        return tokens * working + scored * (4 + width) * c.hidden;
    }
    const std::int64_t saved = 4 * (2 * c.hidden + c.heads + 2) + width * (c.qkv_width() + attended + 2 * c.intermediate);
    // x_out, d_x; normed, d_normed; activated, d_activated; d_attended, d_qkv
    const std::int64_t working = 4 * 2 * c.hidden + width * (2 * c.hidden + 2 * c.intermediate + attended + c.qkv_width());
    // x_selected, d_selected, rstd; hidden, d_hidden
    const std::int64_t per_scored = 4 * (2 * c.hidden + 1) + width * 2 * c.hidden;
    return tokens * (c.layers * saved + working) + scored * per_scored;
}

} // namespace selm
