#include "same_numerics.hpp"

#include "phase_fixture.hpp"

namespace selm {
namespace {

using test::test_world;

class SameNumerics : public test::PhaseFixture<> {};

TEST_F(SameNumerics, AcceptsRanksThatMultiplyAlike)
{
    EXPECT_FALSE(error_of([] { check_same_numerics("xsmm-bf16", test_world()); }));
}

TEST_F(SameNumerics, NamesARankOfEachKindOnAllRanks)
{
    if (test_world().size() == 1)
        GTEST_SKIP() << "one rank has one kind";
    const int last = test_world().size() - 1;
    expect_error(ExitCode::configuration, {"rank 0 multiplies with xsmm-bf16 (", "rank " + std::to_string(last) + " with xsmm ("},
                 [&] { check_same_numerics(test_world().rank() == last ? "xsmm" : "xsmm-bf16", test_world()); });
}

} // namespace
} // namespace selm
