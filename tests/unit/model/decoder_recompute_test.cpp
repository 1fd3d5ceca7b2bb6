#include <algorithm>
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
using test::engine_named;
using test::usable_numerics;

DecoderConfig four_layers(bool tied)
{
    DecoderConfig config = tiny_config(tied);
    config.layers = 4;
    return config;
}

/// A batch of rows with a trunk and two branches each.
PackedBatch rows_of(std::int64_t rows, std::size_t trunk, std::size_t branch, std::int64_t vocabulary = 53)
{
    PackedBatch batch;
    for (std::int64_t row = 0; row < rows; ++row) {
        const auto seed = static_cast<unsigned>(10 * row);
        batch.add_scored(random_tokens(seed, trunk, vocabulary),
                         std::vector<Branch>{{random_tokens(seed + 1, branch, vocabulary), 0},
                                             {random_tokens(seed + 2, branch / 2, vocabulary), 1}});
    }
    return batch;
}

struct Result {
    std::vector<float> log_probs;
    std::vector<std::vector<float>> gradients;
    std::vector<std::int64_t> order;
    bool operator==(const Result&) const = default;
};

Result step(TinyModel& model, const PackedBatch& batch, const std::set<std::int64_t>& frozen = {})
{
    RecordingSink sink(model.config);
    sink.frozen = frozen;
    const auto pass = model.decoder.forward_scored(batch);
    Result result{{pass->log_probs().begin(), pass->log_probs().end()}, {}, {}};
    model.decoder.backward_scored(*pass, coefficients(batch.targets.size()), sink);
    result.gradients = std::move(sink.values);
    result.order = std::move(sink.order);
    return result;
}

TEST(Recompute, HasTheBitsOfSavedActivations)
{
    for (const std::string& engine : usable_numerics()) {
        for (const bool tied : {true, false}) {
            TinyModel model(four_layers(tied), 1, engine);
            for (const auto& frozen : {std::set<std::int64_t>{}, {0, 2, 4, 7, 12, 13, 24}}) {
                const Result saved = step(model, two_rows(), frozen);
                for (const std::int64_t layers : {1, 2, 3, 4}) {
                    model.decoder.set_recompute(layers);
                    EXPECT_TRUE(step(model, two_rows(), frozen) == saved) << engine << ", " << layers << " layers";
                    step(model, rows_of(2, 90, 40));
                    EXPECT_TRUE(step(model, two_rows(), frozen) == saved) << "after a larger batch";
                    EXPECT_EQ(step(model, {}).order, saved.order);
                }
                model.decoder.set_recompute(0);
                EXPECT_TRUE(step(model, two_rows(), frozen) == saved);
            }
        }
    }
}

TEST(Recompute, PassesAtATimeKeepTheirOwn)
{
    TinyModel model(four_layers(true));
    const Result expected = step(model, two_rows());
    model.decoder.set_recompute(2);
    const auto first = model.decoder.forward_scored(two_rows());
    model.decoder.set_recompute(3);
    const auto second = model.decoder.forward_scored(rows_of(1, 30, 20));
    RecordingSink ignored(model.config), sink(model.config);
    model.decoder.backward_scored(*second, coefficients(second->log_probs().size()), ignored);
    model.decoder.backward_scored(*first, coefficients(first->log_probs().size()), sink);
    EXPECT_EQ(sink.values, expected.gradients);
    EXPECT_THROW(model.decoder.set_recompute(5), Error);
    EXPECT_THROW(model.decoder.set_recompute(-1), Error);
}

struct Shape {
    std::int64_t hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary;
    PackedBatch batch;
};

DecoderConfig config_of(const Shape& shape)
{
    DecoderConfig config = tiny_config(false);
    config.hidden = shape.hidden;
    config.intermediate = shape.intermediate;
    config.layers = shape.layers;
    config.heads = shape.heads;
    config.kv_heads = shape.kv_heads;
    config.head_dim = shape.head_dim;
    config.vocabulary = shape.vocabulary;
    return config;
}

/// One row; several rows; wide attention, narrow MLP; a classifier's share of scored tokens.
std::vector<Shape> shapes()
{
    PackedBatch last;
    last.add_last_token(random_tokens(1, 150), std::vector<Branch>{{random_tokens(2, 60), 0}, {random_tokens(3, 90), 0}});
    return {{20, 28, 2, 4, 2, 6, 53, rows_of(1, 200, 150)},
            {64, 176, 4, 4, 2, 16, 101, rows_of(3, 50, 40, 101)},
            {48, 40, 3, 6, 6, 32, 53, rows_of(2, 100, 30)},
            {96, 256, 1, 4, 1, 24, 53, rows_of(1, 10, 300)},
            {64, 96, 5, 4, 2, 16, 53, last}};
}

std::int64_t bytes_of_a_pass(const Shape& shape, const std::string& engine, std::int64_t recomputed, bool keep)
{
    TinyModel model(config_of(shape), 1, engine);
    model.decoder.set_recompute(recomputed);
    const std::int64_t before = model.engine->allocated_bytes();
    if (keep) {
        RecordingSink sink(model.config);
        const auto pass = model.decoder.forward(shape.batch, true);
        const Tensor d_hidden = model.engine->allocate(pass->hidden().rows, shape.hidden, DType::f32);
        model.engine->fill_zero(d_hidden);
        model.decoder.backward(*pass, d_hidden, sink);
    } else {
        model.decoder.forward(shape.batch, false);
    }
    return model.engine->peak_allocated_bytes() - before;
}

TEST(ActivationBytes, AreWhatAPassTakes)
{
    for (const std::string& engine : usable_numerics()) {
        for (const Shape& shape : shapes()) {
            const auto tokens = static_cast<std::int64_t>(shape.batch.tokens.size());
            const auto scored = static_cast<std::int64_t>(shape.batch.selected.size());
            for (std::int64_t layers = -1; layers <= shape.layers; ++layers) { // -1: a pass that keeps nothing
                const std::int64_t recomputed = std::max<std::int64_t>(layers, 0);
                const std::int64_t bytes =
                    decoder_activation_bytes(config_of(shape), activation_types(*engine_named(engine)), tokens, scored, layers >= 0, recomputed);
                const std::int64_t taken = bytes_of_a_pass(shape, engine, recomputed, layers >= 0);
                EXPECT_LE(taken, bytes) << engine << ", hidden " << shape.hidden << ", recomputed " << layers;
                EXPECT_GE(static_cast<double>(taken), 0.95 * static_cast<double>(bytes))
                    << engine << ", hidden " << shape.hidden << ", recomputed " << layers;
            }
        }
    }
}

TEST(ActivationBytes, DoNotGrowBeyondTheLargestMicrobatch)
{
    const std::vector<PackedBatch> batches = {rows_of(1, 40, 10), rows_of(2, 80, 50), rows_of(1, 7, 110), {},
                                              rows_of(3, 10, 60), rows_of(1, 150, 20)};
    std::int64_t tokens = 0, scored = 0;
    for (const PackedBatch& batch : batches) {
        tokens = std::max(tokens, static_cast<std::int64_t>(batch.tokens.size()));
        scored = std::max(scored, static_cast<std::int64_t>(batch.targets.size()));
    }
    for (const std::string& engine : usable_numerics()) {
        for (const std::int64_t recomputed : {0, 2}) {
            TinyModel model(four_layers(true), 1, engine);
            model.decoder.set_recompute(recomputed);
            const std::int64_t before = model.engine->allocated_bytes();
            std::mt19937 generator(7);
            std::vector<std::size_t> order = {0, 1, 2, 3, 4, 5};
            std::int64_t second_peak = 0;
            for (int round = 0; round < 4; ++round) {
                std::shuffle(order.begin(), order.end(), generator);
                for (const std::size_t i : order)
                    step(model, batches[i]);
                const std::int64_t peak = model.engine->peak_allocated_bytes() - before;
                EXPECT_LE(peak, model.decoder.activation_bytes(tokens, scored)) << engine << ", round " << round;
                second_peak = round <= 1 ? peak : second_peak;
                EXPECT_EQ(peak, second_peak) << engine << ", round " << round;
            }
        }
    }
}

TEST(ActivationBytes, APassThatIsDroppedGivesItsMemoryToTheNext)
{
    TinyModel model(four_layers(true));
    step(model, two_rows());
    const std::int64_t after_one = model.engine->allocated_bytes();
    const std::int64_t peak = model.engine->peak_allocated_bytes();
    for (int i = 0; i < 5; ++i) {
        model.decoder.forward_scored(two_rows()); // no backward
        step(model, two_rows());
        EXPECT_EQ(model.engine->allocated_bytes(), after_one);
        EXPECT_EQ(model.engine->peak_allocated_bytes(), peak);
    }
}

TEST(ActivationBytes, ThePlanRecomputesAsFewLayersAsFit)
{
    const DecoderConfig config = four_layers(false);
    const auto bytes = [&](std::int64_t layers) {
        return decoder_activation_bytes(config, DType::f32, 1000, 400, true, layers);
    };
    for (std::int64_t layers = 0; layers < 3; ++layers) {
        EXPECT_GT(bytes(layers), bytes(layers + 1));
        for (const std::int64_t budget : {bytes(layers), bytes(layers + 1) + (bytes(layers) - bytes(layers + 1)) / 2}) {
            const RecomputePlan plan = plan_recompute(config, DType::f32, 1000, 400, budget);
            EXPECT_TRUE(plan.fits);
            EXPECT_EQ(plan.layers, budget == bytes(layers) ? layers : layers + 1);
            EXPECT_EQ(plan.bytes, bytes(plan.layers));
        }
    }
    EXPECT_EQ(bytes(3), bytes(4)); // the last layer's activations serve the others
    const RecomputePlan plan = plan_recompute(config, DType::f32, 1000, 400, bytes(3) - 1);
    EXPECT_FALSE(plan.fits);
    EXPECT_EQ(plan.bytes, bytes(3));
    EXPECT_EQ(plan.layers, 3);
}

} // namespace
} // namespace selm
