#include "engine_test_support.hpp"

namespace selm {
namespace {

class MemoryTest : public EngineTest {};

TEST_P(MemoryTest, bytes_are_counted_until_the_last_handle_goes)
{
    const std::int64_t before = engine().allocated_bytes();
    Tensor x = engine().allocate(7, 33, DType::f32);
    Tensor y = engine().allocate(5, 3, DType::bf16);
    const std::int64_t both = engine().allocated_bytes();
    EXPECT_GE(both - before, 7 * 33 * 4 + 5 * 3 * 2);
    EXPECT_GE(engine().peak_allocated_bytes(), both);
    Tensor slice = x.slice_rows(6, 1);
    x = {};
    EXPECT_EQ(engine().allocated_bytes(), both) << "a slice keeps the storage";
    slice = {};
    y = {};
    EXPECT_EQ(engine().allocated_bytes(), before);
    EXPECT_GE(engine().peak_allocated_bytes(), both);
}

TEST_P(MemoryTest, copies_and_zeros_respect_the_stride)
{
    const Matrix values_in = random_matrix(5, 7, 1);
    const Tensor x = tensor(values_in, 4); // TearDown looks into the gaps
    EXPECT_EQ(values(x).values, values_in.values);
    engine().fill_zero(x.slice_columns(2, 3));
    const Matrix result = values(x);
    for (std::int64_t r = 0; r < 5; ++r)
        for (std::int64_t c = 0; c < 7; ++c)
            EXPECT_EQ(result(r, c), c >= 2 && c < 5 ? 0 : values_in(r, c));
}

TEST_P(MemoryTest, describes_itself)
{
    EXPECT_EQ(engine().device(), options().device);
    EXPECT_EQ(engine().activation_dtype(), DType::f32);
    EXPECT_NE(engine().description().find(options().engine), std::string::npos) << engine().description();
}

SELM_INSTANTIATE_ENGINES(MemoryTest);

std::string refusal(const EngineOptions& options)
{
    try {
        make_engine(options);
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::configuration);
        return error.what();
    }
    return {};
}

TEST(MakeEngineTest, unknown_engine_is_refused)
{
    EXPECT_NE(refusal({.engine = "fast"}).find("fast"), std::string::npos);
}

TEST(MakeEngineTest, xsmm_has_no_cuda)
{
    EXPECT_NE(refusal({.engine = "xsmm", .device = Device::cuda}).find("xsmm"), std::string::npos);
}

// Without a GPU both builds refuse, each with its reason; with one there is an engine.
TEST(MakeEngineTest, cuda_says_why_not)
{
    const std::string message = refusal({.device = Device::cuda});
    if (message.empty())
        GTEST_SKIP() << "there is a GPU";
    EXPECT_NE(message.find("CUDA"), std::string::npos) << message;
#ifdef SELM_ENABLE_CUDA
    EXPECT_NE(message.find("no CUDA device is visible"), std::string::npos) << message;
#else
    EXPECT_NE(message.find("this build has no CUDA"), std::string::npos) << message;
#endif
}

} // namespace
} // namespace selm
