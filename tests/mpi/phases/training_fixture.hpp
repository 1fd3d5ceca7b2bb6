#pragma once

#include <cmath>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "phase_fixture.hpp"
#include "selm/base/error.hpp"
#include "selm/base/files.hpp"
#include "selm/comm/agree.hpp"
#include "selm/data/iteration.hpp"
#include "selm/data/preferences.hpp"
#include "selm/phases/logprob.hpp"
#include "selm/phases/rank.hpp"
#include "selm/phases/train.hpp"
#include "tiny_model.hpp"

namespace selm::test {

/// A tiny random model, 11 rows with answers made elsewhere (two rows have none), ranked by scores of a file.
class TrainingFixture : public PhaseFixture<> {
  protected:
    static constexpr std::int64_t row_count = 11;

    /// Files that all tests begin with are made once: model/, prefs.h5, iter.h5 (ranked) and scored.h5 (with
    /// log-probs).
    static void SetUpTestSuite()
    {
        base_ = std::make_unique<SharedDirectory>(test_world());
        agree(test_world(), "tiny model", [] {
            if (test_world().is_root())
                make_tiny_model(base_->path("model"));
        });
        write_preferences(base_->path("prefs.h5"),
                          test_world().is_root() ? question_rows(row_count, 40, 23) : std::vector<PreferenceRow>(), {}, test_world());
        make_iteration(base_->path("prefs.h5"), base_->path("iter.h5"));
        rank(base_->path("iter.h5"), base_->path("scores.jsonl"), "best-worst");
        agree(test_world(), "copy", [] {
            if (test_world().is_root())
                std::filesystem::copy_file(base_->path("iter.h5"), base_->path("scored.h5"));
        });
        run_logprob(logprob_defaults(base_->path("scored.h5"), base_->path("model")), test_world());
    }
    static void TearDownTestSuite() { base_.reset(); }

    static LogProbOptions logprob_defaults(const std::string& iter, const std::string& model)
    {
        LogProbOptions options;
        options.common = common();
        options.encoding.max_length = 96;
        options.encoding.max_prompt_length = 48;
        options.iter = iter;
        options.model = model;
        options.tokens_per_microbatch = 200;
        return options;
    }

    void SetUp() override
    {
        PhaseFixture::SetUp();
        on_root([&] {
            std::filesystem::copy(base_->path("model"), path("model"));
            for (const char* file : {"prefs.h5", "iter.h5", "scored.h5"})
                std::filesystem::copy_file(base_->path(file), path(file));
        });
        logprob_options_ = logprob_defaults(path("iter.h5"), path("model"));
        train_options_.common = common();
        train_options_.encoding = logprob_options_.encoding;
        train_options_.iter = path("scored.h5");
        train_options_.policy = path("model");
        train_options_.tokens_per_microbatch = 200;
        train_options_.output = path("policy");
        train_options_.alpha = {0.1};
        train_options_.beta = {0.1};
        train_options_.learning_rate = {1e-3};
        train_options_.schedule = "constant";
        train_options_.warmup_ratio = 0;
        train_options_.global_batch = 4;
        train_options_.epochs = 3;
        train_options_.save_dtype = "fp32";
    }

    static CommonOptions common()
    {
        CommonOptions options;
        options.dtype = "fp32";
        options.progress = "off";
        return options;
    }

    static void make_iteration(const std::string& prefs_file, const std::string& file)
    {
        const PreferencesReader prefs(prefs_file);
        std::vector<std::int64_t> rows;
        std::vector<GeneratedAnswer> answers;
        for (std::int64_t i = 0; i < row_count; ++i) {
            rows.push_back(i);
            if (!test_world().is_root())
                continue;
            const bool none = i == 3 || i == 8;
            answers.push_back({.row = i,
                               .text = none ? "" : cat("answer ", i),
                               .tokens = {},
                               .logprobs = {},
                               .finish_reason = none ? FinishReason::none : FinishReason::elsewhere});
        }
        write_iteration(file, prefs, rows, answers, {}, {}, test_world());
    }

    static void rank(const std::string& file, const std::string& scores_file, const std::string& rule)
    {
        agree(test_world(), "scores", [&] {
            if (!test_world().is_root())
                return;
            std::ofstream scores(scores_file);
            for (std::int64_t i = 0; i < row_count; ++i) {
                const double generated =
                    i == 3 || i == 8 ? std::nan("") : static_cast<double>(i % 3); // best, middle or worst
                scores << R"({"prompt_id": "id)" << i << R"(", "scores": [)";
                if (std::isnan(generated))
                    scores << "null";
                else
                    scores << generated;
                scores << ", " << 0.5 + static_cast<double>(i % 2) << ", 0.25]}\n";
            }
        });
        RankOptions options;
        options.common = common();
        options.iter = file;
        options.rankers = {"file:" + scores_file};
        options.update_rule = rule;
        run_rank(options, test_world());
    }


    LogProbOptions logprob_options_;
    TrainOptions train_options_;

  private:
    inline static std::unique_ptr<SharedDirectory> base_;
};

} // namespace selm::test
