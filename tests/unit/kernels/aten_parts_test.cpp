#include <algorithm>
#include <numeric>

#include "aten_parts_on_cpu.hpp"
#include "engine_test_support.hpp"

namespace selm {

std::unique_ptr<Engine> make_aten_engine_with_parts()
{
    return test::make_aten_engine_of(test::parts_on_cpu());
}

namespace {

__global__ void threads_that_part(int* last)
{
    if (static_cast<int>(threadIdx.x) == *last)
        return;
    __syncthreads();
}

__global__ void lanes_that_part(int* last)
{
    if (static_cast<int>(threadIdx.x) != *last)
        static_cast<void>(__shfl_xor_sync(0xffffffffu, 1.0F, 1));
    else
        __syncthreads();
}

TEST(Emulation, finds_threads_that_do_not_meet)
{
    int nobody = 64, last = 63;
    EXPECT_NO_THROW(emulation::launch(threads_that_part, {2}, 64, &nobody));
    EXPECT_THROW(emulation::launch(threads_that_part, {2}, 64, &last), std::logic_error);
    EXPECT_THROW(emulation::launch(lanes_that_part, {1}, 64, &last), std::logic_error);
}

/// Cached sequences and one query row each; rows of no sequence in between.
template<typename T>
struct CachedCase {
    CachedCase(const AttentionShape& shape, const std::vector<std::int64_t>& lengths)
        : shape_(shape), width_(shape.kv_heads * shape.head_dim), stride_((shape.heads + 2 * shape.kv_heads) * shape.head_dim + 3),
          capacity_(*std::max_element(lengths.begin(), lengths.end()) + 5), lengths_(lengths)
    {
        const auto slots = static_cast<std::int64_t>(lengths.size());
        keys_.assign(static_cast<std::size_t>(slots * capacity_ * width_ / cuda::lane_elements), {});
        values_ = keys_;
        for (std::int64_t i = 0; i < slots; ++i) {
            add_row(-1, 0);
            add_row(slots - 1 - i, lengths[static_cast<std::size_t>(i)] - 1);
            sequences_.push_back(rounded(random_matrix(lengths[static_cast<std::size_t>(i)], stride_ - 3, static_cast<unsigned>(i + 1))));
        }
        qkv_.assign(row_.size() * static_cast<std::size_t>(stride_), number(7)); // rows of no sequence hold something
        for (std::size_t i = 0; i < lengths.size(); ++i)
            fill(i);
    }

    /// [rows, NH*D]; the cache of all but the last position is there already.
    std::vector<T> run(std::int64_t splits, bool backwards)
    {
        std::vector<T> out(row_.size() * static_cast<std::size_t>(shape_.heads * shape_.head_dim), number(9));
        cuda::CachedArguments<T> a{.shape = {shape_.heads, shape_.kv_heads, shape_.head_dim, shape_.scale},
                                   .rows = {row_.data(), slot_.data(), position_.data(), static_cast<std::int64_t>(row_.size())},
                                   .qkv = qkv_.data(),
                                   .stride = stride_,
                                   .keys = keys_.data()->value,
                                   .values = values_.data()->value,
                                   .capacity = capacity_,
                                   .splits = 0,
                                   .partial = nullptr,
                                   .out = out.data(),
                                   .out_stride = shape_.heads * shape_.head_dim};
        test::emulate_append(a);
        test::emulate_attend(a, splits, backwards);
        return out;
    }

    std::int64_t splits() const { return (capacity_ - 5 + cuda::keys_per_split - 1) / cuda::keys_per_split; }

    void check(const std::vector<T>& out, double tolerance) const
    {
        const std::int64_t columns = shape_.heads * shape_.head_dim;
        Matrix found(static_cast<std::int64_t>(row_.size()), columns), expected(found.rows, columns);
        for (std::size_t i = 0; i < out.size(); ++i)
            found.values[i] = static_cast<double>(cuda::to_float(out[i]));
        for (std::size_t i = 0; i < lengths_.size(); ++i) {
            std::vector<std::int64_t> keys(static_cast<std::size_t>(lengths_[i]));
            std::iota(keys.begin(), keys.end(), 0);
            reference::Attention result{Matrix(lengths_[i], columns), Matrix(shape_.heads, lengths_[i])};
            reference::attend_row(sequences_[i], shape_, lengths_[i] - 1, keys, result);
            for (std::int64_t c = 0; c < columns; ++c)
                expected(2 * static_cast<std::int64_t>(i) + 1, c) = result.out(lengths_[i] - 1, c);
        }
        expect_close(found, expected, tolerance, cat("head_dim ", shape_.head_dim, " heads ", shape_.heads, "/", shape_.kv_heads));
    }

  private:
    static T number(double value)
    {
        T out;
        cuda::assign(out, static_cast<float>(value));
        return out;
    }
    static Matrix rounded(Matrix x)
    {
        for (double& value : x.values)
            value = static_cast<double>(cuda::to_float(number(value)));
        return x;
    }
    void add_row(std::int64_t slot, std::int64_t position)
    {
        row_.push_back(static_cast<std::int32_t>(row_.size()));
        slot_.push_back(static_cast<std::int32_t>(slot));
        position_.push_back(static_cast<std::int32_t>(position));
    }
    void fill(std::size_t i)
    {
        const std::int64_t row = 2 * static_cast<std::int64_t>(i) + 1, slot = slot_[static_cast<std::size_t>(row)];
        const std::int64_t q_width = shape_.heads * shape_.head_dim;
        for (std::int64_t c = 0; c < stride_ - 3; ++c)
            qkv_[static_cast<std::size_t>(row * stride_ + c)] = number(sequences_[i](lengths_[i] - 1, c));
        for (std::int64_t p = 0; p + 1 < lengths_[i]; ++p) {
            for (std::int64_t c = 0; c < width_; ++c) {
                const std::int64_t to = (slot * capacity_ + p) * width_ + c;
                keys_.data()->value[to] = number(sequences_[i](p, q_width + c));
                values_.data()->value[to] = number(sequences_[i](p, q_width + width_ + c));
            }
        }
    }

    AttentionShape shape_;
    std::int64_t width_, stride_, capacity_;
    std::vector<std::int64_t> lengths_;
    std::vector<Matrix> sequences_; ///< [length, QKV]
    std::vector<cuda::Lane<T>> keys_, values_;
    std::vector<T> qkv_;
    std::vector<std::int32_t> row_, slot_, position_;
};

const std::vector<AttentionShape>& shapes()
{
    static const std::vector<AttentionShape> all = {
        {3, 1, 16, 0.25F},      {9, 3, 64, 0.125F},    {2, 2, 8, 0.35355338F},  {2, 2, 128, 0.088388346F}, {8, 2, 80, 0.1118034F},
        {10, 2, 96, 0.10206207F}, {8, 4, 256, 0.0625F}, {11, 1, 24, 0.20412415F},
    };
    return all;
}

// f32: as the other engines' attention. bf16: inputs are bf16 numbers, sums f32, and the result is rounded: half a unit of 2^-7
// of outputs below 4.
TEST(CachedAttentionKernels, as_defined_in_any_order_of_the_warps)
{
    for (const AttentionShape& shape : shapes()) {
        const bool is_first = &shape == shapes().data();
        CachedCase<float> f32(shape, is_first ? std::vector<std::int64_t>{1, 37, 255, 256, 257, 530} : std::vector<std::int64_t>{37, 257});
        const auto out = f32.run(f32.splits(), false);
        f32.check(out, 5e-6);
        EXPECT_EQ(f32.run(f32.splits(), true), out) << "warps in the other order";
        CachedCase<std::uint16_t> bf16(shape, {1, 261});
        bf16.check(bf16.run(bf16.splits(), false), 4.0 / 256);
    }
}

TEST(CachedAttentionKernels, a_rows_bits_depend_neither_on_others_nor_on_the_number_of_splits)
{
    for (const AttentionShape& shape : {shapes()[1], shapes()[4]}) {
        CachedCase<float> alone(shape, {300}), company(shape, {300, 800});
        const auto expected = alone.run(2, false), found = company.run(5, false);
        const auto width = static_cast<std::ptrdiff_t>(shape.heads * shape.head_dim);
        EXPECT_TRUE(std::equal(expected.begin() + width, expected.end(), found.begin() + width));
    }
}

/// Steps of single tokens through an engine that records them.
class RecordedSteps : public ::testing::Test {
  protected:
    static constexpr std::int64_t width = 4 * 16 + 2 * 2 * 16; ///< 4 query heads, 2 of keys, head_dim 16
    static constexpr AttentionShape shape{4, 2, 16, 0.25F};

    struct Arrays {
        std::vector<std::int32_t> tokens, positions;
        std::vector<CachedSpan> spans;
        std::vector<std::int64_t> rows;
        SingleTokenStep step() const { return {tokens, positions, spans, rows}; }
    };

    Arrays arrays(const std::vector<std::int32_t>& tokens, std::int32_t position, std::int64_t padding) const
    {
        Arrays out;
        const auto used = static_cast<std::int64_t>(tokens.size());
        for (std::int64_t row = 0; row < used + padding; ++row) {
            const bool is_used = row < used;
            out.tokens.push_back(is_used ? tokens[static_cast<std::size_t>(row)] : 0);
            out.positions.push_back(is_used ? position : 0);
            out.spans.push_back({is_used ? row : -1, row, 1, is_used ? position : 0, false, -1});
            out.rows.push_back(row);
        }
        return out;
    }

    /// Steps of three sequences and a row of none through `recording`, beside the plain engine. The arrays of the second step
    /// are those that a recorder gets: they are overwritten afterwards.
    void compare(Engine& recording, double tolerance);

    std::shared_ptr<test::RepeatingRecorder::Counts> counts = std::make_shared<test::RepeatingRecorder::Counts>();
    std::unique_ptr<Engine> recording = test::make_aten_engine_of(test::parts_on_cpu(counts));
    std::unique_ptr<Engine> plain = make_engine({.engine = "aten"});
};

/// The operations of a decoding step that take arrays of the host.
struct StepMatrices {
    StepMatrices(Engine& used, std::int64_t rows, std::int64_t width, std::int64_t out_width)
        : engine(used), embedding(used.allocate(50, width, DType::f32)), cosines(used.allocate(9, 8, DType::f32)),
          sines(used.allocate(9, 8, DType::f32)), x(used.allocate(rows, width, DType::f32)), qkv(used.allocate(rows, width, DType::f32)),
          out(used.allocate(rows, out_width, DType::f32)), cache(used.make_cache(1, 4, 8, {4, 2, 16, 0.25F}))
    {
        fill(embedding, 1);
        fill(cosines, 2);
        fill(sines, 3);
    }
    void fill(const Tensor& to, unsigned seed)
    {
        const Matrix values = random_matrix(to.rows, to.columns, seed);
        std::vector<float> host(values.values.begin(), values.values.end());
        engine.copy_from_host(host.data(), to);
    }
    void body(const SingleTokenStep& step)
    {
        engine.embed(step.tokens, embedding, x);
        engine.gather_rows(x, step.rows, qkv);
        engine.rope(qkv, {4, 2, 16, 0.25F}, step.positions, cosines, sines, false);
        engine.attention_cached(qkv, {4, 2, 16, 0.25F}, *cache, 0, step.spans, out);
    }

    Matrix result() const
    {
        std::vector<float> host(static_cast<std::size_t>(out.rows * out.columns));
        engine.copy_to_host(out, host.data());
        Matrix found(out.rows, out.columns);
        found.values.assign(host.begin(), host.end());
        return found;
    }

    Engine& engine;
    Tensor embedding, cosines, sines, x, qkv, out;
    std::unique_ptr<KvCache> cache;
};

void RecordedSteps::compare(Engine& engine, double tolerance)
{
    constexpr std::int64_t sequences = 3, rows = 4;
    ASSERT_EQ(engine.step_rows(sequences), rows);
    ASSERT_EQ(plain->step_rows(sequences), sequences);
    StepMatrices recorded(engine, rows, width, 64), expected(*plain, sequences, width, 64);
    Arrays first; // a repeated step must not read them
    for (std::int32_t position = 0; position < 8; ++position) {
        const std::vector<std::int32_t> tokens = {5 + position, 40 - position, 3 * position};
        Arrays now = arrays(tokens, position, rows - sequences);
        if (position == 1) {
            first = now;
            const SingleTokenStep step = first.step();
            engine.run_step(step, *recorded.cache, [&recorded, step] { recorded.body(step); });
            std::fill(first.tokens.begin(), first.tokens.end(), 49);
            std::fill(first.positions.begin(), first.positions.end(), 7);
            for (CachedSpan& span : first.spans)
                span.slot = 3;
        } else {
            engine.run_step(now.step(), *recorded.cache, [&] { recorded.body(now.step()); });
        }
        const Arrays alone = arrays(tokens, position, 0);
        plain->run_step(alone.step(), *expected.cache, [&] { expected.body(alone.step()); });
        Matrix wanted = expected.result();
        wanted.values.resize(rows * 64); // zeros in a row of no sequence
        wanted.rows = rows;
        expect_close(recorded.result(), wanted, tolerance, cat("position ", position));
    }
}

TEST_F(RecordedSteps, follow_the_arrays_of_each_step)
{
    compare(*recording, 1e-5);
    EXPECT_EQ(counts->recordings, 1);
    EXPECT_EQ(counts->replays, 7);
}

TEST_F(RecordedSteps, are_recorded_anew_when_buffers_may_have_moved)
{
    StepMatrices m(*recording, 2, width, 64);
    const Arrays a = arrays({1, 2}, 0, 0);
    const auto step = [&] { recording->run_step(a.step(), *m.cache, [&m, s = a.step()] { m.body(s); }); };
    step(); // runs
    step(); // is recorded and repeated
    EXPECT_EQ(counts->recordings, 1);
    const Tensor other = recording->allocate(1, 1, DType::f32);
    step(); // runs
    EXPECT_EQ(counts->replays, 1);
    step();
    EXPECT_EQ(counts->recordings, 2);
    EXPECT_EQ(counts->replays, 2);
}

TEST_F(RecordedSteps, heads_that_the_kernels_do_not_take_are_refused)
{
    EXPECT_THROW(recording->make_cache(1, 1, 8, {2, 1, 6, 0.4F}), Error);
    EXPECT_THROW(recording->make_cache(1, 1, 8, {2, 1, 264, 0.06F}), Error);
    EXPECT_NO_THROW(plain->make_cache(1, 1, 8, {2, 1, 6, 0.4F}));
}

#ifdef SELM_ENABLE_CUDA

std::unique_ptr<Engine> make_cuda_engine(DType activation)
{
    try {
        return make_engine({.engine = "aten", .device = Device::cuda, .activation = activation});
    } catch (const Error& error) {
        if (std::string(error.what()).find("no CUDA device is visible") == std::string::npos)
            throw;
        return nullptr;
    }
}

TEST_F(RecordedSteps, cuda)
{
    const auto engine = make_cuda_engine(DType::f32);
    if (!engine)
        GTEST_SKIP() << "no CUDA device is visible";
    compare(*engine, 1e-4);
}

Matrix rounded_to_bf16(Matrix x)
{
    for (double& value : x.values)
        value = static_cast<double>(bf16_to_float(float_to_bf16(static_cast<float>(value))));
    return x;
}

Tensor upload_bf16(Engine& engine, const Matrix& x)
{
    std::vector<std::uint16_t> host;
    for (const double value : x.values)
        host.push_back(float_to_bf16(static_cast<float>(value)));
    const Tensor out = engine.allocate(x.rows, x.columns, DType::bf16);
    engine.copy_from_host(host.data(), out);
    return out;
}

Matrix download_bf16(Engine& engine, const Tensor& x)
{
    std::vector<std::uint16_t> host(static_cast<std::size_t>(x.rows * x.columns));
    engine.copy_to_host(x, host.data());
    Matrix out(x.rows, x.columns);
    for (std::size_t i = 0; i < host.size(); ++i)
        out.values[i] = static_cast<double>(bf16_to_float(host[i]));
    return out;
}

// Of bf16 numbers: weights, their gradients and results are rounded once each, so an element is off by a few 2^-8 of the sum of
// its terms' magnitudes.
TEST(FlashAttention, cuda)
{
    const auto engine = make_cuda_engine(DType::bf16);
    if (!engine)
        GTEST_SKIP() << "no CUDA device is visible";
    const std::vector<Segment> segments = {{0, 130, -1}, {130, 70, 0}, {200, 129, 0}, {329, 1, -1}, {330, 64, 3}, {394, 257, -1}};
    for (const AttentionShape& shape : {AttentionShape{9, 3, 64, 0.125F}, AttentionShape{4, 4, 128, 0.088388346F}}) {
        const std::int64_t tokens = 651, width = shape.heads * shape.head_dim;
        const Matrix qkv = rounded_to_bf16(random_matrix(tokens, width + 2 * shape.kv_heads * shape.head_dim, 1));
        const Matrix d_out = rounded_to_bf16(random_matrix(tokens, width, 2));
        const Tensor qkv_t = upload_bf16(*engine, qkv), out = engine->allocate(tokens, width, DType::bf16);
        const Tensor lse = engine->allocate(shape.heads, tokens, DType::f32), dqkv = engine->allocate(tokens, qkv.columns, DType::bf16);
        engine->attention(qkv_t, shape, segments, out, lse);
        engine->attention_backward(qkv_t, shape, segments, out, lse, upload_bf16(*engine, d_out), dqkv);
        const reference::Attention expected = reference::attention(qkv, shape, segments);
        const reference::AttentionMagnitudes magnitudes = reference::attention_magnitudes(qkv, shape, segments, d_out);
        const auto tolerance = [](const Matrix& of) { return [&of](std::size_t i) { return 1e-3 + of.values[i] * 4 / 256; }; };
        expect_close(download_bf16(*engine, out), expected.out, tolerance(magnitudes.out), "out");
        expect_close(download_bf16(*engine, dqkv), reference::attention_backward(qkv, shape, segments, d_out),
                     tolerance(magnitudes.dqkv), "dqkv");
        std::vector<float> host(static_cast<std::size_t>(shape.heads * tokens));
        engine->copy_to_host(lse, host.data());
        Matrix found(shape.heads, tokens);
        found.values.assign(host.begin(), host.end());
        expect_close(found, expected.lse, 1e-3, "lse");
    }
}

#endif

} // namespace
} // namespace selm
