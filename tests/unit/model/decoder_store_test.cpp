#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "selm/base/error.hpp"
#include "tiny_model.hpp"

namespace selm {
namespace {

using test::coefficients;
using test::random_tokens;
using test::RecordingSink;
using test::tiny_config;
using test::TinyModel;
using test::two_rows;
using test::usable_engines;

using Calls = std::vector<std::string>;

/// Hands out another store's weights under handles of its own, records the calls, and checks at each release that nothing
/// but the store itself still shares the ownership of what was handed out.
class RecordingStore final : public WeightStore {
  public:
    RecordingStore(WeightStore& weights, Calls& calls) : weights_(weights), calls_(calls) {}
    ~RecordingStore() override { EXPECT_TRUE(handed_out_.empty()) << "weights that were not released"; }

    const LayerWeights& layer(std::int64_t index, WeightUse use) override
    {
        ask(cat("layer ", index, text(use)));
        layer_ = weights_.layer(index, use);
        for (Tensor* tensor : {&layer_.input_norm, &layer_.post_norm})
            own(*tensor);
        for (PackedWeight* weight : {&layer_.qkv, &layer_.out, &layer_.gate_up, &layer_.down})
            own(*weight);
        return layer_;
    }
    void release(std::int64_t index) override
    {
        layer_ = {};
        let_go(cat("release ", index));
    }
    const Tensor& embedding() override
    {
        ask("embedding");
        embedding_ = weights_.embedding();
        own(embedding_);
        return embedding_;
    }
    void release_embedding() override
    {
        embedding_ = {};
        let_go("release embedding");
    }
    const Tensor& final_norm() override { return weights_.final_norm(); }
    const PackedWeight& head(WeightUse use) override
    {
        ask("head" + text(use));
        head_ = weights_.head(use);
        own(head_);
        return head_;
    }
    void release_head() override
    {
        head_ = {};
        let_go("release head");
    }

  private:
    static std::string text(WeightUse use) { return use == WeightUse::forward ? " forward" : " backward"; }
    void ask(const std::string& call)
    {
        EXPECT_TRUE(handed_out_.empty()) << call << ": the weights before it were not released";
        calls_.push_back(call);
    }
    void own(Tensor& tensor)
    {
        tensor.storage = std::make_shared<Tensor>(tensor);
        handed_out_.emplace_back(tensor.storage);
    }
    void own(PackedWeight& weight)
    {
        for (Tensor* tensor : {&weight.source, &weight.forward, &weight.backward})
            own(*tensor);
    }
    void let_go(const std::string& call)
    {
        EXPECT_FALSE(handed_out_.empty()) << call;
        for (const auto& handle : handed_out_)
            EXPECT_TRUE(handle.expired()) << call << ": a weight is still held";
        handed_out_.clear();
        calls_.push_back(call);
    }

    WeightStore& weights_;
    Calls& calls_;
    LayerWeights layer_;
    Tensor embedding_;
    PackedWeight head_;
    std::vector<std::weak_ptr<void>> handed_out_;
};

class RecordingReady final : public GradientSink {
  public:
    RecordingReady(const DecoderConfig& config, Calls& calls) : gradients_(config), calls_(calls) {}
    Tensor gradient(std::int64_t parameter) override { return gradients_.gradient(parameter); }
    void ready(std::int64_t parameter) override { calls_.push_back(cat("ready ", parameter)); }

  private:
    RecordingSink gradients_;
    Calls& calls_;
};

PackedBatch unscored_batch()
{
    PackedBatch batch;
    batch.add_scored(random_tokens(1, 5), std::vector<Branch>{{random_tokens(2, 3), 3}});
    return batch;
}

/// The calls of a scored pass with its backward, and of log_probs.
Calls calls_of(TinyModel& model, const PackedBatch& batch)
{
    Calls calls;
    RecordingStore store(model.weights, calls);
    Decoder decoder(model.config, *model.engine, store);
    RecordingReady sink(model.config, calls);
    const auto pass = decoder.forward_scored(batch);
    calls.push_back("backward:");
    decoder.backward_scored(*pass, coefficients(batch.targets.size()), sink);
    calls.push_back("log_probs:");
    EXPECT_EQ(decoder.log_probs(batch), std::vector<float>(pass->log_probs().begin(), pass->log_probs().end()));
    return calls;
}

TEST(WeightStore, EveryBatchMakesTheSameCalls)
{
    const Calls forward = {"embedding",       "release embedding", "layer 0 forward", "release 0",
                           "layer 1 forward", "release 1",         "head forward",    "release head"};
    for (const bool tied : {true, false}) {
        Calls expected = forward;
        expected.insert(expected.end(), {"backward:", "head backward", "release head"});
        if (!tied)
            expected.push_back("ready 14");
        expected.insert(expected.end(), {"ready 13", "layer 1 backward", "ready 12", "ready 11", "ready 10", "ready 9", "ready 8",
                                         "ready 7", "release 1", "layer 0 backward", "ready 6", "ready 5", "ready 4", "ready 3",
                                         "ready 2", "ready 1", "release 0", "ready 0", "log_probs:"});
        expected.insert(expected.end(), forward.begin(), forward.end());
        for (const std::string& engine : usable_engines()) {
            TinyModel model(tiny_config(tied), 1, engine);
            EXPECT_EQ(calls_of(model, two_rows()), expected);
            EXPECT_EQ(calls_of(model, unscored_batch()), expected);
            EXPECT_EQ(calls_of(model, {}), expected);
        }
    }
}

TEST(WeightStore, APassWithoutTheHeadMakesTheSameCalls)
{
    DecoderConfig config = tiny_config(true);
    config.sequence_classifier = true;
    TinyModel model(config);
    const auto calls = [&](const PackedBatch& batch) {
        Calls out;
        RecordingStore store(model.weights, out);
        Decoder decoder(config, *model.engine, store);
        RecordingReady sink(config, out);
        const auto pass = decoder.forward(batch, true);
        const auto rows = static_cast<std::int64_t>(batch.selected.size());
        const Tensor d_hidden = model.engine->allocate(rows, config.hidden, DType::f32);
        model.engine->fill_zero(d_hidden);
        decoder.backward(*pass, d_hidden, sink);
        return out;
    };
    const Calls normal = calls(two_rows());
    EXPECT_EQ(normal.size(), 2 + 2 * 2 + 2 * 2 + 14);
    EXPECT_EQ(calls(unscored_batch()), normal);
    EXPECT_EQ(calls({}), normal);
}

TEST(WeightStore, BadInputThrowsBeforeTheFirstCall)
{
    TinyModel model(true);
    Calls calls;
    RecordingStore store(model.weights, calls);
    Decoder decoder(model.config, *model.engine, store);
    PackedBatch batch;
    batch.add_scored(std::vector<std::int32_t>{1, 99}, std::vector<Branch>{{random_tokens(2, 3), 0}});
    EXPECT_THROW(decoder.forward_scored(batch), Error);
    EXPECT_THROW(decoder.log_probs(batch), Error);
    EXPECT_TRUE(calls.empty());
}

TEST(WeightStore, BackwardOrderAndGroups)
{
    DecoderConfig config = tiny_config(false);
    EXPECT_EQ(backward_order(config), (std::vector<std::int64_t>{14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0}));
    EXPECT_EQ(decoder_parameter_groups(config), (std::vector<std::int64_t>{1, 7, 13, 14, 15}));
    config.tied_embeddings = true;
    EXPECT_EQ(backward_order(config), (std::vector<std::int64_t>{13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0}));
    EXPECT_EQ(decoder_parameter_groups(config), (std::vector<std::int64_t>{1, 7, 13, 14}));
    config.sequence_classifier = true;
    EXPECT_EQ(backward_order(config), (std::vector<std::int64_t>{14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0}));
    EXPECT_EQ(decoder_parameter_groups(config), (std::vector<std::int64_t>{1, 7, 13, 15}));
    EXPECT_EQ(decoder_parameter_groups(config).back(), static_cast<std::int64_t>(decoder_parameters(config).size()));
}

TEST(Decoder, FrozenParametersLeaveTheOthersBits)
{
    for (const std::string& engine : usable_engines()) {
        for (const bool tied : {true, false}) {
            TinyModel model(tiny_config(tied), 1, engine);
            const auto g = coefficients(two_rows().targets.size());
            RecordingSink all(model.config);
            model.decoder.backward_scored(*model.decoder.forward_scored(two_rows()), g, all);
            const auto parameters = static_cast<std::int64_t>(all.values.size());
            for (std::int64_t frozen = 0; frozen <= parameters; ++frozen) {
                RecordingSink sink(model.config);
                for (std::int64_t p = 0; p < parameters; ++p) {
                    if (p == frozen || (frozen == parameters && p % 4 != 2))
                        sink.frozen.insert(p);
                }
                model.decoder.backward_scored(*model.decoder.forward_scored(two_rows()), g, sink);
                EXPECT_EQ(sink.order, backward_order(model.config));
                for (std::int64_t p = 0; p < parameters; ++p) {
                    const auto i = static_cast<std::size_t>(p);
                    const std::vector<float> none(all.values[i].size());
                    EXPECT_EQ(sink.values[i], sink.frozen.contains(p) ? none : all.values[i])
                        << engine << " " << p << " " << frozen;
                    EXPECT_NE(all.values[i], none);
                }
            }
        }
    }
}

} // namespace
} // namespace selm
