#include "selm/model/decoder.hpp"

#include <algorithm>
#include <numeric>

#include <gtest/gtest.h>

#include "rope.hpp"
#include "selm/base/error.hpp"
#include "temporary_directory.hpp"
#include "tiny_model.hpp"

namespace selm {
namespace {

using test::coefficients;
using test::largest_difference;
using test::random_tokens;
using test::RecordingSink;
using test::tiny_config;
using test::TinyModel;
using test::TinyParameters;
using test::two_rows;

using Ids = std::vector<std::int32_t>;

Ids joined(const Ids& a, const Ids& b)
{
    Ids out = a;
    out.insert(out.end(), b.begin(), b.end());
    return out;
}

TEST(Decoder, PackedBranchesEqualSequencesOfTheirOwn)
{
    for (const bool tied : {true, false}) {
        TinyModel model(tied);
        const Ids trunk = random_tokens(1, 70);
        const std::vector<Branch> branches = {{random_tokens(2, 65), 0}, {random_tokens(3, 7), 2}, {random_tokens(4, 1), 0}};
        PackedBatch packed;
        packed.add_scored(random_tokens(9, 5), std::vector<Branch>{{random_tokens(8, 3), 0}}); // a row before
        const std::size_t before = packed.targets.size();
        packed.add_scored(trunk, branches);
        std::vector<float> alone;
        for (const Branch& branch : branches) {
            PackedBatch single;
            single.add_scored(Ids{trunk[0]}, std::vector<Branch>{{joined({trunk.begin() + 1, trunk.end()}, branch.tokens),
                                                                  69 + branch.unscored}});
            const auto values = model.decoder.log_probs(single);
            alone.insert(alone.end(), values.begin(), values.end());
        }
        const auto values = model.decoder.log_probs(packed);
        EXPECT_LT(largest_difference(std::span(values).subspan(before), alone), 1e-5);
        EXPECT_LT(*std::max_element(alone.begin(), alone.end()), 0.0F);
    }
}

TEST(Decoder, AKeptPassHasTheSameBits)
{
    TinyModel model(true);
    const auto pass = model.decoder.forward_scored(two_rows());
    const auto values = model.decoder.log_probs(two_rows());
    EXPECT_TRUE(std::equal(values.begin(), values.end(), pass->log_probs().begin(), pass->log_probs().end()));
}

TEST(Decoder, LogProbsAreNormalised)
{
    TinyModel model(false);
    const Ids trunk = random_tokens(1, 12);
    std::vector<Branch> all;
    for (std::int32_t token = 0; token < 53; ++token)
        all.push_back({{token}, 0});
    PackedBatch batch;
    batch.add_scored(trunk, all);
    const auto values = model.decoder.log_probs(batch);
    const double total = std::accumulate(values.begin(), values.end(), 0.0, [](double s, float v) { return s + std::exp(v); });
    EXPECT_NEAR(total, 1.0, 1e-5);
}

double objective(TinyModel& model, const PackedBatch& batch, std::span<const float> g)
{
    const auto values = model.decoder.log_probs(batch);
    double sum = 0;
    for (std::size_t i = 0; i < g.size(); ++i)
        sum += static_cast<double>(g[i]) * static_cast<double>(values[i]);
    return sum;
}

/// Central difference of the objective along a unit direction of one parameter.
double slope(TinyModel& model, std::size_t parameter, const std::vector<float>& direction, const PackedBatch& batch,
             std::span<const float> g)
{
    constexpr double step = 4e-3; // truncation error step^2, rounding error 1e-5 / step: both below the tolerance
    std::vector<float>& values = model.parameters.values[parameter];
    const std::vector<float> original = values;
    double sides[2] = {};
    for (const int side : {0, 1}) {
        for (std::size_t i = 0; i < values.size(); ++i)
            values[i] = static_cast<float>(static_cast<double>(original[i]) + (side ? step : -step) * static_cast<double>(direction[i]));
        model.weights.refresh();
        sides[side] = objective(model, batch, g);
    }
    values = original;
    model.weights.refresh();
    return (sides[1] - sides[0]) / (2 * step);
}

double norm_of(std::span<const float> values)
{
    return std::sqrt(std::inner_product(values.begin(), values.end(), values.begin(), 0.0));
}

TEST(Decoder, GradientsEqualFiniteDifferences)
{
    for (const bool tied : {true, false}) {
        TinyModel model(tied);
        const PackedBatch batch = two_rows();
        const auto g = coefficients(batch.targets.size());
        RecordingSink sink(model.config);
        const auto pass = model.decoder.forward_scored(batch);
        model.decoder.backward_scored(*pass, g, sink);
        const auto specs = decoder_parameters(model.config);
        for (std::size_t p = 0; p < specs.size(); ++p) {
            const std::vector<float>& gradient = sink.values[p];
            const double norm = norm_of(gradient);
            ASSERT_GT(norm, 1e-3) << specs[p].name;
            // along the gradient the slope is its norm: right size; along a random direction: right in all coordinates
            std::vector<float> direction = gradient;
            std::vector<float> random(gradient.size());
            std::mt19937 generator(static_cast<unsigned>(p));
            std::normal_distribution<float> normal;
            std::generate(random.begin(), random.end(), [&] { return normal(generator); });
            const double random_norm = norm_of(random);
            double expected = 0;
            for (std::size_t i = 0; i < gradient.size(); ++i) {
                direction[i] = static_cast<float>(static_cast<double>(direction[i]) / norm);
                random[i] = static_cast<float>(static_cast<double>(random[i]) / random_norm);
                expected += static_cast<double>(random[i]) * static_cast<double>(gradient[i]);
            }
            EXPECT_NEAR(slope(model, p, direction, batch, g), norm, 0.01 * norm + 5e-3) << specs[p].name;
            EXPECT_NEAR(slope(model, p, random, batch, g), expected, 0.01 * norm + 5e-3) << specs[p].name;
        }
    }
}

TEST(Decoder, BackwardAddsAndAnnouncesEachParameterOnce)
{
    for (const bool tied : {true, false}) {
        TinyModel model(tied);
        const auto g = coefficients(two_rows().targets.size());
        RecordingSink once(model.config);
        RecordingSink twice(model.config);
        for (RecordingSink* sink : {&once, &twice, &twice}) {
            const auto pass = model.decoder.forward_scored(two_rows());
            sink->order.clear();
            model.decoder.backward_scored(*pass, g, *sink);
        }
        std::vector<std::int64_t> expected = tied ? std::vector<std::int64_t>{} : std::vector<std::int64_t>{14};
        for (std::int64_t i = 13; i >= 0; --i)
            expected.push_back(i);
        EXPECT_EQ(once.order, expected);
        EXPECT_EQ(twice.order, expected);
        for (std::size_t p = 0; p < once.values.size(); ++p) {
            for (float& value : once.values[p])
                value *= 2;
            EXPECT_LT(largest_difference(once.values[p], twice.values[p]), 2e-5 * norm_of(once.values[p]));
        }
    }
}

TEST(Decoder, MergedBranchesHaveTheGradientOfSeparateOnes)
{
    TinyModel model(true);
    const Ids trunk = random_tokens(1, 9);
    const Branch branch{random_tokens(2, 6), 0};
    const auto gradients = [&](std::vector<Branch> branches, const std::vector<float>& g) {
        PackedBatch batch;
        batch.add_scored(trunk, branches);
        RecordingSink sink(model.config);
        model.decoder.backward_scored(*model.decoder.forward_scored(batch), g, sink);
        return sink.values;
    };
    std::vector<float> separate(12, 0.5F);
    std::fill(separate.begin() + 6, separate.end(), -0.2F);
    const auto two = gradients({branch, branch}, separate);
    const auto one = gradients({branch}, std::vector<float>(6, 0.3F));
    for (std::size_t p = 0; p < one.size(); ++p)
        EXPECT_LT(largest_difference(one[p], two[p]), 1e-5 * (1 + norm_of(one[p])));
}

TEST(Decoder, TwoPassesAtATimeDoNotDisturbEachOther)
{
    TinyModel model(true);
    PackedBatch other;
    other.add_scored(random_tokens(30, 40), std::vector<Branch>{{random_tokens(31, 25), 0}});
    const auto g = coefficients(two_rows().targets.size());
    RecordingSink expected(model.config);
    model.decoder.backward_scored(*model.decoder.forward_scored(two_rows()), g, expected);
    const auto first = model.decoder.forward_scored(two_rows());
    const auto second = model.decoder.forward_scored(other);
    model.decoder.log_probs(other);
    RecordingSink ignored(model.config);
    model.decoder.backward_scored(*second, coefficients(25), ignored);
    RecordingSink sink(model.config);
    model.decoder.backward_scored(*first, g, sink);
    EXPECT_EQ(sink.values, expected.values);
}

TEST(Decoder, ThePaddingTokenIsNotTrainedAsAnInput)
{
    DecoderConfig config = tiny_config(false);
    config.padding_token = 17;
    TinyModel model(config);
    PackedBatch batch;
    batch.add_scored(Ids{3, 17, 5}, std::vector<Branch>{{{17, 6, 2}, 0}});
    RecordingSink sink(config);
    model.decoder.backward_scored(*model.decoder.forward_scored(batch), coefficients(3), sink);
    const auto row = [&](std::int64_t token) {
        return norm_of(std::span(sink.values[0]).subspan(static_cast<std::size_t>(token * config.hidden), 20));
    };
    EXPECT_EQ(row(17), 0.0);
    EXPECT_GT(row(5), 0.0);
    EXPECT_GT(norm_of(std::span(sink.values[14]).subspan(17 * 20, 20)), 0.0); // but the head's row is
}

TEST(Decoder, NoTokensAndNoScoredTokens)
{
    TinyModel model(true);
    RecordingSink sink(model.config);
    model.decoder.backward_scored(*model.decoder.forward_scored({}), {}, sink);
    EXPECT_EQ(sink.order.size(), 14U);
    PackedBatch unscored;
    unscored.add_scored(random_tokens(1, 5), std::vector<Branch>{{random_tokens(2, 3), 3}});
    sink.order.clear();
    model.decoder.backward_scored(*model.decoder.forward_scored(unscored), {}, sink);
    EXPECT_EQ(sink.order.size(), 14U);
    for (const auto& values : sink.values)
        EXPECT_EQ(norm_of(values), 0.0);
    EXPECT_TRUE(model.decoder.log_probs({}).empty());
}

TEST(Decoder, NotANumberReachesTheResults)
{
    TinyModel model(true);
    model.parameters.values[static_cast<std::size_t>(ParameterIndex::gate_up(0))][3] = NAN;
    model.weights.refresh();
    const auto pass = model.decoder.forward_scored(two_rows());
    EXPECT_TRUE(std::isnan(pass->log_probs()[0]));
    RecordingSink sink(model.config);
    model.decoder.backward_scored(*pass, coefficients(two_rows().targets.size()), sink);
    EXPECT_FALSE(std::isfinite(norm_of(sink.values[static_cast<std::size_t>(ParameterIndex::down(0))])));
}

TEST(Decoder, BadTokensAndPositionsAreNamed)
{
    TinyModel model(true);
    const auto message = [&](const Ids& ids) {
        PackedBatch batch;
        batch.add_last_token(ids, std::vector<Branch>(1));
        try {
            model.decoder.forward(batch, false);
        } catch (const Error& error) {
            EXPECT_EQ(error.code(), ExitCode::bad_data);
            return std::string(error.what());
        }
        return std::string("accepted");
    };
    EXPECT_NE(message({1, 53, 2}).find("token id 53"), std::string::npos);
    EXPECT_NE(message({1, -1}).find("token id -1"), std::string::npos);
    EXPECT_NE(message(random_tokens(1, 401)).find("position 400"), std::string::npos);
    EXPECT_EQ(message(random_tokens(1, 400)), "accepted");
}

/// Logits of the given positions from a packed pass.
std::vector<float> packed_logits(TinyModel& model, const Ids& ids, std::int64_t first)
{
    PackedBatch batch;
    batch.add_last_token(ids, {});
    for (std::int64_t i = first; i < static_cast<std::int64_t>(ids.size()); ++i)
        batch.selected.push_back(i);
    const auto pass = model.decoder.forward(batch, false);
    std::vector<float> out(batch.selected.size() * 53);
    model.engine->logits(pass->hidden(), model.weights.head(WeightUse::forward), borrow_f32(out.data(), pass->hidden().rows, 53));
    return out;
}

TEST(DecodeSession, EqualsAPackedPass)
{
    TinyModel model(true);
    const Ids a = random_tokens(1, 150);
    const Ids b = random_tokens(2, 20);
    DecodeSession session(model.decoder, 3, 160);
    const auto piece = [](const Ids& ids, std::size_t begin, std::size_t count) { return std::span(ids).subspan(begin, count); };
    // b decodes from token 3 on while a is still filled in chunks; slot 1 stays empty
    std::vector<float> logits_a;
    std::vector<float> logits_b;
    std::size_t a_done = 0;
    for (std::size_t b_done = 0; b_done < b.size();) {
        std::vector<DecodeWork> work;
        const std::size_t b_count = b_done == 0 ? 3 : 1;
        if (a_done < 140) {
            const std::size_t count = std::min<std::size_t>(64, 140 - a_done);
            work.push_back({2, static_cast<std::int64_t>(a_done), piece(a, a_done, count), true, a_done + count == 140});
            a_done += count;
        } else if (a_done < a.size()) {
            work.push_back({2, static_cast<std::int64_t>(a_done), piece(a, a_done, 1), false, true});
            ++a_done;
        }
        work.push_back({0, static_cast<std::int64_t>(b_done), piece(b, b_done, b_count), b_done == 0, true});
        b_done += b_count;
        const Tensor logits = session.step(work);
        std::int64_t row = 0;
        if (work.size() == 2 && work[0].wants_logits)
            logits_a.insert(logits_a.end(), logits.row_f32(row), logits.row_f32(row) + 53), ++row;
        logits_b.insert(logits_b.end(), logits.row_f32(row), logits.row_f32(row) + 53);
        EXPECT_EQ(logits.rows, row + 1);
    }
    ASSERT_EQ(a_done, a.size());
    EXPECT_LT(largest_difference(logits_a, packed_logits(model, a, 139)), 1e-5);
    EXPECT_LT(largest_difference(logits_b, packed_logits(model, b, 2)), 1e-5);
}

TEST(DecodeSession, ASlotCanBeUsedAgain)
{
    TinyModel model(true);
    DecodeSession session(model.decoder, 1, 80);
    const Ids first = random_tokens(1, 70);
    const Ids second = random_tokens(2, 30);
    session.step(std::vector<DecodeWork>{{0, 0, std::span(first).first(64), true, false}});
    const Tensor none = session.step(std::vector<DecodeWork>{{0, 64, std::span(first).subspan(64), true, false}});
    EXPECT_EQ(none.rows, 0);
    const Tensor logits = session.step(std::vector<DecodeWork>{{0, 0, second, true, true}});
    EXPECT_LT(largest_difference({logits.f32(), 53}, packed_logits(model, second, 29)), 1e-5);
    EXPECT_EQ(session.step({}).rows, 0);
}

TEST(DecodeSession, WorkThatDoesNotFitIsRefused)
{
    TinyModel model(true);
    DecodeSession session(model.decoder, 1, 80);
    const Ids ids = random_tokens(1, 90);
    const auto refused = [&](const DecodeWork& work) { EXPECT_THROW(session.step(std::vector<DecodeWork>{work}), Error); };
    refused({1, 0, std::span(ids).first(3), true, true});   // no such slot
    refused({0, 0, ids, true, true});                       // more than the capacity
    refused({0, 32, std::span(ids).first(3), true, true});  // a chunk between tiles
    refused({0, 5, std::span(ids).first(2), false, true});  // two tokens in a decoding step
    refused({0, 0, {}, true, true});
    const Ids bad = {99};
    refused({0, 0, bad, true, true});
}

TEST(Rope, InverseFrequenciesAreThoseOfFloat32)
{
    // torch 2.11: 1.0 / (100000.0 ** (torch.arange(0, 64, 2, dtype=torch.int64).float() / 64)), elements 0, 1, 7, 31
    const auto values = rope_inverse_frequencies(100000.0, 64);
    ASSERT_EQ(values.size(), 32U);
    EXPECT_EQ(values[0], 1.0F);
    EXPECT_FLOAT_EQ(values[1], 0.69783060F);
    EXPECT_FLOAT_EQ(values[7], 0.080584219F);
    EXPECT_FLOAT_EQ(values[31], 1.4330126e-05F);
}

TEST(Rope, Llama3ScalingStretchesLongWavelengths)
{
    // transformers 5.23, _compute_llama3_parameters with theta 500000, head_dim 128 and Llama 3.1's values (factor 8,
    // factors 1 and 4, 8192 positions): elements 0 and 28 are kept, 30 and 34 mixed, 36 and 63
    // divided by 8
    const auto values = rope_inverse_frequencies(500000.0, 128, Llama3RopeScaling{8, 1, 4, 8192});
    const auto plain = rope_inverse_frequencies(500000.0, 128);
    ASSERT_EQ(values.size(), 64U);
    EXPECT_EQ(values[0], 1.0F);
    EXPECT_EQ(values[28], plain[28]);
    EXPECT_FLOAT_EQ(values[30], 0.0013718937F);
    EXPECT_FLOAT_EQ(values[34], 0.00017850779F);
    EXPECT_EQ(values[36], plain[36] / 8);
    EXPECT_FLOAT_EQ(values[63], 3.0689259e-07F);
}

/// Checkpoint of a tiny model.
void write_checkpoint(const std::string& directory, const DecoderConfig& config, const TinyParameters& parameters)
{
    write_model_weights(directory, config, parameters.tensors, DType::f32);
}

TEST(ResidentWeights, ACheckpointGivesTheSameBitsAsFlatParameters)
{
    for (const bool tied : {true, false}) {
        TinyModel flat(tied);
        const test::TemporaryDirectory directory;
        write_checkpoint(directory.path(""), flat.config, flat.parameters);
        const SafetensorsReader reader(directory.path(""));
        EXPECT_EQ(reader.has("lm_head.weight"), !tied);
        ResidentWeights weights(flat.config, *flat.engine, reader, {.dtype = DType::f32}, {});
        Decoder decoder(flat.config, *flat.engine, weights);
        EXPECT_EQ(decoder.log_probs(two_rows()), flat.decoder.log_probs(two_rows()));
    }
}

TEST(ResidentWeights, SeveralPartsFillOneMemory)
{
    TinyModel flat(true);
    const test::TemporaryDirectory directory;
    write_checkpoint(directory.path(""), flat.config, flat.parameters);
    const SafetensorsReader reader(directory.path(""));
    const std::int64_t elements = ResidentWeights::memory_elements(flat.config, *flat.engine, false);
    const Tensor memory = flat.engine->allocate(1, elements, DType::f32);
    std::vector<std::unique_ptr<ResidentWeights>> parts;
    for (int part = 0; part < 3; ++part)
        parts.push_back(std::make_unique<ResidentWeights>(
            flat.config, *flat.engine, reader,
            ResidentWeights::Options{.dtype = DType::f32, .with_backward = false, .part = part, .parts = 3}, memory));
    for (const auto& part : parts) {
        Decoder decoder(flat.config, *flat.engine, *part);
        EXPECT_EQ(decoder.log_probs(two_rows()), flat.decoder.log_probs(two_rows()));
    }
}

TEST(ResidentWeights, SeveralPartsPackFlatParametersIntoOneMemory)
{
    for (const bool tied : {true, false}) {
        TinyModel model(tied);
        const std::int64_t elements = ResidentWeights::panel_elements(model.config, *model.engine, true);
        EXPECT_LT(elements, ResidentWeights::memory_elements(model.config, *model.engine, true));
        const Tensor memory = model.engine->allocate(1, elements, DType::f32);
        std::vector<std::unique_ptr<ResidentWeights>> parts;
        for (int part = 0; part < 3; ++part)
            parts.push_back(std::make_unique<ResidentWeights>(
                model.config, *model.engine, model.parameters.tensors,
                ResidentWeights::Options{.dtype = DType::f32, .with_backward = true, .part = part, .parts = 3}, memory));
        for (int step = 0; step < 2; ++step) {
            RecordingSink expected(model.config);
            model.decoder.backward_scored(*model.decoder.forward_scored(two_rows()), coefficients(two_rows().targets.size()),
                                          expected);
            for (const auto& part : parts) {
                Decoder decoder(model.config, *model.engine, *part);
                EXPECT_EQ(decoder.log_probs(two_rows()), model.decoder.log_probs(two_rows()));
                RecordingSink sink(model.config);
                decoder.backward_scored(*decoder.forward_scored(two_rows()), coefficients(two_rows().targets.size()), sink);
                EXPECT_EQ(sink.values, expected.values);
            }
            for (auto& values : model.parameters.values)
                std::for_each(values.begin(), values.end(), [](float& value) { value *= 0.9F; });
            model.weights.refresh();
            for (const auto& part : parts)
                part->refresh();
        }
    }
}

TEST(ResidentWeights, Bf16RoundsTheWeights)
{
    TinyModel exact(true);
    const test::TemporaryDirectory directory;
    write_checkpoint(directory.path(""), exact.config, exact.parameters);
    const SafetensorsReader reader(directory.path(""));
    ResidentWeights weights(exact.config, *exact.engine, reader, {.dtype = DType::bf16}, {});
    Decoder decoder(exact.config, *exact.engine, weights);
    const auto rounded = decoder.log_probs(two_rows());
    EXPECT_NE(rounded, exact.decoder.log_probs(two_rows()));
    for (auto& values : exact.parameters.values)
        round_to_bf16(values);
    exact.weights.refresh();
    EXPECT_EQ(rounded, exact.decoder.log_probs(two_rows()));
}

TEST(ResidentWeights, ABf16CheckpointIsUsedAsItIs)
{
    for (const bool tied : {true, false}) {
        TinyModel flat(tied);
        const test::TemporaryDirectory directory;
        write_model_weights(directory.path(""), flat.config, flat.parameters.tensors, DType::bf16);
        for (auto& values : flat.parameters.values)
            round_to_bf16(values);
        flat.weights.refresh();
        const SafetensorsReader reader(directory.path(""));
        for (const DType dtype : {DType::bf16, DType::f32}) {
            ResidentWeights weights(flat.config, *flat.engine, reader, {.dtype = dtype}, {});
            EXPECT_EQ(weights.embedding().dtype, dtype);
            Decoder decoder(flat.config, *flat.engine, weights);
            EXPECT_EQ(decoder.log_probs(two_rows()), flat.decoder.log_probs(two_rows()));
        }
        EXPECT_LT(ResidentWeights::memory_elements(flat.config, *flat.engine, false, DType::bf16),
                  ResidentWeights::memory_elements(flat.config, *flat.engine, false, DType::f32));
    }
}

TEST(ResidentWeights, AMissingTensorIsNamed)
{
    const DecoderConfig untied = tiny_config(false);
    const DecoderConfig tied = tiny_config(true);
    const TinyParameters parameters(tied);
    const auto engine = make_engine({.engine = "aten"});
    const test::TemporaryDirectory directory;
    write_checkpoint(directory.path(""), tied, parameters);
    const SafetensorsReader reader(directory.path(""));
    try {
        ResidentWeights weights(untied, *engine, reader, {.dtype = DType::f32}, {});
        FAIL();
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::bad_data);
        EXPECT_NE(std::string(error.what()).find("lm_head.weight"), std::string::npos);
    }
}

TEST(SequenceClassifier, RewardIsTheScoreOfTheLastHiddenState)
{
    DecoderConfig config = tiny_config(true);
    config.sequence_classifier = true;
    TinyModel model(config);
    PackedBatch batch;
    batch.add_last_token(random_tokens(1, 9), std::vector<Branch>{{random_tokens(2, 6), 0}, {{}, 0}});
    const auto pass = model.decoder.forward(batch, true);
    const Tensor hidden = pass->hidden();
    ASSERT_EQ(hidden.rows, 2);
    std::vector<float> scores(2);
    model.engine->linear(hidden, model.weights.head(WeightUse::forward), borrow_f32(scores.data(), 2, 1));
    const std::vector<float>& score = model.parameters.values.back();
    const double expected = std::inner_product(score.begin(), score.end(), hidden.row_f32(1), 0.0);
    EXPECT_NEAR(scores[1], expected, 1e-5);
    RecordingSink sink(config);
    model.decoder.backward(*pass, model.engine->allocate(2, 20, DType::f32), sink);
    EXPECT_EQ(sink.order.size(), 14U); // everything below the head
    EXPECT_THROW(model.decoder.log_probs(batch), Error);
}

} // namespace
} // namespace selm
