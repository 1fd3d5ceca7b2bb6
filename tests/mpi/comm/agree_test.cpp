#include "selm/comm/agree.hpp"

#include <new>
#include <stdexcept>

#include <gtest/gtest.h>

#include "mpi_test.hpp"

namespace selm {
namespace {

Communicator& world()
{
    return test::test_world();
}

Error error_of_agreement(const std::function<void()>& body)
{
    try {
        agree(world(), "label", body);
    } catch (const Error& error) {
        return error;
    }
    return {ExitCode::done, "no error"};
}

TEST(Agree, NoErrorMeansAllGoOn)
{
    int calls = 0;
    agree(world(), "label", [&] { ++calls; });
    EXPECT_EQ(calls, 1);
}

TEST(Agree, OneThrowingRankStopsAllWithItsError)
{
    for (int failing = 0; failing < world().size(); ++failing) {
        const Error error = error_of_agreement([&] {
            if (world().rank() == failing)
                throw data_error(cat("row ", failing, " is bad"));
        });
        EXPECT_EQ(error.code(), ExitCode::bad_data);
        EXPECT_EQ(std::string(error.what()), cat("row ", failing, " is bad"));
    }
}

TEST(Agree, TheLowestFailingRankSpeaks)
{
    const int lowest = world().size() > 1 ? 1 : 0;
    const Error error = error_of_agreement([&] {
        if (world().rank() >= lowest)
            throw io_error(cat("rank ", world().rank()));
    });
    EXPECT_EQ(error.code(), ExitCode::io);
    EXPECT_EQ(std::string(error.what()), cat("rank ", lowest));
}

TEST(Agree, OtherExceptionsBecomeInternal)
{
    const auto on_last = [&](auto&& fail) {
        return error_of_agreement([&] {
            if (world().rank() == world().size() - 1)
                fail();
        });
    };
    const Error runtime = on_last([] { throw std::out_of_range("index 7"); });
    EXPECT_EQ(runtime.code(), ExitCode::internal);
    EXPECT_EQ(std::string(runtime.what()), "label: index 7");
    EXPECT_EQ(on_last([] { throw std::bad_alloc(); }).code(), ExitCode::internal);
    EXPECT_EQ(on_last([] { throw 5; }).code(), ExitCode::internal);
}

TEST(RootString, RunsOnRootAndReachesAll)
{
    int calls = 0;
    const std::string text = root_string(world(), "label", [&] {
        ++calls;
        return cat("from rank ", world().rank());
    });
    EXPECT_EQ(text, "from rank 0");
    EXPECT_EQ(calls, world().is_root() ? 1 : 0);
    EXPECT_THROW(root_string(world(), "label", []() -> std::string { throw data_error("no file"); }), Error);
}

} // namespace
} // namespace selm
