#include <algorithm>
#include <utility>

#include "pair_model_impl.hpp"
#include "selm/base/error.hpp"

namespace selm {
namespace {

/// A kept pass. One without inputs (a rank without rows) has empty tensors.
class PassState final : public PairModel::Pass {
  public:
    ~PassState() override
    {
        if (saved)
            spare->push_back(std::move(saved)); // the next kept pass takes the memory over
    }
    std::span<const float> logits() const override { return values; }

    PairBatch batch;
    std::vector<float> values;
    NormActivations embedding_norm;
    std::vector<EncoderActivations> layers;
    Tensor pairs;  ///< [2N, 2H], source and candidate side by side
    Tensor hidden; ///< [2N, H], after tanh
    std::unique_ptr<PairSavedLayers> saved;
    std::shared_ptr<std::vector<std::unique_ptr<PairSavedLayers>>> spare;
};

/// Backward of one batch; d_x [T, H] is the gradient of the hidden states it has come to.
struct Backward {
    using Layer = DebertaLayerParameter;
    using Index = PairParameterIndex;

    PairModel::Impl& m;
    GradientSink& gradients;
    const PairBatch& batch;
    Tensor normed;           ///< relative embeddings after their norm [S, H]
    Tensor d_normed;         ///< their gradient, added up over the layers
    Tensor d_x;

    /// Of y = x W^T + b: dW, db, and dx (overwritten) unless empty.
    void linear(std::int64_t weight_parameter, const Tensor& dy, const Tensor& x, const Tensor& dx)
    {
        const Tensor d_weight = gradients.gradient(weight_parameter), d_bias = gradients.gradient(weight_parameter + 1);
        if (!d_weight.empty())
            m.engine.linear_backward_weight(dy, x, d_weight);
        if (!d_bias.empty())
            m.engine.bias_backward(dy, d_bias);
        if (!dx.empty())
            m.engine.linear_backward_input(dy, m.weights.weight(weight_parameter), dx);
    }
    void ready(std::int64_t weight_parameter)
    {
        gradients.ready(weight_parameter);
        gradients.ready(weight_parameter + 1);
    }
    /// d_x becomes the gradient of the sum before the norm.
    void norm(std::int64_t gain_parameter, const NormActivations& norm)
    {
        m.engine.layer_norm_backward(norm.sum, m.values(gain_parameter), norm.mean, norm.rstd, d_x, d_x,
                                     gradients.gradient(gain_parameter), gradients.gradient(gain_parameter + 1));
        ready(gain_parameter);
    }
    Tensor step() { return m.f32(m.d_step, d_x.rows, m.config.hidden); }

    void head(const PassState& pass, std::span<const float> g);
    void feed_forward(std::int64_t layer, const EncoderActivations& a);
    void attention(std::int64_t layer, const EncoderActivations& a);
    void embeddings(const PassState& pass);
};

void Backward::head(const PassState& pass, std::span<const float> g)
{
    const auto halves = static_cast<std::int64_t>(batch.sources.size());
    std::vector<float> signs;
    for (const float coefficient : g)
        signs.insert(signs.end(), {coefficient, -coefficient});
    const Tensor d_out = m.f32(m.head_out, halves, 1), d_hidden = m.f32(m.head_hidden, halves, m.config.hidden);
    const Tensor d_pairs = m.f32(m.pairs, halves, 2 * m.config.hidden);
    m.engine.copy_from_host(signs.data(), d_out);
    linear(Index::head_output_weight(m.config), d_out, pass.hidden, d_hidden);
    m.engine.tanh_backward(pass.hidden, d_hidden);
    linear(Index::head_hidden_weight(m.config), d_hidden, pass.pairs, d_pairs);
    m.engine.scatter_add_rows(d_pairs.slice_columns(0, m.config.hidden), batch.sources, d_x);
    m.engine.scatter_add_rows(d_pairs.slice_columns(m.config.hidden, m.config.hidden), batch.candidates, d_x);
    ready(Index::head_output_weight(m.config));
    ready(Index::head_hidden_weight(m.config));
}

void Backward::feed_forward(std::int64_t layer, const EncoderActivations& a)
{
    const std::int64_t output = Index::layer(layer, Layer::output_weight),
                       raise = Index::layer(layer, Layer::intermediate_weight);
    norm(Index::layer(layer, Layer::output_norm_gain), a.output_norm);
    const Tensor d_activated = m.f32(m.d_raised, d_x.rows, m.config.intermediate);
    const Tensor activated = m.f32(m.activated, d_x.rows, m.config.intermediate);
    m.engine.linear_backward_input(d_x, m.weights.weight(output), d_activated);
    m.engine.gelu_backward(a.raised, d_activated, activated); // a.raised is its gradient now
    linear(output, d_x, activated, {});
    linear(raise, a.raised, a.x_mid, step());
    m.add(step(), d_x);
    ready(output);
    ready(raise);
}

void Backward::attention(std::int64_t layer, const EncoderActivations& a)
{
    const std::int64_t hidden = m.config.hidden, output = Index::layer(layer, Layer::attention_output_weight);
    norm(Index::layer(layer, Layer::attention_norm_gain), a.attention_norm);
    const Tensor d_attended = m.f32(m.d_hidden, d_x.rows, hidden);
    linear(output, d_x, a.attended, d_attended);
    ready(output);
    const Tensor d_qkv = m.f32(m.d_qkv, d_x.rows, 3 * hidden);
    const Tensor d_relative = m.f32(m.d_relative, normed.rows, 2 * hidden);
    m.engine.disentangled_attention_backward(a.qkv, m.project_relative(layer, normed), m.shape, batch.segments,
                                             a.attended, a.lse, d_attended, d_qkv, d_relative);
    const std::int64_t query = Index::layer(layer, Layer::query_weight);
    for (std::int64_t i = 0; i < 3; ++i) { // query, key, value
        const std::int64_t parameter = query + 2 * i;
        linear(parameter, d_qkv.slice_columns(i * hidden, hidden), a.x_in, step());
        m.add(step(), d_x);
        if (i < 2) { // the relative embeddings share the projections
            const Tensor d_step = m.f32(m.d_step, normed.rows, hidden);
            linear(parameter, d_relative.slice_columns(i * hidden, hidden), normed, d_step);
            m.add(d_step, d_normed);
        }
        ready(parameter);
    }
}

void Backward::embeddings(const PassState& pass)
{
    norm(Index::embedding_norm_gain, pass.embedding_norm);
    const Tensor d_embedding = gradients.gradient(Index::embedding);
    for (std::size_t i = 0; i < batch.tokens.size(); ++i) { // see DebertaConfig::padding_token
        if (batch.tokens[i] == m.config.padding_token)
            m.engine.fill_zero(d_x.slice_rows(static_cast<std::int64_t>(i), 1));
    }
    if (!d_embedding.empty())
        m.engine.embed_backward(batch.tokens, d_x, d_embedding);
    gradients.ready(Index::embedding);
    d_x = d_normed;
    norm(Index::relative_norm_gain,
         {m.values(Index::relative_embedding), m.f32(m.relative_mean, 1, normed.rows),
          m.f32(m.relative_rstd, 1, normed.rows)});
    const Tensor d_relative_embedding = gradients.gradient(Index::relative_embedding);
    if (!d_relative_embedding.empty())
        m.add(d_normed, d_relative_embedding);
    gradients.ready(Index::relative_embedding);
}

} // namespace

std::vector<std::int64_t> pair_backward_order(const DebertaConfig& config)
{
    using Layer = DebertaLayerParameter;
    using Index = PairParameterIndex;
    std::vector<std::int64_t> order;
    const auto add = [&](std::int64_t weight) {
        order.push_back(weight);
        order.push_back(weight + 1); // its bias
    };
    add(Index::head_output_weight(config));
    add(Index::head_hidden_weight(config));
    for (std::int64_t layer = config.layers - 1; layer >= 0; --layer) {
        for (const Layer parameter : {Layer::output_norm_gain, Layer::output_weight, Layer::intermediate_weight,
                                      Layer::attention_norm_gain, Layer::attention_output_weight, Layer::query_weight,
                                      Layer::key_weight, Layer::value_weight})
            add(Index::layer(layer, parameter));
    }
    add(Index::embedding_norm_gain);
    order.push_back(Index::embedding);
    add(Index::relative_norm_gain);
    order.push_back(Index::relative_embedding);
    return order;
}

std::unique_ptr<PairModel::Pass> PairModel::forward_kept(std::span<const PairInput> inputs)
{
    Impl& m = *impl_;
    auto pass = std::make_unique<PassState>();
    for (const PairInput& input : inputs)
        pass->batch.add(input);
    if (inputs.empty())
        return pass;
    m.prepare(pass->batch);
    const auto tokens = static_cast<std::int64_t>(pass->batch.tokens.size());
    pass->spare = m.spare;
    if (m.spare->empty()) {
        pass->saved = std::make_unique<PairSavedLayers>();
        pass->saved->layers.resize(static_cast<std::size_t>(m.config.layers));
    } else {
        pass->saved = std::move(m.spare->back());
        m.spare->pop_back();
    }
    PairSavedLayers& saved = *pass->saved;
    for (EncoderBuffers& buffers : saved.layers)
        pass->layers.push_back(m.activations(buffers, tokens, true));
    for (std::size_t i = 0; i + 1 < pass->layers.size(); ++i)
        pass->layers[i].x_out = pass->layers[i + 1].x_in;
    pass->layers.back().x_out = m.f32(saved.x_out, tokens, m.config.hidden);
    pass->embedding_norm = {m.f32(saved.embedded, tokens, m.config.hidden), m.f32(saved.mean, 1, tokens),
                            m.f32(saved.rstd, 1, tokens)};
    m.embed(pass->batch, pass->embedding_norm, pass->layers.front().x_in);
    const Tensor normed = m.normed_relative();
    for (std::int64_t layer = 0; layer < m.config.layers; ++layer)
        m.forward_layer(layer, pass->batch, pass->layers[static_cast<std::size_t>(layer)], normed);
    const auto halves = static_cast<std::int64_t>(pass->batch.sources.size());
    pass->pairs = m.engine.allocate(halves, 2 * m.config.hidden, DType::f32);
    pass->hidden = m.engine.allocate(halves, m.config.hidden, DType::f32);
    pass->values = m.score(pass->batch, pass->layers.back().x_out, pass->pairs, pass->hidden);
    return pass;
}

void PairModel::backward(Pass& pass, std::span<const float> g, GradientSink& gradients)
{
    Impl& m = *impl_;
    auto& state = dynamic_cast<PassState&>(pass);
    SELM_EXPECT(g.size() == state.values.size());
    if (g.empty()) {
        for (const std::int64_t parameter : pair_backward_order(m.config))
            gradients.ready(parameter);
        return;
    }
    SELM_EXPECT(state.saved != nullptr);
    const Tensor normed = m.normed_relative(), d_normed = m.f32(m.d_relative_normed, normed.rows, m.config.hidden);
    const Tensor d_x = m.f32(m.d_x, static_cast<std::int64_t>(state.batch.tokens.size()), m.config.hidden);
    m.engine.fill_zero(d_normed);
    m.engine.fill_zero(d_x);
    Backward backward{m, gradients, state.batch, normed, d_normed, d_x};
    backward.head(state, g);
    for (std::int64_t layer = m.config.layers - 1; layer >= 0; --layer) {
        backward.feed_forward(layer, state.layers[static_cast<std::size_t>(layer)]);
        backward.attention(layer, state.layers[static_cast<std::size_t>(layer)]);
    }
    backward.embeddings(state);
    state.layers.clear();
    m.spare->push_back(std::move(state.saved)); // it holds gradients now: a second backward would be wrong
}

} // namespace selm
