#include "reward_objective.hpp"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <optional>
#include <utility>

#include "decoder_objective.hpp"
#include "packed_rows.hpp"
#include "selm/algo/losses.hpp"
#include "selm/base/error.hpp"
#include "selm/base/log.hpp"
#include "selm/comm/agree.hpp"
#include "selm/comm/stop_condition.hpp"
#include "selm/data/journal.hpp"
#include "selm/data/work_queue.hpp"
#include "selm/model/model_files.hpp"
#include "selm/phases/shared_model.hpp"
#include "selm_objective.hpp"

namespace selm {

namespace {

using nlohmann::ordered_json;
constexpr auto chosen = static_cast<std::size_t>(Candidate::chosen);
constexpr auto rejected = static_cast<std::size_t>(Candidate::rejected);
constexpr std::int64_t elements_at_a_time = std::int64_t{1} << 20; ///< that are copied from file to file

/// Preference rows [range.begin, range.end); row 0 of the objective is range.begin.
struct Rows {
    std::unique_ptr<PreferencesReader> prefs;
    RowRange range;
    std::string data_digest, model_digest;

    std::int64_t size() const { return range.end - range.begin; }
    PackedRow encode(const RowEncoder& encoder, std::int64_t row) const
    {
        return encoder.encode(prefs->row(range.begin + row));
    }
    std::string name(std::int64_t row) const
    {
        return cat(range.begin + row, " (prompt_id \"", prefs->id(range.begin + row), "\")");
    }
    CheckpointBinding binding() const
    {
        return {{"policy", model_digest}, {"preference data", data_digest}, {"rows", cat(range.begin, ":", range.end)}};
    }
};

Rows open_rows(const TrainOptions& options, Communicator& comm)
{
    Rows rows;
    agree(comm, "opening the rows", [&] {
        rows.prefs = std::make_unique<PreferencesReader>(options.data);
        rows.range = RowRange::parse(options.rows, rows.prefs->rows());
        SELM_VALIDATE(rows.size() > 0, ExitCode::bad_data,
                      options.data << " has no rows there (there is nothing to train on). Check --rows");
    });
    rows.data_digest = root_string(comm, "digest of the rows", [&] { return rows.prefs->digest(); });
    rows.model_digest = root_string(comm, "digest of the start model", [&] { return model_digest(options.policy); });
    return rows;
}

void add_row(StepSums& sums, const BradleyTerryLoss& loss, double margin)
{
    sums[StepSums::rows] += 1;
    sums[StepSums::loss] += loss.loss;
    sums[StepSums::margin] += margin;
    sums[StepSums::accuracy] += margin > 0 ? 1 : 0;
}

/// All weights: one packed pass per row, the score is h . w at the last token of each answer.
class RewardModelObjective final : public DecoderObjective {
  public:
    RewardModelObjective(const TrainOptions& options, std::unique_ptr<DecoderTrainer> model, RowEncoder encoder,
                         Rows rows)
        : DecoderObjective(std::move(model), save_dtype(options)), encoder_(std::move(encoder)),
          rows_(std::move(rows))
    {
    }

    std::int64_t rows() const override { return rows_.size(); }
    std::string row_name(std::int64_t row) const override { return rows_.name(row); }
    CheckpointBinding binding() const override { return rows_.binding(); }

    void accumulate(std::span<const std::int64_t> rows, double scale, GradientSink& gradient, StepSums& sums,
                    std::vector<std::int64_t>& bad_rows) override
    {
        std::vector<PackedRow> packed;
        PackedBatch batch;
        for (const std::int64_t row : rows) {
            packed.push_back(rows_.encode(encoder_, row));
            batch.add_last_token(packed.back().trunk, packed.back().branches);
        }
        Engine& engine = model().engine();
        model().plan_pass(batch);
        const auto pass = model().decoder().forward(batch, true);
        const std::int64_t hidden = model().config().hidden;
        std::vector<float> h(static_cast<std::size_t>(batch.branches * hidden));
        SELM_EXPECT(pass->hidden().dtype == DType::f32);
        engine.copy_to_host(pass->hidden(), h.data());
        const std::vector<double> scores = scores_of(h, model().score_head().data());

        std::vector<double> slopes(scores.size(), 0.0);
        std::size_t first = 0;
        for (std::size_t i = 0; i < packed.size(); ++i) {
            const std::size_t best = first + static_cast<std::size_t>(packed[i].branch_of[chosen]);
            const std::size_t worst = first + static_cast<std::size_t>(packed[i].branch_of[rejected]);
            const BradleyTerryLoss loss = bradley_terry_loss(scores[best], scores[worst]);
            if (!std::isfinite(loss.loss))
                bad_rows.push_back(rows[i]);
            slopes[best] += scale * loss.d_best;
            slopes[worst] += scale * loss.d_worst;
            add_row(sums, loss, scores[best] - scores[worst]);
            sums[StepSums::reward_best] += scores[best];
            sums[StepSums::reward_worst] += scores[worst];
            first += packed[i].branches.size();
        }
        sums[StepSums::tokens] += static_cast<double>(batch.tokens.size());
        backward(*pass, h, slopes, gradient);
    }

    ordered_json metrics(const StepSums& sums) const override
    {
        return {{"loss", sums.mean(StepSums::loss)},
                {"rewards/chosen", sums.mean(StepSums::reward_best)},
                {"rewards/rejected", sums.mean(StepSums::reward_worst)},
                {"rewards/accuracies", sums.mean(StepSums::accuracy)},
                {"rewards/margins", sums.mean(StepSums::margin)}};
    }
    RowCost measure(std::int64_t row) const { return cost_of(rows_.encode(encoder_, row)); }

  private:
    std::vector<double> scores_of(const std::vector<float>& h, const float* w) const
    {
        const auto hidden = static_cast<std::size_t>(model().config().hidden);
        std::vector<double> scores(h.size() / hidden, 0.0);
        for (std::size_t i = 0; i < scores.size(); ++i)
            for (std::size_t j = 0; j < hidden; ++j)
                scores[i] += static_cast<double>(h[i * hidden + j]) * static_cast<double>(w[j]);
        return scores;
    }

    /// d score / d h = w, d score / d w = h.
    void backward(Decoder::Pass& pass, const std::vector<float>& h, const std::vector<double>& slopes,
                  GradientSink& gradient)
    {
        const auto hidden = static_cast<std::size_t>(model().config().hidden);
        const std::int64_t head = ParameterIndex::head(model().config());
        const float* w = model().score_head().data();
        const Tensor d_head = gradient.gradient(head);
        std::vector<float> dh(h.size());
        for (std::size_t i = 0; i < slopes.size(); ++i)
            for (std::size_t j = 0; j < hidden; ++j) {
                dh[i * hidden + j] = static_cast<float>(slopes[i] * static_cast<double>(w[j]));
                if (!d_head.empty())
                    d_head.f32()[j] += static_cast<float>(slopes[i] * static_cast<double>(h[i * hidden + j]));
            }
        gradient.ready(head);
        Engine& engine = model().engine();
        const Tensor d_hidden = engine.allocate(pass.hidden().rows, pass.hidden().columns, pass.hidden().dtype);
        engine.copy_from_host(dh.data(), d_hidden);
        model().decoder().backward(pass, d_hidden, gradient);
    }

    RowEncoder encoder_;
    Rows rows_;
};

/// d = h_chosen - h_rejected of some rows, computed as the queue hands them out.
struct Features {
    std::vector<std::int64_t> rows;
    std::vector<float> values; ///< [rows, H]
};

/// Computes the features of rows that the journal does not have, as the queue hands them out. Made by all ranks together.
class FeaturePass {
  public:
    FeaturePass(const TrainOptions& options, const Rows& rows, const RowEncoder& encoder, SharedModel& model,
                Journal& journal, Communicator& comm)
        : options_(options), rows_(rows), encoder_(encoder), model_(model), journal_(journal), comm_(comm),
          stop_(options.stop_file, options.common.walltime_margin, comm)
    {
    }

    /// The features that this rank holds, earlier runs' included; nothing when a stop was requested. Collective.
    std::optional<Features> run()
    {
        WorkQueue queue(comm_, hand_out_order(), {});
        run_queue(comm_, queue, "outputs of the decoder", [&](WorkQueue& work) {
            auto shown = std::chrono::steady_clock::now();
            while (const auto row = work.next()) {
                compute(*row);
                show_progress(shown);
                if (!work.stopped() && stop_.here())
                    work.stop();
            }
            journal_.sync();
        });
        agree(comm_, "journal of the outputs", [&] {
            for (const Journal::Record& record : journal_.recovered()) {
                PayloadReader reader(record.payload);
                const auto values = reader.array<float>();
                features_.rows.push_back(record.row);
                features_.values.insert(features_.values.end(), values.begin(), values.end());
            }
        });
        const auto held = all_reduce_value(comm_, static_cast<std::int64_t>(features_.rows.size()), ReduceOp::sum,
                                           "rows with outputs");
        return held == rows_.size() ? std::optional(std::move(features_)) : std::nullopt;
    }

  private:
    std::vector<std::int64_t> hand_out_order() const
    {
        std::vector<std::pair<std::int64_t, std::int64_t>> order; // (-bytes, row): longest first
        for (std::int64_t row = 0; row < rows_.size(); ++row) {
            const std::int64_t i = rows_.range.begin + row;
            if (!journal_.is_done(row))
                order.emplace_back(
                    -(rows_.prefs->message_bytes(i) + rows_.prefs->chosen_bytes(i) + rows_.prefs->rejected_bytes(i)),
                    row);
        }
        std::sort(order.begin(), order.end());
        std::vector<std::int64_t> items;
        for (const auto& [bytes, row] : order)
            items.push_back(row);
        return items;
    }

    void compute(std::int64_t row)
    {
        const PackedRow packed = rows_.encode(encoder_, row);
        PackedBatch batch;
        batch.add_last_token(packed.trunk, packed.branches);
        const auto hidden = static_cast<std::size_t>(model_.config().hidden);
        const auto pass = model_.decoder().forward(batch, false);
        std::vector<float> h(static_cast<std::size_t>(batch.branches) * hidden);
        SELM_EXPECT(pass->hidden().dtype == DType::f32);
        model_.engine().copy_to_host(pass->hidden(), h.data());
        const float* best = h.data() + static_cast<std::size_t>(packed.branch_of[chosen]) * hidden;
        const float* worst = h.data() + static_cast<std::size_t>(packed.branch_of[rejected]) * hidden;
        std::vector<float> difference(hidden);
        for (std::size_t j = 0; j < hidden; ++j)
            difference[j] = best[j] - worst[j];
        PayloadWriter payload;
        payload.array(std::span<const float>(difference));
        journal_.append(row, payload.bytes());
        features_.rows.push_back(row);
        features_.values.insert(features_.values.end(), difference.begin(), difference.end());
    }

    void show_progress(std::chrono::steady_clock::time_point& shown) const
    {
        const auto now = std::chrono::steady_clock::now();
        if (options_.common.progress == "off" || now - shown < std::chrono::seconds(10))
            return;
        shown = now;
        SELM_LOG(info, "train: outputs of the decoder for " << features_.rows.size() << " rows on rank 0 of "
                                                            << rows_.size() << " in all");
    }

    const TrainOptions& options_;
    const Rows& rows_;
    const RowEncoder& encoder_;
    SharedModel& model_;
    Journal& journal_;
    Communicator& comm_;
    StopCondition stop_;
    Features features_;
};

/// All rows' features on every rank, in order of rows.
std::vector<float> gather_features(const Features& mine, std::int64_t rows, std::size_t hidden, Communicator& comm)
{
    std::vector<float> all(static_cast<std::size_t>(rows) * hidden);
    const auto keys = comm.all_gather_ragged(std::as_bytes(std::span(mine.rows)), "rows of the outputs");
    const auto values = comm.all_gather_ragged(std::as_bytes(std::span(mine.values)), "outputs of the decoder");
    for (std::size_t rank = 0; rank < keys.size(); ++rank)
        for (std::size_t i = 0; i < keys[rank].size() / sizeof(std::int64_t); ++i) {
            std::int64_t row = 0;
            std::memcpy(&row, keys[rank].data() + i * sizeof row, sizeof row);
            std::memcpy(all.data() + static_cast<std::size_t>(row) * hidden,
                        values[rank].data() + i * hidden * sizeof(float), hidden * sizeof(float));
        }
    return all;
}

/// s [H]; 1 where all rows agree (their feature is 0 and teaches nothing).
std::vector<float> feature_scale(const std::vector<float>& features, std::size_t hidden)
{
    std::vector<double> squares(hidden, 0.0);
    for (std::size_t i = 0; i < features.size(); ++i)
        squares[i % hidden] += static_cast<double>(features[i]) * static_cast<double>(features[i]);
    std::vector<float> scale(hidden, 1.0F);
    for (std::size_t j = 0; j < hidden; ++j)
        if (squares[j] > 0)
            scale[j] = static_cast<float>(
                std::sqrt(squares[j] * static_cast<double>(hidden) / static_cast<double>(features.size())));
    return scale;
}

/**
 * @brief The head alone on a frozen decoder. A row is the difference of its two outputs, d = h_chosen - h_rejected,
 * computed once. Trained is v = w * s, with s_j the root mean square of d_j over all rows (so that every coordinate
 * moves at the same pace): v . (d / s) = w . d exactly, and the saved head is w = v / s.
 */
class RewardHeadObjective final : public TrainingObjective {
  public:
    RewardHeadObjective(const TrainOptions& options, Rows rows)
        : options_(options), save_dtype_(save_dtype(options)), config_(reward_config(options.policy)),
          rows_(std::move(rows))
    {
        parameters_ = {decoder_parameters(config_).at(static_cast<std::size_t>(ParameterIndex::head(config_)))};
    }

    bool prepare(Communicator& comm) override
    {
        const auto model = SharedModel::from_directory(options_.policy, options_.common, comm, rows_.model_digest);
        const auto hidden = static_cast<std::size_t>(config_.hidden);
        start_.assign(hidden, 0.0F);
        std::optional<RowEncoder> encoder;
        agree(comm, "reading the tokenizer and head", [&] {
            encoder.emplace(options_.policy, options_.encoding, model->config());
            const SafetensorsReader reader(options_.policy);
            if (reader.has("score.weight"))
                reader.read_f32("score.weight", {1, config_.hidden}, 0, start_);
            if (comm.is_root() && options_.resume == "never")
                Journal::remove_leftover(journal_of());
        });
        journal_ = std::make_unique<Journal>(journal_of(), journal_binding(*model, *encoder), comm);
        const auto mine = FeaturePass(options_, rows_, *encoder, *model, *journal_, comm).run();
        if (!mine)
            return false;
        features_ = gather_features(*mine, rows_.size(), hidden, comm);
        scale_ = feature_scale(features_, hidden);
        for (std::size_t i = 0; i < features_.size(); ++i)
            features_[i] /= scale_[i % hidden];
        engine_ = model->engine().description();
        engine_bytes_ = model->engine().peak_allocated_bytes();
        return true;
    }
    void finish(Communicator&) override { journal_->remove(); }

    std::int64_t rows() const override { return rows_.size(); }
    std::int64_t cost(std::int64_t) const override { return 1; }
    std::string row_name(std::int64_t row) const override { return rows_.name(row); }
    std::vector<ParameterSpec> parameters() const override { return parameters_; }
    CheckpointBinding binding() const override { return rows_.binding(); }
    void initialise(TrainingWeights& weights) const override
    {
        const ShardInfo piece = weights.optimizer.pieces()[0];
        const auto master = weights.optimizer.master(0);
        for (std::size_t i = 0; i < master.size() && piece.offset + i < start_.size(); ++i)
            master[i] = start_[piece.offset + i] * scale_[piece.offset + i];
    }
    void refresh(TrainingWeights& weights) override { v_ = weights.view(0); }
    std::int64_t engine_bytes() const override { return engine_bytes_; }
    std::string engine_description() const override { return engine_; }

    void accumulate(std::span<const std::int64_t> rows, double scale, GradientSink& gradient, StepSums& sums,
                    std::vector<std::int64_t>& bad_rows) override
    {
        const std::size_t hidden = scale_.size();
        float* const d_v = gradient.gradient(0).f32();
        for (const std::int64_t row : rows) {
            const float* x = features_.data() + static_cast<std::size_t>(row) * hidden;
            double margin = 0;
            for (std::size_t j = 0; j < hidden; ++j)
                margin += static_cast<double>(v_.f32()[j]) * static_cast<double>(x[j]);
            const BradleyTerryLoss loss = bradley_terry_loss(margin, 0);
            if (!std::isfinite(loss.loss))
                bad_rows.push_back(row);
            for (std::size_t j = 0; j < hidden; ++j)
                d_v[j] += static_cast<float>(scale * loss.d_best * static_cast<double>(x[j]));
            add_row(sums, loss, margin);
        }
        gradient.ready(0);
    }

    ordered_json metrics(const StepSums& sums) const override
    {
        return {{"loss", sums.mean(StepSums::loss)},
                {"rewards/accuracies", sums.mean(StepSums::accuracy)},
                {"rewards/margins", sums.mean(StepSums::margin)}};
    }

    std::vector<SafetensorSpec> tensors() const override { return model_tensors(config_); }
    DType saved_dtype() const override { return save_dtype_; }
    void write_files(const std::string& directory) const override
    {
        copy_trained_model_files(options_.policy, directory, save_dtype_, true);
    }
    /// The decoder's tensors as they are, by turns, and this rank's part of the head.
    void write_weights(SafetensorsWriter& writer, const TrainingWeights& weights) const override
    {
        const SafetensorsReader reader(options_.policy);
        const std::string& head = parameters_.front().parts.front().name;
        std::vector<float> values;
        int turn = 0;
        for (const SafetensorSpec& tensor : tensors()) {
            if (tensor.name == head || turn++ % weights.comm().size() != weights.comm().rank())
                continue;
            const std::int64_t elements = reader.tensors().contains(tensor.name) ? reader.tensors().at(tensor.name).elements() : 0;
            for (std::int64_t begin = 0; begin < elements || begin == 0; begin += elements_at_a_time) {
                values.resize(static_cast<std::size_t>(std::min(elements_at_a_time, elements - begin)));
                reader.read_f32(tensor.name, tensor.shape, begin, values); // names a tensor that is missing
                writer.write(tensor.name, begin, values);
            }
        }
        weights.visit_own_master([&](const PartSlice& slice, std::span<const float> scaled) {
            values.assign(scaled.begin(), scaled.end());
            for (std::size_t j = 0; j < values.size(); ++j)
                values[j] /= scale_[slice.part_begin + j];
            writer.write(head, static_cast<std::int64_t>(slice.part_begin), values);
        });
    }

  private:
    std::string journal_of() const { return options_.output + "/outputs"; }
    JournalBinding journal_binding(const SharedModel& model, const RowEncoder& encoder) const
    {
        JournalBinding binding = rows_.binding();
        binding.emplace_back("engine", model.engine_key());
        binding.emplace_back("encoding", cat(options_.encoding.encoding, " ", encoder.format_name(), " ",
                                             options_.encoding.max_length, " ", options_.encoding.max_prompt_length));
        return binding;
    }

    TrainOptions options_;
    DType save_dtype_;
    DecoderConfig config_;
    Rows rows_;
    std::vector<ParameterSpec> parameters_;
    std::unique_ptr<Journal> journal_;
    std::vector<float> features_; ///< d / s [rows, H], the same on every rank
    std::vector<float> scale_;    ///< s [H]
    std::vector<float> start_;    ///< w to start from [H]
    Tensor v_;                    ///< what is trained [1, H]
    std::string engine_;
    std::int64_t engine_bytes_ = 0;
};

} // namespace

RowRange RowRange::parse(const std::string& text, std::int64_t rows)
{
    if (text.empty())
        return {0, rows};
    const auto bad = [&] {
        return usage_error(cat("--rows ", text, " is no range A:B of rows 0 to ", rows,
                               " (A is the first row, B the one after the last)"));
    };
    const std::size_t colon = text.find(':');
    if (colon == std::string::npos)
        throw bad();
    RowRange range{0, rows};
    const auto number = [&](std::size_t from, std::size_t to, std::int64_t& value) {
        if (from == to)
            return; // "A:" and ":B" are open
        const auto [end, error] = std::from_chars(text.data() + from, text.data() + to, value);
        if (error != std::errc() || end != text.data() + to)
            throw bad();
    };
    number(0, colon, range.begin);
    number(colon + 1, text.size(), range.end);
    if (range.begin < 0 || range.begin > range.end || range.end > rows)
        throw bad();
    return range;
}

std::unique_ptr<TrainingObjective> make_reward_objective(const TrainOptions& options, Communicator& comm)
{
    Rows rows = open_rows(options, comm);
    if (options.trainable == "head") {
        std::unique_ptr<TrainingObjective> head;
        agree(comm, "opening the start model",
              [&] { head = std::make_unique<RewardHeadObjective>(options, std::move(rows)); });
        return head;
    }
    std::unique_ptr<DecoderTrainer> model;
    std::optional<RowEncoder> encoder;
    agree(comm, "opening the start model", [&] {
        model = std::make_unique<DecoderTrainer>(options, true);
        encoder.emplace(options.policy, options.encoding, model->config());
    });
    auto objective =
        std::make_unique<RewardModelObjective>(options, std::move(model), std::move(*encoder), std::move(rows));
    objective->set_costs(
        gather_costs(objective->rows(), comm, [&](std::int64_t row) { return objective->measure(row); }));
    return objective;
}

} // namespace selm
