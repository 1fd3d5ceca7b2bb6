#include "selm/shard/staged_gradient.hpp"

#include <map>

#include <gtest/gtest.h>

#include "shard_test_support.hpp"

namespace selm {
namespace {

/// Host buffers that start at 1, and the calls that came.
class RecordingSink final : public GradientSink {
  public:
    RecordingSink(std::span<const ParameterSpec> parameters, std::int64_t frozen) : frozen_(frozen)
    {
        for (const ParameterSpec& spec : parameters)
            values.emplace_back(static_cast<std::size_t>(spec.elements()), 1.0F);
    }
    Tensor gradient(std::int64_t parameter) override
    {
        if (parameter == frozen_)
            return {};
        auto& of = values[static_cast<std::size_t>(parameter)];
        return borrow_f32(of.data(), 1, static_cast<std::int64_t>(of.size()));
    }
    void ready(std::int64_t parameter) override { finished.push_back(parameter); }

    std::vector<std::vector<float>> values;
    std::vector<std::int64_t> finished;

  private:
    std::int64_t frozen_;
};

TEST(StagedGradient, AddsWhatAPassMadeOnceAndKeepsNothing)
{
    const auto parameters = test::toy_parameters();
    const auto engine = make_engine({.engine = "aten"});
    RecordingSink host(parameters, 3);
    StagedGradient staged(parameters, *engine, host);
    const std::int64_t before = engine->allocated_bytes();
    for (int pass = 0; pass < 2; ++pass) {
        staged.gradient(0).f32()[5] += 2; // the tied head; the embedding adds to the same buffer
        for (std::int64_t p = 13; p >= 0; --p) {
            const Tensor to = staged.gradient(p);
            EXPECT_EQ(to.empty(), p == 3);
            if (!to.empty())
                to.f32()[5] += 1;
            staged.ready(p);
        }
        EXPECT_EQ(engine->allocated_bytes(), before);
    }
    EXPECT_EQ(host.values[0][5], 1 + 2 * 3);
    EXPECT_EQ(host.values[0][4], 1);
    EXPECT_EQ(host.values[13][5], 1 + 2);
    EXPECT_EQ(host.values[3][5], 1);
    EXPECT_EQ(host.finished.size(), 28U);
    EXPECT_EQ(host.finished.front(), 13);
    staged.ready(7); // a pass without rows never asked
    EXPECT_EQ(host.values[7][5], 3);
}

} // namespace
} // namespace selm
