#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "mpi_test.hpp"
#include "selm/base/error.hpp"
#include "selm/comm/agree.hpp"
#include "selm/data/iteration.hpp"
#include "selm/data/preferences.hpp"
#include "shared_directory.hpp"

namespace selm::test {

/// What the tests of phases share: a directory that all ranks know, work of rank 0 alone, errors that all ranks must get.
template<typename Base = ::testing::Test>
class PhaseFixture : public Base {
  protected:
    void SetUp() override { directory_ = std::make_unique<SharedDirectory>(test_world()); }
    void TearDown() override { directory_.reset(); }

    std::string path(const std::string& name) const { return directory_->path(name); }
    static void on_root(const std::function<void()>& body)
    {
        agree(test_world(), "rank 0 of the test", [&] {
            if (test_world().is_root())
                body();
        });
    }
    static std::string digest(const std::string& file)
    {
        return root_string(test_world(), "digest", [&] { return IterationReader(file).digest(); });
    }
    /// The error of @p body, which all ranks must get or none.
    static std::optional<Error> error_of(const std::function<void()>& body)
    {
        std::optional<Error> error;
        try {
            body();
        } catch (const Error& caught) {
            error.emplace(caught);
        }
        const auto ranks = all_reduce_value(test_world(), std::int64_t{error ? 1 : 0}, ReduceOp::sum, "ranks with an error");
        EXPECT_TRUE(ranks == 0 || ranks == test_world().size()) << ranks;
        return error;
    }
    /// The error that every rank must get, with these words in its message.
    static void expect_error(ExitCode code, const std::vector<std::string>& words, const std::function<void()>& body)
    {
        const auto error = error_of(body);
        ASSERT_TRUE(error) << "no error where one was expected: " << words.front();
        EXPECT_EQ(error->code(), code) << error->what();
        for (const std::string& word : words)
            EXPECT_NE(std::string(error->what()).find(word), std::string::npos) << error->what();
    }
    /// An iteration file of the first @p rows rows with answers made elsewhere; nullopt: none. By rank 0.
    static void write_given_answers(const std::string& file, const std::string& prefs_file, std::int64_t rows,
                                    const std::function<std::optional<std::string>(std::int64_t row)>& answer)
    {
        on_root([&] {
            const PreferencesReader prefs(prefs_file);
            std::vector<std::int64_t> all;
            std::vector<GeneratedAnswer> answers;
            for (std::int64_t i = 0; i < rows; ++i) {
                const auto text = answer(i);
                all.push_back(i);
                answers.push_back({.row = i, .text = text.value_or(""), .tokens = {}, .logprobs = {},
                                   .finish_reason = text ? FinishReason::elsewhere : FinishReason::none});
            }
            write_iteration(file, prefs, all, answers, {}, {}, *make_single_communicator());
        });
    }

  private:
    std::unique_ptr<SharedDirectory> directory_;
};

/// Rows of unlike lengths: row i has a prompt of about i * 13 modulo @p prompt_cycle bytes, and so on; in row 4 both answers are equal.
inline std::vector<PreferenceRow> question_rows(std::int64_t count, std::int64_t prompt_cycle, std::int64_t chosen_cycle)
{
    std::vector<PreferenceRow> rows;
    for (std::int64_t i = 0; i < count; ++i) {
        PreferenceRow row;
        row.row_source = i;
        row.id = cat("id", i);
        row.prompt = cat("Question ", i, std::string(static_cast<std::size_t>(i * 13 % prompt_cycle), 'q'));
        row.messages = {{Role::user, row.prompt}};
        row.chosen = cat("good ", i, std::string(static_cast<std::size_t>(i * 7 % chosen_cycle), 'g'));
        row.rejected = i == 4 ? row.chosen : cat("bad ", i, std::string(static_cast<std::size_t>(i * 5 % 31), 'b'));
        rows.push_back(row);
    }
    return rows;
}

} // namespace selm::test
