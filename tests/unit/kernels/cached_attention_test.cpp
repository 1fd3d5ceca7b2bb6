#include <algorithm>

#include "engine_test_support.hpp"

namespace selm {
namespace {

constexpr std::int64_t layers = 2;
constexpr std::int64_t layer = 1;

/// A sequence as generation sees it: its first `prompt` tokens come in prefill chunks, the rest one by one.
struct Sequence {
    std::int64_t slot;
    std::int64_t prompt;
    Matrix qkv; ///< [length, QKV]
};

class CachedAttentionTest : public EngineTest {
  protected:
    Sequence sequence(const AttentionShape& shape, std::int64_t slot, std::int64_t prompt, std::int64_t length,
                      unsigned seed)
    {
        return {slot, prompt,
                operand(random_matrix(length, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, seed))};
    }

    /// Runs all sequences through one cache, each step holding the next piece of every unfinished one; sequence i
    /// starts at step i * delay. Results: [length, NH*D] per sequence.
    std::vector<Matrix> run(const AttentionShape& shape, const std::vector<Sequence>& sequences, std::int64_t slots,
                            std::int64_t capacity, std::size_t delay)
    {
        const std::unique_ptr<KvCache> cache = engine().make_cache(layers, slots, capacity, shape);
        EXPECT_EQ(cache->slots(), slots);
        EXPECT_GE(cache->capacity(), capacity);
        const std::int64_t width = shape.heads * shape.head_dim;
        std::vector<Matrix> results;
        for (const Sequence& s : sequences)
            results.emplace_back(s.qkv.rows, width);
        std::vector<std::int64_t> done(sequences.size());
        for (std::size_t step = 0;; ++step) {
            std::vector<CachedSpan> spans;
            std::vector<std::size_t> owners;
            std::int64_t rows = 0;
            bool waiting = false;
            for (std::size_t i = 0; i < sequences.size(); ++i) {
                const Sequence& s = sequences[i];
                if (done[i] == s.qkv.rows)
                    continue;
                if (step < i * delay) {
                    waiting = true;
                    continue;
                }
                const bool prefill = done[i] < s.prompt;
                const std::int64_t count = prefill ? std::min(prefill_tile, s.prompt - done[i]) : 1;
                spans.push_back({s.slot, rows, count, done[i], prefill});
                owners.push_back(i);
                rows += count;
            }
            if (spans.empty() && !waiting)
                return results;
            if (!spans.empty())
                run_step(shape, sequences, spans, owners, *cache, results, done);
        }
    }

  private:
    void run_step(const AttentionShape& shape, const std::vector<Sequence>& sequences,
                  const std::vector<CachedSpan>& spans, const std::vector<std::size_t>& owners, KvCache& cache,
                  std::vector<Matrix>& results, std::vector<std::int64_t>& done)
    {
        const std::int64_t rows = spans.back().row_begin + spans.back().count;
        Matrix qkv(rows, sequences[0].qkv.columns);
        for (std::size_t i = 0; i < spans.size(); ++i)
            for (std::int64_t r = 0; r < spans[i].count; ++r)
                for (std::int64_t c = 0; c < qkv.columns; ++c)
                    qkv(spans[i].row_begin + r, c) = sequences[owners[i]].qkv(spans[i].position_begin + r, c);
        const Tensor out = output(rows, shape.heads * shape.head_dim, 1);
        // The other layer gets other keys and values: layers must not share memory.
        Matrix other = qkv;
        for (double& value : other.values)
            value = -value;
        engine().attention_cached(tensor(qkv, 3), shape, cache, layer, spans, out);
        engine().attention_cached(tensor(other), shape, cache, 0, spans, output(rows, shape.heads * shape.head_dim));
        const Matrix step = values(out);
        for (std::size_t i = 0; i < spans.size(); ++i) {
            for (std::int64_t r = 0; r < spans[i].count; ++r)
                for (std::int64_t c = 0; c < step.columns; ++c)
                    results[owners[i]](spans[i].position_begin + r, c) = step(spans[i].row_begin + r, c);
            done[owners[i]] += spans[i].count;
        }
    }
};

struct Lengths {
    std::int64_t prompt, length;
};
const std::vector<Lengths> lengths = {{1, 3}, {5, 9}, {63, 66}, {64, 67}, {65, 70}, {128, 130}, {130, 131}, {3, 80}};

TEST_P(CachedAttentionTest, prefill_and_decode_as_defined)
{
    std::vector<Lengths> cases = lengths;
    if (GetParam() == "aten_parts") // emulated: few single tokens
        cases.back().length = 12;
    for (const AttentionShape shape : {AttentionShape{3, 1, 16, 0.25f}, AttentionShape{9, 3, 64, 0.125f}}) {
        std::vector<Sequence> sequences;
        for (std::size_t i = 0; i < cases.size(); ++i)
            sequences.push_back(sequence(shape, static_cast<std::int64_t>((5 * i + 3) % cases.size()),
                                         cases[i].prompt, cases[i].length, static_cast<unsigned>(i)));
        const std::vector<Matrix> results = run(shape, sequences, static_cast<std::int64_t>(cases.size()), 131, 2);
        for (std::size_t i = 0; i < cases.size(); ++i) {
            const Segment whole{0, cases[i].length, -1};
            const Matrix expected = reference::attention(sequences[i].qkv, shape, std::span(&whole, 1)).out;
            const Matrix rounding = rounding_of_attention(sequences[i].qkv, shape, std::span(&whole, 1));
            expect_close(
                results[i], expected,
                [&](std::size_t e) { return 5e-6 + rounding.values[e]; }, // as in AttentionTest
                cat("head_dim ", shape.head_dim, " prompt ", cases[i].prompt, " length ", cases[i].length));
        }
    }
}

TEST_P(CachedAttentionTest, bits_do_not_depend_on_slot_capacity_and_company)
{
    if (!engine().row_invariant())
        GTEST_SKIP() << "this engine does not promise row invariance";
    for (const AttentionShape shape : {AttentionShape{3, 1, 16, 0.25f}, AttentionShape{9, 3, 64, 0.125f}}) {
        std::vector<Sequence> sequences;
        for (std::size_t i = 0; i < lengths.size(); ++i)
            sequences.push_back(sequence(shape, static_cast<std::int64_t>(i), lengths[i].prompt, lengths[i].length,
                                         static_cast<unsigned>(i)));
        const auto slots = static_cast<std::int64_t>(lengths.size());
        const std::vector<Matrix> together = run(shape, sequences, slots, 131, 0);
        std::vector<Sequence> moved = sequences;
        for (Sequence& s : moved)
            s.slot = slots - s.slot;
        const std::vector<Matrix> staggered = run(shape, moved, slots + 1, 200, 3);
        for (std::size_t i = 0; i < lengths.size(); ++i) {
            EXPECT_EQ(staggered[i].values, together[i].values) << "staggered, other slots: sequence " << i;
            Sequence single = sequences[i];
            single.slot = 0;
            EXPECT_EQ(run(shape, {single}, 1, lengths[i].length, 0)[0].values, together[i].values)
                << "alone: sequence " << i;
        }
    }
}

// A sequence that begins as another one takes its keys and values, in the same step or a later one, and goes on with the bits
// that reading it from its start gives.
TEST_P(CachedAttentionTest, a_prefix_of_another_sequence_is_copied)
{
    constexpr std::int64_t prompt = 140, length = 143;
    for (const AttentionShape shape : {AttentionShape{3, 1, 16, 0.25f}, AttentionShape{9, 3, 64, 0.125f}}) {
        const std::int64_t columns = (shape.heads + 2 * shape.kv_heads) * shape.head_dim, width = shape.heads * shape.head_dim;
        const Matrix first = operand(random_matrix(length, columns, 1));
        for (const std::int64_t prefix : {2, 24, 32, 46, 64, 90, 128, 138}) {
            if (prefix % engine().prefix_granularity() != 0)
                continue;
            Matrix second = operand(random_matrix(length, columns, 2));
            std::copy_n(first.values.begin(), prefix * columns, second.values.begin());
            const Matrix expected = run(shape, {Sequence{0, prompt, second}}, 1, length, 0)[0];
            for (const bool same_step : {true, false}) {
                const std::unique_ptr<KvCache> cache = engine().make_cache(layers, 3, 200, shape);
                const Matrix old = random_matrix(length, columns, 3); // what the slot held before
                const CachedSpan before{1, 0, length, 0, true};
                engine().attention_cached(tensor(old), shape, *cache, layer, std::span(&before, 1), output(length, width));
                const std::int64_t rest = prompt - prefix;
                Matrix both(prompt + rest, columns);
                std::copy_n(first.values.begin(), prompt * columns, both.values.begin());
                std::copy_n(second.values.begin() + prefix * columns, rest * columns, both.values.begin() + prompt * columns);
                const Tensor qkv = tensor(both, 3), out = output(prompt + rest, width);
                const std::vector<CachedSpan> spans = {{2, 0, prompt, 0, true}, {1, prompt, rest, prefix, true, 2}};
                if (same_step) {
                    engine().attention_cached(qkv, shape, *cache, layer, spans, out);
                } else {
                    engine().attention_cached(qkv, shape, *cache, layer, std::span(spans).first(1), out);
                    engine().attention_cached(qkv, shape, *cache, layer, std::span(spans).last(1), out);
                }
                Matrix found = expected; // the prefix itself has no rows
                const Matrix computed = values(out);
                std::copy_n(computed.values.begin() + prompt * width, rest * width, found.values.begin() + prefix * width);
                for (std::int64_t row = prompt; row < length; ++row) {
                    Matrix one(1, columns);
                    std::copy_n(second.values.begin() + row * columns, columns, one.values.begin());
                    const Tensor decoded = output(1, width);
                    const CachedSpan span{1, 0, 1, row, false};
                    engine().attention_cached(tensor(one), shape, *cache, layer, std::span(&span, 1), decoded);
                    std::copy_n(values(decoded).values.begin(), width, found.values.begin() + row * width);
                }
                if (engine().row_invariant()) {
                    EXPECT_EQ(found.values, expected.values) << "prefix " << prefix << " same step " << same_step;
                }
                expect_close(found, expected, [](std::size_t) { return 1e-5; }, cat("prefix ", prefix));
            }
        }
    }
}

// A slot is given to the next row when its sequence ends: what it held before may not show.
TEST_P(CachedAttentionTest, a_slot_is_used_again)
{
    const AttentionShape shape{3, 1, 16, 0.25f};
    const std::unique_ptr<KvCache> cache = engine().make_cache(1, 1, 70, shape);
    const Matrix before = random_matrix(64, 5 * 16, 1), after = operand(random_matrix(9, 5 * 16, 2));
    const CachedSpan first{0, 0, 64, 0, true}, second{0, 0, 9, 0, true};
    engine().attention_cached(tensor(before), shape, *cache, 0, std::span(&first, 1), output(64, 48));
    const Tensor out = output(9, 48);
    engine().attention_cached(tensor(after), shape, *cache, 0, std::span(&second, 1), out);
    const Segment whole{0, 9, -1};
    const Matrix expected = reference::attention(after, shape, std::span(&whole, 1)).out;
    const Matrix rounding = rounding_of_attention(after, shape, std::span(&whole, 1));
    expect_close(
        values(out), expected, [&](std::size_t i) { return 5e-6 + rounding.values[i]; }, "second sequence");
}

SELM_INSTANTIATE_ENGINES_AND_BF16(CachedAttentionTest);
SELM_INSTANTIATE_ATEN_PARTS(CachedAttentionTest);

} // namespace
} // namespace selm
