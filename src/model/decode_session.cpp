#include <algorithm>
#include <functional>

#include "decoder_impl.hpp"
#include "selm/base/error.hpp"
#include "selm/model/decoder.hpp"

namespace selm {

struct DecodeSession::Impl {
    Impl(Decoder::Impl& used_decoder, std::int64_t slots, std::int64_t capacity, bool repeat)
        : decoder(used_decoder), repeat_steps(repeat),
          cache(used_decoder.engine.make_cache(used_decoder.config.layers, slots, capacity, used_decoder.shape))
    {
        decoder.rope.cover(std::min(capacity, decoder.config.max_positions));
    }

    Decoder::Impl& decoder;
    bool repeat_steps;
    std::unique_ptr<KvCache> cache;
    Buffer hidden, logits;
    std::vector<std::int32_t> tokens;
    std::vector<std::int32_t> positions;
    std::vector<CachedSpan> spans;
    std::vector<std::int64_t> wanted; ///< rows of the step that want logits
    bool single_tokens = false;       ///< a step of nothing but single tokens, all of which want logits

    void gather(std::span<const DecodeWork> work);
    void fill_up();
    Tensor run();
    Tensor run_layers();
};

/// The step's rows from its work items.
void DecodeSession::Impl::gather(std::span<const DecodeWork> work)
{
    tokens.clear();
    positions.clear();
    spans.clear();
    wanted.clear();
    single_tokens = true;
    for (const DecodeWork& item : work) {
        const auto count = static_cast<std::int64_t>(item.tokens.size());
        SELM_EXPECT(count >= 1 && item.slot >= 0 && item.slot < cache->slots());
        SELM_EXPECT(item.position_begin >= 0 && item.position_begin + count <= cache->capacity());
        SELM_EXPECT(item.prefill ? item.prefix_slot >= 0 || item.position_begin % prefill_tile == 0 : count == 1);
        const auto row = static_cast<std::int64_t>(tokens.size());
        spans.push_back({item.slot, row, count, item.position_begin, item.prefill, item.prefix_slot});
        tokens.insert(tokens.end(), item.tokens.begin(), item.tokens.end());
        for (std::int64_t i = 0; i < count; ++i)
            positions.push_back(static_cast<std::int32_t>(item.position_begin + i));
        if (item.wants_logits)
            wanted.push_back(row + count - 1);
        single_tokens = single_tokens && !item.prefill && item.wants_logits;
    }
    decoder.check_tokens(tokens, positions);
}

/// Rows of no sequence, up to the number that suits the engine.
void DecodeSession::Impl::fill_up()
{
    const std::int64_t rows = decoder.engine.step_rows(static_cast<std::int64_t>(tokens.size()));
    for (auto row = static_cast<std::int64_t>(tokens.size()); row < rows; ++row) {
        spans.push_back({-1, row, 1, 0, false, -1});
        tokens.push_back(0);
        positions.push_back(0);
        wanted.push_back(row);
    }
}

Tensor DecodeSession::Impl::run()
{
    if (!repeat_steps || !single_tokens || tokens.empty())
        return run_layers();
    const auto sequences = static_cast<std::int64_t>(tokens.size());
    fill_up();
    decoder.engine.run_step({tokens, positions, spans, wanted}, *cache, [this] { run_layers(); });
    // run_layers leaves its result in this buffer, whether it ran now or what it did was repeated.
    const auto rows = static_cast<std::int64_t>(wanted.size());
    return logits.view(decoder.engine, rows, decoder.config.vocabulary, DType::f32).slice_rows(0, sequences);
}

Tensor DecodeSession::Impl::run_layers()
{
    Decoder::Impl& d = decoder;
    const auto rows = static_cast<std::int64_t>(tokens.size());
    const auto results = static_cast<std::int64_t>(wanted.size());
    const Tensor logits_RV = logits.view(d.engine, results, d.config.vocabulary, DType::f32);
    if (rows == 0)
        return logits_RV;
    const LayerActivations a = d.activations(d.work.x_in, d.work, rows, false);
    d.engine.embed(tokens, d.weights.embedding(), a.x_in);
    d.weights.release_embedding();
    for (std::int64_t layer = 0; layer < d.config.layers; ++layer) {
        const auto attention = [&](const Tensor& qkv, const Tensor& attended) {
            d.engine.attention_cached(qkv, d.shape, *cache, layer, spans, attended);
        };
        // By reference: a std::function of the lambda itself would take memory in every layer.
        d.forward_layer(d.weights.layer(layer, WeightUse::forward), a, positions, std::cref(attention));
        d.weights.release(layer);
    }
    if (results > 0) {
        const Tensor x_selected = d.selected_rows.view(d.engine, results, d.config.hidden, DType::f32);
        const Tensor hidden_RH = hidden.view(d.engine, results, d.config.hidden, d.activation);
        d.final_norm(a.x_out, wanted, x_selected, {}, hidden_RH);
        d.engine.logits(hidden_RH, d.weights.head(WeightUse::forward), logits_RV);
        d.weights.release_head();
    }
    return logits_RV;
}

DecodeSession::DecodeSession(Decoder& decoder, std::int64_t slots, std::int64_t capacity, bool repeat_steps)
    : impl_(std::make_unique<Impl>(*decoder.impl_, slots, capacity, repeat_steps))
{
    SELM_EXPECT(!decoder.config().sequence_classifier);
}

DecodeSession::~DecodeSession() = default;

Tensor DecodeSession::step(std::span<const DecodeWork> work)
{
    impl_->gather(work);
    return impl_->run();
}

} // namespace selm
