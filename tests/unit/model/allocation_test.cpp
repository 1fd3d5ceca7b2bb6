#include <atomic>
#include <cstdlib>

#include <gtest/gtest.h>

#include "tiny_model.hpp"

// Memory from the C library is counted by taking the place of its functions, which sanitizers do themselves.
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)

extern "C" {
void* __libc_malloc(std::size_t bytes);                          // NOLINT: names of the C library
void* __libc_memalign(std::size_t alignment, std::size_t bytes); // NOLINT
}

namespace {
constexpr std::size_t large_bytes = 256 << 10; ///< blocks that the engine's pool keeps
std::atomic<long> allocations{0}, large_allocations{0};

void count(std::size_t bytes)
{
    allocations.fetch_add(1, std::memory_order_relaxed);
    large_allocations.fetch_add(bytes >= large_bytes ? 1 : 0, std::memory_order_relaxed);
}
} // namespace

extern "C" void* malloc(std::size_t bytes) noexcept
{
    count(bytes);
    return __libc_malloc(bytes);
}

extern "C" void* aligned_alloc(std::size_t alignment, std::size_t bytes) noexcept
{
    count(bytes);
    return __libc_memalign(alignment, bytes);
}

namespace selm {
namespace {

DecoderConfig wide_config()
{
    DecoderConfig config = test::tiny_config(true);
    config.vocabulary = 700;
    config.hidden = 192;
    config.intermediate = 512;
    config.layers = 3;
    config.heads = 6;
    config.head_dim = 32;
    return config;
}

TEST(Allocations, AreCounted)
{
    const long before = allocations.load(), large_before = large_allocations.load();
    std::free(std::aligned_alloc(64, large_bytes));
    const std::vector<char> some(100);
    EXPECT_EQ(some.size(), 100U);
    EXPECT_GE(allocations.load() - before, 2);
    EXPECT_EQ(large_allocations.load() - large_before, 1);
}

TEST(Allocations, AFurtherTrainingPassTakesNoMemory)
{
    for (const std::string& engine : test::usable_engines()) {
        if (engine != "xsmm")
            continue;
        test::TinyModel model(wide_config(), 1, engine);
        test::RecordingSink gradients(model.config);
        PackedBatch batch;
        batch.add_scored(test::random_tokens(1, 90, 700), std::vector<Branch>{{test::random_tokens(2, 290, 700), 0},
                                                                             {test::random_tokens(3, 270, 700), 0}});
        const auto g = test::coefficients(batch.targets.size());
        const auto pass = [&] {
            const auto scored = model.decoder.forward_scored(batch);
            model.decoder.backward_scored(*scored, g, gradients);
        };
        pass();
        pass(); // kept blocks are sorted out
        const long before = large_allocations.load(), all_before = allocations.load();
        const std::int64_t peak = model.engine->peak_allocated_bytes();
        for (int repetition = 0; repetition < 3; ++repetition)
            pass();
        EXPECT_EQ(large_allocations.load() - before, 0);
        EXPECT_EQ(model.engine->peak_allocated_bytes(), peak);
        EXPECT_LT((allocations.load() - all_before) / 3, 300) << "small ones per pass";
        RecordProperty("small_allocations_per_pass", std::to_string((allocations.load() - all_before) / 3));
    }
}

TEST(Allocations, DecodeStepsTakeNoMemory)
{
    for (const std::string& engine : test::usable_engines()) {
        if (engine != "xsmm")
            continue;
        constexpr std::int64_t rows = 5;
        test::TinyModel model(wide_config(), 1, engine);
        DecodeSession session(model.decoder, rows, 256);
        std::vector<std::vector<std::int32_t>> prompts;
        std::vector<DecodeWork> work;
        for (std::int64_t row = 0; row < rows; ++row) {
            prompts.push_back(test::random_tokens(static_cast<unsigned>(row), 20 + static_cast<std::size_t>(row), 700));
            work.push_back({.slot = row, .position_begin = 0, .tokens = prompts.back(), .prefill = true, .wants_logits = true});
        }
        session.step(work);
        const std::vector<std::int32_t> next = test::random_tokens(9, 1, 700);
        const auto decode = [&](std::int64_t steps) {
            for (std::int64_t step = 0; step < steps; ++step) {
                for (DecodeWork& item : work) {
                    item.position_begin += item.prefill ? static_cast<std::int64_t>(item.tokens.size()) : 1;
                    item.tokens = next;
                    item.prefill = false;
                }
                session.step(work);
            }
        };
        decode(2);
        const long before = allocations.load();
        decode(100); // into the second block of keys
        EXPECT_EQ(allocations.load() - before, 0);
    }
}

} // namespace
} // namespace selm

#endif
