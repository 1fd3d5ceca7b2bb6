#include <utility>

#include "decoder_impl.hpp"
#include "selm/base/error.hpp"
#include "selm/model/decoder.hpp"

namespace selm {

std::vector<std::int64_t> backward_order(const DecoderConfig& config)
{
    std::vector<std::int64_t> order;
    if (ParameterIndex::head(config) != ParameterIndex::embedding)
        order.push_back(ParameterIndex::head(config));
    for (std::int64_t parameter = ParameterIndex::final_norm(config); parameter >= ParameterIndex::embedding; --parameter)
        order.push_back(parameter);
    return order;
}

namespace {

/// One layer's backward: d_x [T, H] comes in as the gradient of x_out and leaves as that of x_in.
struct LayerBackward {
    Decoder::Impl& d;
    GradientSink& gradients;
    const PackedBatch& batch;
    Tensor d_x;

    Tensor scratch(Buffer& buffer, std::int64_t columns) { return d.scratch(buffer, d_x.rows, columns); }
    void finish_weight(std::int64_t parameter, const Tensor& d_output, const Tensor& input)
    {
        const Tensor gradient = gradients.gradient(parameter);
        if (!gradient.empty())
            d.engine.linear_backward_weight(d_output, input, gradient);
        gradients.ready(parameter);
    }
    void mlp(std::int64_t layer, const LayerActivations& a, const LayerWeights& w)
    {
        const Tensor d_activated = scratch(d.d_wide, d.config.intermediate);
        const Tensor activated = scratch(d.wide, d.config.intermediate);
        d.engine.linear_backward_input(d_x, w.down, d_activated);
        d.engine.swiglu_backward(a.gate_up, d_activated, activated);
        finish_weight(ParameterIndex::down(layer), d_x, activated);
        norm_and_linear(ParameterIndex::gate_up(layer), ParameterIndex::post_norm(layer), a.gate_up, w.gate_up, a.x_mid,
                        w.post_norm, a.rstd_mid);
    }
    void attention(std::int64_t layer, const LayerActivations& a, const LayerWeights& w)
    {
        const Tensor d_attended = scratch(d.d_wide, a.attended.columns);
        const Tensor d_qkv = scratch(d.wide, a.qkv.columns);
        d.engine.linear_backward_input(d_x, w.out, d_attended);
        finish_weight(ParameterIndex::out(layer), d_x, a.attended);
        d.engine.attention_backward(a.qkv, d.shape, batch.segments, a.attended, a.lse, d_attended, d_qkv);
        d.engine.rope(d_qkv, d.shape, batch.positions, d.rope.cosines(), d.rope.sines(), true);
        norm_and_linear(ParameterIndex::qkv(layer), ParameterIndex::input_norm(layer), d_qkv, w.qkv, a.x_in, w.input_norm,
                        a.rstd_in);
    }
    /// Backward of linear(rms_norm(x)); the normalised input is recomputed rather than kept, and makes room for its gradient.
    void norm_and_linear(std::int64_t weight_parameter, std::int64_t norm_parameter, const Tensor& d_output,
                         const PackedWeight& weight, const Tensor& x, const Tensor& gain, const Tensor& rstd)
    {
        const Tensor gradient = gradients.gradient(weight_parameter);
        const Tensor normed = scratch(d.normed, d.config.hidden), d_normed = normed;
        if (!gradient.empty()) {
            d.engine.rms_norm(x, gain, d.eps, normed, {});
            d.engine.linear_backward_weight(d_output, normed, gradient);
        }
        gradients.ready(weight_parameter);
        d.engine.linear_backward_input(d_output, weight, d_normed);
        d.engine.rms_norm_backward(x, gain, rstd, d_normed, d_x, gradients.gradient(norm_parameter));
        gradients.ready(norm_parameter);
    }
};

/// From the gradient of the hidden states to that of the last layer's output.
void backward_final_norm(Decoder::Impl& d, const PassState& pass, const Tensor& d_hidden, const Tensor& d_x,
                         GradientSink& gradients)
{
    d.engine.fill_zero(d_x);
    if (d_hidden.rows == 0)
        return;
    const Tensor d_selected = d.selected_rows.view(d.engine, d_hidden.rows, d.config.hidden, DType::f32);
    d.engine.fill_zero(d_selected);
    d.engine.rms_norm_backward(pass.x_selected, d.weights.final_norm(), pass.rstd, d_hidden, d_selected,
                               gradients.gradient(ParameterIndex::final_norm(d.config)));
    d.engine.scatter_add_rows(d_selected, pass.batch.selected, d_x);
}

void backward_embedding(Decoder::Impl& d, const PassState& pass, const Tensor& d_x, GradientSink& gradients)
{
    const Tensor gradient = gradients.gradient(ParameterIndex::embedding);
    if (gradient.empty())
        return;
    for (std::size_t i = 0; i < pass.batch.tokens.size(); ++i) { // see DecoderConfig::padding_token
        if (pass.batch.tokens[i] == d.config.padding_token)
            d.engine.fill_zero(d_x.slice_rows(static_cast<std::int64_t>(i), 1));
    }
    d.engine.embed_backward(pass.batch.tokens, d_x, gradient);
}

} // namespace


void Decoder::backward(Pass& pass, const Tensor& d_hidden, GradientSink& gradients)
{
    Impl& d = *impl_;
    auto& state = dynamic_cast<PassState&>(pass);
    const std::int64_t tokens = state.tokens();
    SELM_EXPECT(state.kept && (tokens == 0 || state.saved) && d_hidden.rows == state.hidden_RH.rows);
    LayerBackward backward{d, gradients, state.batch, {}};
    if (tokens > 0) {
        backward.d_x = d.x_last.view(d.engine, tokens, d.config.hidden, DType::f32);
        backward_final_norm(d, state, d_hidden, backward.d_x, gradients);
    }
    gradients.ready(ParameterIndex::final_norm(d.config));
    for (std::int64_t layer = d.config.layers - 1; layer >= 0; --layer) {
        const LayerWeights& w = d.weights.layer(layer, WeightUse::backward);
        if (tokens > 0) {
            const LayerActivations& a = state.layers[static_cast<std::size_t>(layer)];
            if (layer < state.recomputed) {
                d.forward_to_gate_up(w, a, state.batch.positions, d.packed_attention(state.batch.segments, a.lse));
                d.save(a); // rounded as those of other layers
            }
            d.restore(a);
            backward.mlp(layer, a, w);
            backward.attention(layer, a, w);
        } else {
            for (std::int64_t p = ParameterIndex::down(layer); p >= ParameterIndex::input_norm(layer); --p)
                gradients.ready(p);
        }
        d.weights.release(layer);
    }
    if (tokens > 0)
        backward_embedding(d, state, backward.d_x, gradients);
    gradients.ready(ParameterIndex::embedding);
    state.layers.clear();
    if (state.saved)
        d.spare->push_back(std::move(state.saved)); // gate_up holds gradients now: a second backward would be wrong
}

void Decoder::backward_scored(ScoredPass& pass, std::span<const float> g, GradientSink& gradients)
{
    Impl& d = *impl_;
    auto& state = dynamic_cast<ScoredPassState&>(pass);
    SELM_EXPECT(g.size() == state.targets.size());
    const std::int64_t head = ParameterIndex::head(d.config);
    const auto scored = static_cast<std::int64_t>(g.size());
    Tensor d_hidden;
    const PackedWeight& weight = d.weights.head(WeightUse::backward);
    if (scored > 0) {
        d_hidden = d.engine.allocate(scored, d.config.hidden, d.activation);
        d.engine.head_log_probs_backward(state.pass->hidden(), weight, state.targets, state.lse, g, d_hidden,
                                         gradients.gradient(head));
    }
    d.weights.release_head();
    if (head != ParameterIndex::embedding)
        gradients.ready(head);
    backward(*state.pass, d_hidden, gradients);
}

} // namespace selm
