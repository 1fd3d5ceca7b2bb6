#include <gtest/gtest.h>

#include "aten_parts_on_cpu.hpp"
#include "tiny_model.hpp"

namespace selm::test {
namespace {

DecoderConfig config_for_parts()
{
    DecoderConfig config = tiny_config(true);
    config.head_dim = 8; // the kernels take multiples of 8
    return config;
}

/// Decodes sequences that end one after another, with a new one in between, and returns the logits of all steps.
std::vector<std::vector<float>> decode(Decoder& decoder)
{
    constexpr std::int64_t vocabulary = 53;
    DecodeSession session(decoder, 5, 90);
    std::vector<std::vector<std::int32_t>> sequences;
    const std::vector<std::size_t> lengths = {80, 75, 74, 73, 20}, starts = {0, 0, 0, 0, 4};
    for (std::size_t i = 0; i < lengths.size(); ++i)
        sequences.push_back(random_tokens(static_cast<unsigned>(i + 1), lengths[i]));
    std::vector<std::size_t> done(lengths.size());
    std::vector<std::vector<float>> results;
    for (std::size_t step = 0;; ++step) {
        std::vector<DecodeWork> work;
        for (std::size_t i = 0; i < lengths.size(); ++i) {
            if (step < starts[i] || done[i] == lengths[i])
                continue;
            const bool prefill = done[i] == 0;
            const std::size_t count = prefill ? std::min<std::size_t>(lengths[i] - 12, 64) : 1;
            work.push_back({static_cast<std::int64_t>(i), static_cast<std::int64_t>(done[i]), std::span(sequences[i]).subspan(done[i], count),
                            prefill, true});
            done[i] += count;
        }
        if (work.empty())
            return results;
        const Tensor logits = session.step(work);
        EXPECT_EQ(logits.rows, static_cast<std::int64_t>(work.size()));
        for (std::int64_t row = 0; row < logits.rows; ++row)
            results.emplace_back(logits.row_f32(row), logits.row_f32(row) + vocabulary);
    }
}

TEST(DecodeSteps, RecordedStepsGiveTheLogitsOfThePlainEngine)
{
    const DecoderConfig config = config_for_parts();
    const TinyParameters parameters(config);
    const auto counts = std::make_shared<RepeatingRecorder::Counts>();
    const auto logits = [&](std::unique_ptr<Engine> engine) {
        ResidentWeights weights(config, *engine, parameters.tensors, {.dtype = DType::f32, .with_backward = false});
        Decoder decoder(config, *engine, weights);
        return decode(decoder);
    };
    const auto recorded = logits(make_aten_engine_of(parts_on_cpu(counts)));
    const auto plain = logits(make_engine({.engine = "aten"}));
    ASSERT_EQ(recorded.size(), plain.size());
    for (std::size_t i = 0; i < plain.size(); ++i)
        for (std::size_t v = 0; v < plain[i].size(); ++v)
            ASSERT_NEAR(recorded[i][v], plain[i][v], 2e-5) << "row " << i;
    EXPECT_GE(counts->recordings, 2); // of 4 rows and of 8
    EXPECT_GT(counts->replays, counts->recordings);
}

} // namespace
} // namespace selm::test
