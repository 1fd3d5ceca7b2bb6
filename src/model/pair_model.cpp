#include "selm/model/pair_model.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "pair_model_impl.hpp"
#include "selm/base/error.hpp"

namespace selm {
namespace {

/// Rows of the feed-forward layer at once when nothing is kept: its [rows, I] matrix stays in the cache.
constexpr std::int64_t feed_forward_rows = 512;

} // namespace

void PairBatch::add(std::span<const std::int32_t> ids)
{
    SELM_EXPECT(!ids.empty());
    const auto length = static_cast<std::int64_t>(ids.size());
    segments.push_back({static_cast<std::int64_t>(tokens.size()), length, -1});
    tokens.insert(tokens.end(), ids.begin(), ids.end());
    longest = std::max(longest, length);
}

void PairBatch::add(const PairInput& input)
{
    const auto length = static_cast<std::int64_t>(input.ids.size()), begin = static_cast<std::int64_t>(tokens.size());
    for (const std::int64_t position : {input.source, input.left, input.right})
        SELM_EXPECT(position >= 0 && position < length);
    add(std::span(input.ids));
    sources.insert(sources.end(), {begin + input.source, begin + input.source});
    candidates.insert(candidates.end(), {begin + input.left, begin + input.right});
}

PairModel::Impl::Impl(DebertaConfig model, Engine& used_engine, PairWeights& store)
    : config(model), engine(used_engine), weights(store.impl()), eps(static_cast<float>(model.layer_norm_eps)),
      shape{model.heads,
            model.head_dim(),
            static_cast<float>(1 / std::sqrt(3.0 * static_cast<double>(model.head_dim()))),
            {}}
{
    if (engine.activation_dtype() != DType::f32)
        throw config_error("the pair ranker computes in f32 only (this device's activations are bf16). "
                           "Pass --dtype fp32");
}

void PairModel::Impl::add(const Tensor& from, const Tensor& to)
{
    while (static_cast<std::int64_t>(identity.size()) < from.rows)
        identity.push_back(static_cast<std::int64_t>(identity.size()));
    engine.scatter_add_rows(from, std::span(identity).first(static_cast<std::size_t>(from.rows)), to);
}

void PairModel::Impl::prepare(const PairBatch& batch)
{
    for (const std::int32_t token : batch.tokens) {
        if (token < 0 || token >= config.vocabulary)
            throw data_error(cat("token id ", token, " is not in the ranker's vocabulary of ", config.vocabulary,
                                 " (the tokenizer does not belong to this model). Use the model directory's own"));
    }
    if (static_cast<std::int64_t>(relative_index.size()) < 2 * batch.longest - 1) {
        const std::int64_t longest = std::max<std::int64_t>(batch.longest, 512);
        relative_index.clear();
        for (std::int64_t distance = 1 - longest; distance < longest; ++distance)
            relative_index.push_back(relative_position_index(config, distance));
        shape.relative_index = relative_index;
    }
}

EncoderActivations PairModel::Impl::activations(EncoderBuffers& buffers, std::int64_t tokens, bool keep)
{
    const std::int64_t hidden = config.hidden;
    EncoderActivations a;
    a.x_in = f32(buffers.x_in, tokens, hidden);
    a.qkv = f32(buffers.qkv, tokens, 3 * hidden);
    a.attended = f32(buffers.attended, tokens, hidden);
    a.attention_norm.sum = f32(buffers.sum_mid, tokens, hidden);
    a.raised = f32(buffers.raised, keep ? tokens : std::min(tokens, feed_forward_rows), config.intermediate);
    if (!keep) { // one residual stream in place
        a.x_mid = a.x_out = a.x_in;
        a.output_norm.sum = a.attention_norm.sum;
        return a;
    }
    a.lse = f32(buffers.lse, config.heads, tokens);
    a.x_mid = f32(buffers.x_mid, tokens, hidden);
    a.attention_norm.mean = f32(buffers.mean_mid, 1, tokens);
    a.attention_norm.rstd = f32(buffers.rstd_mid, 1, tokens);
    a.output_norm = {f32(buffers.sum_out, tokens, hidden), f32(buffers.mean_out, 1, tokens),
                     f32(buffers.rstd_out, 1, tokens)};
    return a;
}

Tensor PairModel::Impl::normed_relative()
{
    const std::int64_t positions = config.relative_positions();
    const Tensor normed = f32(relative_normed, positions, config.hidden);
    engine.layer_norm(values(Index::relative_embedding), {}, values(Index::relative_norm_gain),
                      values(Index::relative_norm_bias), eps, normed, f32(relative_mean, 1, positions),
                      f32(relative_rstd, 1, positions));
    return normed;
}

Tensor PairModel::Impl::project_relative(std::int64_t layer, const Tensor& normed)
{
    const Tensor out = f32(relative, normed.rows, 2 * config.hidden);
    engine.linear_bias(normed, weight(layer, Layer::query_weight), values(layer, Layer::query_bias),
                       out.slice_columns(0, config.hidden));
    engine.linear_bias(normed, weight(layer, Layer::key_weight), values(layer, Layer::key_bias),
                       out.slice_columns(config.hidden, config.hidden));
    return out;
}

void PairModel::Impl::embed(const PairBatch& batch, const NormActivations& norm, const Tensor& x)
{
    engine.embed(batch.tokens, values(Index::embedding), norm.sum);
    engine.layer_norm(norm.sum, {}, values(Index::embedding_norm_gain), values(Index::embedding_norm_bias), eps, x,
                      norm.mean, norm.rstd);
}

void PairModel::Impl::forward_layer(std::int64_t layer, const PairBatch& batch, const EncoderActivations& a,
                                    const Tensor& normed)
{
    const std::int64_t hidden = config.hidden, tokens = a.x_in.rows;
    const auto project = [&](const Tensor& x, Layer weight_parameter, Layer bias_parameter, const Tensor& y) {
        engine.linear_bias(x, weight(layer, weight_parameter), values(layer, bias_parameter), y);
    };
    project(a.x_in, Layer::query_weight, Layer::query_bias, a.qkv.slice_columns(0, hidden));
    project(a.x_in, Layer::key_weight, Layer::key_bias, a.qkv.slice_columns(hidden, hidden));
    project(a.x_in, Layer::value_weight, Layer::value_bias, a.qkv.slice_columns(2 * hidden, hidden));
    engine.disentangled_attention(a.qkv, project_relative(layer, normed), shape, batch.segments, a.attended, a.lse);
    project(a.attended, Layer::attention_output_weight, Layer::attention_output_bias, a.attention_norm.sum);
    engine.layer_norm(a.attention_norm.sum, a.x_in, values(layer, Layer::attention_norm_gain),
                      values(layer, Layer::attention_norm_bias), eps, a.x_mid, a.attention_norm.mean,
                      a.attention_norm.rstd);
    const Tensor activated_rows = f32(activated, std::min(tokens, feed_forward_rows), config.intermediate);
    for (std::int64_t begin = 0; begin < tokens; begin += feed_forward_rows) {
        const std::int64_t rows = std::min(feed_forward_rows, tokens - begin);
        const Tensor raised = a.raised.slice_rows(a.raised.rows == tokens ? begin : 0, rows);
        project(a.x_mid.slice_rows(begin, rows), Layer::intermediate_weight, Layer::intermediate_bias, raised);
        engine.gelu(raised, activated_rows.slice_rows(0, rows));
        project(activated_rows.slice_rows(0, rows), Layer::output_weight, Layer::output_bias,
                a.output_norm.sum.slice_rows(begin, rows));
    }
    engine.layer_norm(a.output_norm.sum, a.x_mid, values(layer, Layer::output_norm_gain),
                      values(layer, Layer::output_norm_bias), eps, a.x_out, a.output_norm.mean, a.output_norm.rstd);
}

Tensor PairModel::Impl::encode(const PairBatch& batch)
{
    prepare(batch);
    const EncoderActivations a = activations(work, static_cast<std::int64_t>(batch.tokens.size()), false);
    embed(batch, {a.attention_norm.sum, {}, {}}, a.x_in);
    const Tensor normed = normed_relative();
    for (std::int64_t layer = 0; layer < config.layers; ++layer) {
        if (between_layers)
            between_layers();
        forward_layer(layer, batch, a, normed);
    }
    return a.x_out;
}

std::vector<float> PairModel::Impl::score(const PairBatch& batch, const Tensor& hidden, const Tensor& pairs_2N_2H,
                                          const Tensor& hidden_2N_H)
{
    const auto halves = static_cast<std::int64_t>(batch.sources.size());
    engine.gather_rows(hidden, batch.sources, pairs_2N_2H.slice_columns(0, config.hidden));
    engine.gather_rows(hidden, batch.candidates, pairs_2N_2H.slice_columns(config.hidden, config.hidden));
    engine.linear_bias(pairs_2N_2H, weights.weight(Index::head_hidden_weight(config)),
                       values(Index::head_hidden_bias(config)), hidden_2N_H);
    engine.tanh(hidden_2N_H);
    const Tensor out = f32(head_out, halves, 1);
    engine.linear_bias(hidden_2N_H, weights.weight(Index::head_output_weight(config)),
                       values(Index::head_output_bias(config)), out);
    std::vector<float> scores(batch.sources.size()), logits(batch.segments.size());
    engine.copy_to_host(out, scores.data());
    for (std::size_t i = 0; i < logits.size(); ++i)
        logits[i] = scores[2 * i] - scores[2 * i + 1];
    return logits;
}

PairModel::PairModel(DebertaConfig config, Engine& engine, PairWeights& weights)
    : impl_(std::make_unique<Impl>(std::move(config), engine, weights))
{
}

PairModel::~PairModel() = default;
const DebertaConfig& PairModel::config() const { return impl_->config; }
Engine& PairModel::engine() const { return impl_->engine; }

std::vector<float> PairModel::logits(std::span<const PairInput> inputs, std::int64_t tokens_per_batch)
{
    Impl& m = *impl_;
    std::vector<std::size_t> order(inputs.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return inputs[a].ids.size() > inputs[b].ids.size(); });
    std::vector<float> logits(inputs.size());
    for (std::size_t begin = 0; begin < order.size();) {
        PairBatch batch;
        std::size_t end = begin;
        for (; end < order.size(); ++end) {
            const PairInput& input = inputs[order[end]];
            if (end > begin && static_cast<std::int64_t>(batch.tokens.size() + input.ids.size()) > tokens_per_batch)
                break;
            batch.add(input);
        }
        const auto halves = static_cast<std::int64_t>(batch.sources.size());
        const std::vector<float> values =
            m.score(batch, m.encode(batch), m.f32(m.pairs, halves, 2 * m.config.hidden),
                    m.f32(m.head_hidden, halves, m.config.hidden));
        for (std::size_t i = begin; i < end; ++i)
            logits[order[i]] = values[i - begin];
        begin = end;
    }
    return logits;
}

void PairModel::set_between_layers(std::function<void()> work)
{
    impl_->between_layers = std::move(work);
}

std::vector<float> PairModel::hidden_states(std::span<const std::vector<std::int32_t>> sequences)
{
    PairBatch batch;
    for (const std::vector<std::int32_t>& ids : sequences)
        batch.add(std::span(ids));
    std::vector<float> states(batch.tokens.size() * static_cast<std::size_t>(impl_->config.hidden));
    if (!states.empty())
        impl_->engine.copy_to_host(impl_->encode(batch), states.data());
    return states;
}

double PairModel::cost(const DebertaConfig& config, std::int64_t length)
{
    const auto tokens = static_cast<double>(length), hidden = static_cast<double>(config.hidden);
    const double relative = std::min(static_cast<double>(config.relative_positions()), 2 * tokens);
    const double linear = hidden * (4 * hidden + 2 * static_cast<double>(config.intermediate));
    return static_cast<double>(config.layers) * tokens * (linear + hidden * 2 * (tokens + relative));
}

std::int64_t PairModel::activation_bytes(std::int64_t tokens) const
{
    const DebertaConfig& c = impl_->config;
    const std::int64_t saved = 8 * c.hidden + c.heads + 4 + c.intermediate; // per token and layer
    const std::int64_t working = 10 * c.hidden + 3 * c.intermediate;
    return 4 * (tokens * (c.layers * saved + working) + c.relative_positions() * 8 * c.hidden);
}

} // namespace selm
