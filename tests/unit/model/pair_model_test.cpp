#include "selm/model/pair_model.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <set>

#include "selm/base/error.hpp"
#include "temporary_directory.hpp"
#include "tiny_model.hpp"

// What transformers is compared with stands in tests/oracle/test_deberta.py.
namespace selm::test {
namespace {

DebertaConfig tiny_deberta()
{
    DebertaConfig config;
    config.vocabulary = 31;
    config.hidden = 24;
    config.intermediate = 20;
    config.layers = 2;
    config.heads = 3;
    config.position_buckets = 8;
    config.max_relative_positions = 32;
    config.has_head = true;
    return config;
}

/// Flat buffers of pair_parameters(): random weights, or zeros for gradients.
struct Flat {
    explicit Flat(const DebertaConfig& config, unsigned seed = 0)
    {
        std::mt19937 generator(seed);
        for (const ParameterSpec& spec : pair_parameters(config)) {
            const bool is_gain = spec.name.ends_with("LayerNorm.weight");
            std::normal_distribution<float> normal(is_gain ? 1.0F : 0.0F, 0.3F);
            auto& buffer = values.emplace_back(static_cast<std::size_t>(spec.elements()));
            for (float& value : buffer)
                value = seed == 0 ? 0.0F : normal(generator);
            tensors.push_back(borrow_f32(buffer.data(), spec.rows, spec.columns));
        }
    }
    std::vector<std::vector<float>> values;
    std::vector<Tensor> tensors;
};

class PairSink final : public GradientSink {
  public:
    explicit PairSink(const DebertaConfig& config) : flat(config), ready_count(flat.values.size()) {}
    Tensor gradient(std::int64_t parameter) override
    {
        return frozen.contains(parameter) ? Tensor{} : flat.tensors[static_cast<std::size_t>(parameter)];
    }
    void ready(std::int64_t parameter) override
    {
        ++ready_count[static_cast<std::size_t>(parameter)];
        order.push_back(parameter);
    }
    Flat flat;
    std::vector<int> ready_count;
    std::vector<std::int64_t> order;
    std::set<std::int64_t> frozen;
};

std::vector<PairInput> random_pairs(std::span<const std::size_t> lengths)
{
    std::vector<PairInput> pairs;
    for (const std::size_t length : lengths) {
        const auto last = static_cast<std::int64_t>(length) - 1;
        pairs.push_back({random_tokens(static_cast<unsigned>(length), length, 31), 0, last / 2, last});
    }
    return pairs;
}

const std::vector<std::size_t> lengths = {9, 3, 70, 130, 2, 64};

struct Model {
    explicit Model(const std::string& engine_name, unsigned seed = 1)
        : config(tiny_deberta()), parameters(config, seed), engine(make_engine({.engine = engine_name})),
          weights(config, *engine, parameters.tensors, {.dtype = DType::f32, .with_backward = true}),
          model(config, *engine, weights)
    {
    }
    DebertaConfig config;
    Flat parameters;
    std::unique_ptr<Engine> engine;
    PairWeights weights;
    PairModel model;
};

class PairModelTest : public ::testing::TestWithParam<std::string> {
  protected:
    void SetUp() override
    {
        try {
            make_engine({.engine = GetParam()});
        } catch (const Error& error) {
            GTEST_SKIP() << error.what(); // xsmm needs a CPU with AVX2 and FMA
        }
    }
};

TEST_P(PairModelTest, batches_and_kept_passes_give_the_same_bits)
{
    Model m(GetParam());
    const std::vector<PairInput> pairs = random_pairs(lengths);
    const std::vector<float> logits = m.model.logits(pairs);
    for (const float logit : logits)
        EXPECT_GT(std::abs(logit), 1e-4F);
    EXPECT_EQ(m.model.logits(pairs, 1), logits);
    EXPECT_EQ(m.model.logits(pairs, 100), logits);
    const auto pass = m.model.forward_kept(pairs);
    EXPECT_EQ(std::vector<float>(pass->logits().begin(), pass->logits().end()), logits);
}

TEST_P(PairModelTest, swapped_candidates_of_equal_text_have_logit_zero)
{
    Model m(GetParam());
    std::vector<PairInput> pairs = random_pairs(std::vector<std::size_t>{12});
    pairs[0].right = pairs[0].left;
    EXPECT_EQ(m.model.logits(pairs), std::vector<float>{0.0F});
}

TEST_P(PairModelTest, gradients_add_up_over_batches_and_passes)
{
    Model m(GetParam());
    const std::vector<PairInput> pairs = random_pairs(lengths);
    const std::vector<float> g = {1.0F, -0.5F, 0.25F, 2.0F, 1.5F, -1.0F};
    PairSink together(m.config), apart(m.config);
    {
        const auto pass = m.model.forward_kept(pairs);
        m.model.backward(*pass, g, together);
    }
    for (std::size_t i = 0; i < pairs.size(); ++i) {
        const auto pass = m.model.forward_kept(std::span(pairs).subspan(i, 1));
        m.model.backward(*pass, std::span(g).subspan(i, 1), apart);
    }
    const std::vector<ParameterSpec> specs = pair_parameters(m.config);
    for (std::size_t i = 0; i < specs.size(); ++i) {
        EXPECT_EQ(together.ready_count[i], 1) << specs[i].name;
        double norm = 0;
        for (const float value : together.flat.values[i])
            norm += static_cast<double>(value) * static_cast<double>(value);
        // left - right: the last bias cancels
        EXPECT_EQ(norm > 0, specs[i].name != "head_layer.4.bias") << specs[i].name;
        EXPECT_LE(largest_difference(together.flat.values[i], apart.flat.values[i]), 1e-5 * (1 + std::sqrt(norm)))
            << specs[i].name;
    }
}

TEST_P(PairModelTest, a_pass_without_pairs_has_no_gradient)
{
    Model m(GetParam());
    PairSink sink(m.config);
    const auto pass = m.model.forward_kept({});
    EXPECT_TRUE(pass->logits().empty());
    m.model.backward(*pass, {}, sink);
    for (const int count : sink.ready_count)
        EXPECT_EQ(count, 1);
    for (const std::vector<float>& values : sink.flat.values)
        EXPECT_EQ(values, std::vector<float>(values.size(), 0.0F));
    EXPECT_TRUE(m.model.logits({}).empty());
}

TEST_P(PairModelTest, refresh_follows_the_flat_parameters)
{
    Model m(GetParam()), other(GetParam(), 2);
    const std::vector<PairInput> pairs = random_pairs(lengths);
    const std::vector<float> before = m.model.logits(pairs), expected = other.model.logits(pairs);
    for (std::size_t i = 0; i < m.parameters.values.size(); ++i)
        std::copy(other.parameters.values[i].begin(), other.parameters.values[i].end(), m.parameters.values[i].begin());
    m.weights.refresh();
    EXPECT_NE(before, expected);
    EXPECT_EQ(m.model.logits(pairs), expected);
}

TEST_P(PairModelTest, frozen_parameters_leave_the_bits_of_the_others)
{
    Model m(GetParam());
    const std::vector<PairInput> pairs = random_pairs(lengths);
    const std::vector<float> g = {0.5F, -1, 0.2F, 0.7F, -0.1F, 1};
    PairSink all(m.config), none(m.config);
    m.model.backward(*m.model.forward_kept(pairs), g, all);
    const std::vector<std::int64_t> order = pair_backward_order(m.config);
    EXPECT_EQ(all.order, order);
    const auto count = PairParameterIndex::count(m.config);
    EXPECT_EQ(std::set<std::int64_t>(order.begin(), order.end()).size(), static_cast<std::size_t>(count));
    for (const std::int64_t every : {2, 3, 1}) { // freezes the parameters of one residue, at last all
        PairSink sink(m.config);
        for (std::int64_t parameter = every - 1; parameter < count; parameter += every)
            sink.frozen.insert(parameter);
        m.model.backward(*m.model.forward_kept(pairs), g, sink);
        EXPECT_EQ(sink.order, order);
        for (std::size_t i = 0; i < sink.flat.values.size(); ++i) {
            const bool frozen = sink.frozen.contains(static_cast<std::int64_t>(i));
            EXPECT_EQ(sink.flat.values[i], frozen ? none.flat.values[i] : all.flat.values[i]) << i;
        }
    }
    m.model.backward(*m.model.forward_kept({}), {}, none);
    EXPECT_EQ(none.order, order);
}

TEST_P(PairModelTest, ranks_of_a_node_fill_shared_weights_together)
{
    Model m(GetParam());
    const TemporaryDirectory directory;
    const std::string to = directory.path("");
    const auto read = [&](std::int64_t parameter, std::int64_t begin, std::span<float> out) {
        std::copy_n(m.parameters.values[static_cast<std::size_t>(parameter)].begin() + begin, out.size(), out.begin());
    };
    write_pair_weights(to, m.config, read, DType::f32);
    const SafetensorsReader reader(to);
    const std::vector<PairInput> pairs = random_pairs(lengths);
    for (const DType dtype : {DType::f32, DType::bf16}) {
        PairWeights alone(m.config, *m.engine, reader, {.dtype = dtype}, {});
        const std::vector<float> expected = PairModel(m.config, *m.engine, alone).logits(pairs);
        EXPECT_EQ(expected == m.model.logits(pairs), dtype == DType::f32);
        const Tensor memory =
            m.engine->allocate(1, PairWeights::memory_elements(m.config, *m.engine, false), DType::f32);
        m.engine->fill_zero(memory);
        std::vector<std::unique_ptr<PairWeights>> parts;
        for (const int part : {2, 0, 1})
            parts.push_back(std::make_unique<PairWeights>(
                m.config, *m.engine, reader, PairWeights::Options{.dtype = dtype, .part = part, .parts = 3}, memory));
        for (const auto& part : parts)
            EXPECT_EQ(PairModel(m.config, *m.engine, *part).logits(pairs), expected);
    }
}

TEST_P(PairModelTest, token_outside_the_vocabulary_is_refused)
{
    Model m(GetParam());
    std::vector<PairInput> pairs = random_pairs(std::vector<std::size_t>{5});
    for (const std::int32_t token : {31, -1}) {
        pairs[0].ids[2] = token;
        try {
            m.model.logits(pairs);
            FAIL() << "token " << token << " was accepted";
        } catch (const Error& error) {
            EXPECT_EQ(error.code(), ExitCode::bad_data);
            EXPECT_NE(std::string(error.what()).find(std::to_string(token)), std::string::npos) << error.what();
        }
    }
}

INSTANTIATE_TEST_SUITE_P(Engines, PairModelTest, ::testing::Values("aten", "xsmm"),
                         [](const ::testing::TestParamInfo<std::string>& info) { return info.param; });

TEST(DebertaConfigTest, relative_positions_by_hand)
{
    // 8 buckets to a side, 4 of them one distance each; log(31/4)/log(31/4) = 1 is the last: 4 + 3.
    const DebertaConfig config = tiny_deberta();
    const std::vector<std::pair<std::int64_t, std::int32_t>> expected = {
        {0, 8},   {1, 9},   {-1, 7},  {4, 12},  {-4, 4},      {5, 13},
        {31, 15}, {-31, 1}, {32, 15}, {-32, 0}, {100000, 15}, {-100000, 0}};
    for (const auto& [distance, position] : expected)
        EXPECT_EQ(relative_position_index(config, distance), position) << distance;
    for (std::int64_t distance = -300; distance < 300; ++distance)
        EXPECT_LE(relative_position_index(config, distance), relative_position_index(config, distance + 1));
}

TEST(DebertaConfigTest, parameters_have_pairrms_names)
{
    const DebertaConfig config = tiny_deberta();
    const std::vector<ParameterSpec> specs = pair_parameters(config);
    const auto name = [&](std::int64_t index) { return specs[static_cast<std::size_t>(index)].name; };
    EXPECT_EQ(name(PairParameterIndex::embedding), "pretrained_model.embeddings.word_embeddings.weight");
    EXPECT_EQ(name(PairParameterIndex::relative_norm_bias), "pretrained_model.encoder.LayerNorm.bias");
    EXPECT_EQ(name(PairParameterIndex::layer(1, DebertaLayerParameter::key_bias)),
              "pretrained_model.encoder.layer.1.attention.self.key_proj.bias");
    EXPECT_EQ(name(PairParameterIndex::layer(0, DebertaLayerParameter::output_norm_gain)),
              "pretrained_model.encoder.layer.0.output.LayerNorm.weight");
    EXPECT_EQ(name(PairParameterIndex::head_output_bias(config)), "head_layer.4.bias");
    EXPECT_EQ(PairModel::cost(config, 0), 0);
    EXPECT_GT(PairModel::cost(config, 200), 2 * PairModel::cost(config, 100));
}

} // namespace
} // namespace selm::test
