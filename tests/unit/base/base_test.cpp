#include <csignal>
#include <functional>
#include <limits>
#include <regex>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "selm/base/error.hpp"
#include "selm/base/log.hpp"
#include "selm/base/options.hpp"
#include "selm/base/provenance.hpp"
#include "selm/base/stop.hpp"

namespace selm {
namespace {

ExitCode code_of(const std::function<void()>& body)
{
    try {
        body();
    } catch (const Error& error) {
        return error.code();
    }
    return ExitCode::done;
}

TEST(Error, ValidateThrowsCodeAndStreamedMessage)
{
    try {
        SELM_VALIDATE(1 + 1 == 3, ExitCode::usage, "n is " << 2 << " (why). Pass --n 3");
        FAIL();
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::usage);
        EXPECT_STREQ(error.what(), "n is 2 (why). Pass --n 3");
    }
}

TEST(Error, ContractNamesConditionAndPlace)
{
    const auto broken = [] { SELM_EXPECT(2 < 1); };
    EXPECT_EQ(code_of(broken), ExitCode::internal);
    try {
        broken();
    } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()).find("2 < 1"), std::string::npos);
        EXPECT_NE(std::string(error.what()).find("base_test.cpp"), std::string::npos);
    }
}

TEST(Error, ContextKeepsTheCode)
{
    try {
        with_context("row 7", []() -> int { throw data_error("bad"); });
        FAIL();
    } catch (const Error& error) {
        EXPECT_EQ(error.code(), ExitCode::bad_data);
        EXPECT_STREQ(error.what(), "row 7: bad");
    }
    EXPECT_EQ(with_context("fine", [] { return 5; }), 5);
}

TEST(Log, RootSpeaksOnceAndLocalHasThePrefix)
{
    set_log_rank(2, 4);
    testing::internal::CaptureStderr();
    log_root(LogLevel::info, "hidden");
    log_local(LogLevel::warning, "seen");
    SELM_LOG_LOCAL(info, "n = " << 3);
    EXPECT_EQ(testing::internal::GetCapturedStderr(), "[rank 2/4] selm: warning: seen\n[rank 2/4] selm: n = 3\n");
    set_log_rank(0, 1);
    testing::internal::CaptureStderr();
    SELM_LOG(info, "n = " << 4);
    SELM_LOG(debug, "not asked for");
    EXPECT_EQ(testing::internal::GetCapturedStderr(), "selm: n = 4\n");
}

TEST(Stop, EachSignalSetsTheFlag)
{
    for (const int signal_number : {SIGTERM, SIGUSR1, SIGINT}) {
        EXPECT_EXIT(
            {
                if (stop_signal_received())
                    std::exit(3);
                install_stop_handlers();
                std::raise(signal_number);
                std::exit(stop_signal_received() ? 42 : 4);
            },
            testing::ExitedWithCode(42), "");
    }
}

TEST(Stop, ASignalThatWasBlockedWhileTheProgramStartedIsHeard)
{
    EXPECT_EXIT(
        {
            sigset_t usr1;
            sigemptyset(&usr1);
            sigaddset(&usr1, SIGUSR1);
            sigprocmask(SIG_BLOCK, &usr1, nullptr);
            std::raise(SIGUSR1);
            install_stop_handlers();
            std::exit(stop_signal_received() ? 42 : 4);
        },
        testing::ExitedWithCode(42), "");
}

TEST(Provenance, HasTheExpectedForm)
{
    EXPECT_TRUE(std::regex_match(software_version(), std::regex(R"(selm 0\.1\.0 \(git ([0-9a-f]{7,}(-modified)?|unknown)\))")))
        << software_version();
    EXPECT_TRUE(std::regex_match(utc_timestamp(), std::regex(R"(20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ)"))) << utc_timestamp();
    for (const char* part : {"HDF5 ", "Kokkos ", "LibTorch ", "MPI ", "-O"})
        EXPECT_NE(build_description().find(part), std::string::npos) << build_description();
    EXPECT_FALSE(host_name().empty());
    EXPECT_FALSE(cpu_model().empty());
}

/// Writes down what is described.
class Recorder : public OptionVisitor {
  public:
    std::vector<std::string> names;
    void option(const char* s, const char* n, std::string&, const char*, OptionRole r) override { add(s, n, r); }
    void option(const char* s, const char* n, std::int64_t&, const char*, OptionRole r) override { add(s, n, r); }
    void option(const char* s, const char* n, double&, const char*, OptionRole r) override { add(s, n, r); }
    void option(const char* s, const char* n, bool&, const char*, OptionRole r) override { add(s, n, r); }
    void option(const char* s, const char* n, std::vector<double>&, const char*, OptionRole r) override { add(s, n, r); }
    void option(const char* s, const char* n, std::vector<std::string>&, const char*, OptionRole r) override { add(s, n, r); }

  private:
    void add(const std::string& section, const std::string& name, OptionRole role)
    {
        names.push_back(section + "." + name + (role == OptionRole::recipe ? "" : " operational"));
    }
};

TEST(Options, CommonOnesAreDescribed)
{
    Recorder recorder;
    CommonOptions common;
    common.describe(recorder);
    EncodingOptions encoding;
    encoding.describe(recorder);
    EXPECT_EQ(recorder.names,
              (std::vector<std::string>{"run.seed", "run.threads operational", "run.device operational", "run.dtype",
                                        "run.engine operational", "run.progress operational",
                                        "run.collective-timeout operational", "run.walltime-margin operational", "run.encoding", "run.chat-format", "run.bos-token",
                                        "run.eos-token", "run.max-length", "run.max-prompt-length",
                                        "run.on-long-row operational"}));
}

TEST(Options, DefaultsAreValidAndBadWordsAreNot)
{
    CommonOptions{}.validate();
    EncodingOptions{}.validate();
    const auto common = [](auto&& change) {
        CommonOptions options;
        change(options);
        return code_of([&] { options.validate(); });
    };
    EXPECT_EQ(common([](CommonOptions& o) { o.dtype = "fp16"; }), ExitCode::usage);
    EXPECT_EQ(common([](CommonOptions& o) { o.device = "tpu"; }), ExitCode::usage);
    EXPECT_EQ(common([](CommonOptions& o) { o.engine = ""; }), ExitCode::usage);
    EXPECT_EQ(common([](CommonOptions& o) { o.progress = "yes"; }), ExitCode::usage);
    EXPECT_EQ(common([](CommonOptions& o) { o.threads = 0; }), ExitCode::usage);
    EXPECT_EQ(common([](CommonOptions& o) { o.seed = -1; }), ExitCode::usage);
    EXPECT_EQ(common([](CommonOptions& o) { o.collective_timeout = -1; }), ExitCode::usage);
    EXPECT_EQ(common([](CommonOptions& o) { o.collective_timeout = std::numeric_limits<double>::quiet_NaN(); }), ExitCode::usage);
#ifndef SELM_ENABLE_CUDA
    EXPECT_EQ(common([](CommonOptions& o) { o.device = "cuda"; }), ExitCode::configuration);
#endif
    EncodingOptions encoding;
    encoding.max_length = encoding.max_prompt_length;
    EXPECT_EQ(code_of([&] { encoding.validate(); }), ExitCode::usage);
    encoding = {};
    encoding.encoding = "raw";
    EXPECT_EQ(code_of([&] { encoding.validate(); }), ExitCode::usage);
    encoding = {};
    encoding.on_long_row = "skip";
    EXPECT_EQ(code_of([&] { encoding.validate(); }), ExitCode::usage);
    encoding = {};
    encoding.eos_token = "2"; // nothing would be made of it
    EXPECT_EQ(code_of([&] { encoding.validate(); }), ExitCode::usage);
    encoding.encoding = "recipe";
    encoding.validate();
}

} // namespace
} // namespace selm
