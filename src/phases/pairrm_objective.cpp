#include "pairrm_objective.hpp"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "ranker_files.hpp"
#include "reward_objective.hpp"
#include "selm/algo/losses.hpp"
#include "selm/base/error.hpp"
#include "selm/base/rng.hpp"
#include "selm/comm/agree.hpp"
#include "selm/data/preferences.hpp"
#include "selm/model/pair_model.hpp"
#include "selm/phases/shared_model.hpp"
#include "selm/rank/pairrm_inputs.hpp"
#include "selm_objective.hpp"
#include "shared_pair_model.hpp"

namespace selm {

namespace {

using nlohmann::ordered_json;

constexpr std::uint32_t order_stream = 4, head_stream = 3; // purposes of random streams
constexpr auto chosen = static_cast<std::size_t>(Candidate::chosen);
constexpr auto rejected = static_cast<std::size_t>(Candidate::rejected);

/// The encoder of the start directory, with a vocabulary that has room for PairRM's tokens and nothing behind them, as
/// LLM-Blender makes it.
DebertaConfig ranker_config(DebertaConfig config, const UnigramTokenizer& tokenizer)
{
    config.vocabulary = tokenizer.vocabulary_size();
    return config;
}

class PairRmObjective final : public TrainingObjective {
  public:
    PairRmObjective(const TrainOptions& options, std::unique_ptr<PreferencesReader> prefs, std::string model_digest,
                    std::string data_digest)
        : options_(options), prefs_(std::move(prefs)), range_(RowRange::parse(options.rows, prefs_->rows())),
          model_digest_(std::move(model_digest)), data_digest_(std::move(data_digest)),
          start_config_(DebertaConfig::from_directory(options.policy)), reader_(options.policy),
          tokenizer_(UnigramTokenizer::from_directory(options.policy, pair_prefix_tokens)),
          config_(ranker_config(start_config_, tokenizer_)),
          tokens_(PairTokens::of(tokenizer_, config_, options.policy)),
          encoder_(tokenizer_, tokens_, PairLimits::from_directory(options.policy), PairRankMode::per_row),
          engine_(make_engine(engine_options(options.common, parse_dtype(options.common.dtype))))
    {
        SELM_VALIDATE(rows() > 0, ExitCode::bad_data,
                      options.data << " has no rows there (there is nothing to train on). Check --rows");
        const auto own = UnigramTokenizer::from_directory(options.policy).vocabulary_size();
        check_vocabulary(options.policy, own, start_config_.vocabulary);
    }

    std::int64_t rows() const override { return range_.end - range_.begin; }
    std::int64_t cost(std::int64_t row) const override { return costs_[static_cast<std::size_t>(row)].tokens; }
    std::string row_name(std::int64_t row) const override
    {
        return cat(range_.begin + row, " (prompt_id \"", prefs_->id(range_.begin + row), "\")");
    }
    std::vector<ParameterSpec> parameters() const override { return pair_parameters(config_); }
    CheckpointBinding binding() const override
    {
        return {
            {"policy", model_digest_}, {"preference data", data_digest_}, {"rows", cat(range_.begin, ":", range_.end)}};
    }
    void start_epoch(std::int64_t epoch) override { epoch_ = epoch; }

    void initialise(TrainingWeights& weights) const override
    {
        std::vector<float> values;
        for (const ParameterSlice& slice :
             parameter_slices(weights.parameters, weights.layout, weights.optimizer.pieces())) {
            if (slice.count == 0)
                continue;
            const std::size_t i = slice.parameter;
            const ParameterSpec& spec = weights.parameters[i];
            const auto size = static_cast<std::size_t>(spec.elements());
            const auto out = weights.optimizer.master(slice.unit).subspan(slice.piece_begin, slice.count);
            const std::size_t first = slice.parameter_begin;
            const std::size_t stored = stored_elements(spec);
            const std::size_t from_file = std::min(out.size(), stored > first ? stored - first : 0);
            if (from_file > 0)
                read_stored(spec, first, out.first(from_file));
            if (from_file == out.size())
                continue;
            values = new_parameter(static_cast<std::int64_t>(i), size);
            std::copy_n(values.begin() + static_cast<std::ptrdiff_t>(first + from_file), out.size() - from_file,
                        out.begin() + static_cast<std::ptrdiff_t>(from_file));
        }
    }

    void refresh(TrainingWeights& weights) override
    {
        agree(weights.comm(), "preparing the weights", [&] { refresh_own(weights); });
    }
    void refresh_own(TrainingWeights& weights)
    {
        if (weights_) {
            weights_->refresh();
            return;
        }
        std::vector<Tensor> parameters;
        for (std::size_t i = 0; i < weights.parameters.size(); ++i)
            parameters.push_back(weights.view(i));
        weights_ = std::make_unique<PairWeights>(
            config_, *engine_, std::move(parameters),
            PairWeights::Options{.dtype = parse_dtype(options_.common.dtype), .with_backward = true});
        model_ = std::make_unique<PairModel>(config_, *engine_, *weights_);
    }

    void accumulate(std::span<const std::int64_t> rows, double scale, GradientSink& gradient, StepSums& sums,
                    std::vector<std::int64_t>& bad_rows) override
    {
        std::vector<PairInput> inputs;
        std::vector<double> signs;
        for (const std::int64_t row : rows) {
            const PairEncoder::Row parts = encode(row);
            const bool left =
                chosen_is_left(static_cast<std::uint64_t>(options_.common.seed), epoch_, range_.begin + row);
            signs.push_back(left ? 1 : -1);
            inputs.push_back(encoder_.pair(parts.source, *parts.candidates[left ? chosen : rejected],
                                           *parts.candidates[left ? rejected : chosen]));
            sums[StepSums::tokens] += static_cast<double>(inputs.back().ids.size());
        }
        const auto pass = model_->forward_kept(inputs);
        std::vector<float> slopes;
        for (std::size_t i = 0; i < rows.size(); ++i) {
            const double margin = signs[i] * static_cast<double>(pass->logits()[i]);
            const BradleyTerryLoss loss = bradley_terry_loss(margin, 0);
            if (!std::isfinite(loss.loss))
                bad_rows.push_back(rows[i]);
            slopes.push_back(static_cast<float>(scale * loss.d_best * signs[i]));
            sums[StepSums::rows] += 1;
            sums[StepSums::loss] += loss.loss;
            sums[StepSums::margin] += margin;
            sums[StepSums::accuracy] += margin > 0 ? 1 : 0;
        }
        model_->backward(*pass, slopes, gradient);
    }
    std::int64_t engine_bytes() const override { return engine_->peak_allocated_bytes(); }
    std::string engine_description() const override { return engine_->description(); }
    std::string numerics() const override { return engine_->numerics(); }

    ordered_json metrics(const StepSums& sums) const override
    {
        return {{"loss", sums.mean(StepSums::loss)},
                {"rewards/accuracies", sums.mean(StepSums::accuracy)},
                {"rewards/margins", sums.mean(StepSums::margin)}};
    }

    std::vector<SafetensorSpec> tensors() const override { return pair_tensors(config_); }
    DType saved_dtype() const override { return parse_dtype(options_.save_dtype); }
    void write_files(const std::string& directory) const override
    {
        write_ranker_files(options_.policy, directory, config_, tokens_, tokenizer_, saved_dtype());
    }

    void set_costs(std::vector<RowCost> costs) { costs_ = std::move(costs); }
    RowCost measure(std::int64_t row) const
    {
        const PairEncoder::Row parts = encode(row);
        const auto tokens = static_cast<std::int64_t>(parts.source.size() + parts.candidates[chosen]->size() +
                                                      parts.candidates[rejected]->size());
        return {tokens, tokens};
    }

  private:
    PairEncoder::Row encode(std::int64_t row) const
    {
        const PreferenceRow texts = prefs_->row(range_.begin + row);
        const PairEncoder::Texts of_row{texts.prompt, {std::nullopt, texts.chosen, texts.rejected}};
        return std::move(encoder_.encode(std::span(&of_row, 1)).front());
    }

    static bool is_embedding(const ParameterSpec& spec) { return spec.name.ends_with("word_embeddings.weight"); }
    /// How much of a parameter the directory has: all, nothing, or an embedding without rows for new tokens.
    std::size_t stored_elements(const ParameterSpec& spec) const
    {
        if (!has_pair_parameter(reader_, spec))
            return 0;
        const std::int64_t rows = is_embedding(spec) ? std::min(spec.rows, start_config_.vocabulary) : spec.rows;
        return static_cast<std::size_t>(rows * spec.columns);
    }
    void read_stored(ParameterSpec spec, std::size_t first, std::span<float> out) const
    {
        if (is_embedding(spec) && start_config_.vocabulary < spec.rows)
            spec.rows = spec.parts[0].rows = spec.parts[0].shape[0] = start_config_.vocabulary;
        read_pair_parameter(reader_, spec, static_cast<std::int64_t>(first), out);
    }

    /// Start values of what the directory does not have, a head or embeddings of new tokens: normal with deviation 0.02
    /// (DeBERTa's initializer_range), biases zero. @throws Error configuration when another tensor is missing.
    std::vector<float> new_parameter(std::int64_t parameter, std::size_t elements) const
    {
        const ParameterSpec spec = pair_parameters(config_)[static_cast<std::size_t>(parameter)];
        SELM_VALIDATE(parameter >= PairParameterIndex::head(config_) || has_pair_parameter(reader_, spec),
                      ExitCode::configuration,
                      options_.policy << " has no tensor " << spec.name
                                      << " (it is no whole DeBERTa). Pass a complete model directory");
        std::vector<float> values(elements, 0.0F);
        if (parameter == PairParameterIndex::head_hidden_bias(config_) ||
            parameter == PairParameterIndex::head_output_bias(config_))
            return values;
        RandomStream stream(static_cast<std::uint64_t>(options_.common.seed), head_stream, 0,
                            static_cast<std::uint64_t>(parameter));
        for (float& value : values)
            value = static_cast<float>(0.02 * stream.next_normal());
        return values;
    }

    TrainOptions options_;
    std::unique_ptr<PreferencesReader> prefs_;
    RowRange range_;
    std::string model_digest_, data_digest_;
    DebertaConfig start_config_; ///< of the start directory
    SafetensorsReader reader_;
    UnigramTokenizer tokenizer_;
    DebertaConfig config_; ///< of what is trained
    PairTokens tokens_;
    PairEncoder encoder_;
    std::unique_ptr<Engine> engine_;
    std::unique_ptr<PairWeights> weights_;
    std::unique_ptr<PairModel> model_;
    std::vector<RowCost> costs_;
    std::int64_t epoch_ = 0;
};

} // namespace

bool chosen_is_left(std::uint64_t seed, std::int64_t epoch, std::int64_t row)
{
    RandomStream stream(seed, order_stream, static_cast<std::uint64_t>(epoch), static_cast<std::uint64_t>(row));
    return stream.next_below(2) == 0;
}

std::unique_ptr<TrainingObjective> make_pairrm_objective(const TrainOptions& options, Communicator& comm)
{
    std::unique_ptr<PreferencesReader> prefs;
    agree(comm, "opening the rows", [&] { prefs = std::make_unique<PreferencesReader>(options.data); });
    std::string data_digest = root_string(comm, "digest of the rows", [&] { return prefs->digest(); });
    std::string model_digest =
        root_string(comm, "digest of the start model", [&] { return pair_model_digest(options.policy); });
    std::unique_ptr<PairRmObjective> objective;
    agree(comm, "opening the start model", [&] {
        objective = std::make_unique<PairRmObjective>(options, std::move(prefs), std::move(model_digest),
                                                      std::move(data_digest));
    });
    objective->set_costs(
        gather_costs(objective->rows(), comm, [&](std::int64_t row) { return objective->measure(row); }));
    return objective;
}

} // namespace selm
