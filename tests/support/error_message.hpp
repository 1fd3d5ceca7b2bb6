#pragma once

#include <string>
#include <utility>

#include <gtest/gtest.h>

#include "selm/base/error.hpp"

namespace selm::test {

/// The message of the Error with this code that @p body throws; a failure and "" when none comes.
template<typename Body>
std::string message_of(ExitCode code, Body&& body)
{
    try {
        std::forward<Body>(body)();
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), code) << error.what();
        return error.what();
    }
    ADD_FAILURE() << "no error";
    return {};
}

} // namespace selm::test
