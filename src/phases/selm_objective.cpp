#include "selm_objective.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>

#include "decoder_objective.hpp"
#include "packed_rows.hpp"
#include "selm/algo/losses.hpp"
#include "selm/base/error.hpp"
#include "selm/base/hash.hpp"
#include "selm/base/log.hpp"
#include "selm/comm/agree.hpp"
#include "selm/data/iteration.hpp"
#include "selm/model/model_files.hpp"
#include "selm/phases/shared_model.hpp"

namespace selm {

namespace {

using nlohmann::ordered_json;

/// Everything a row of the loss needs besides the policy.
struct Rows {
    std::unique_ptr<IterationReader> reader;
    IterationReader::Pairs pairs;
    IterationReader::LogProbs reference;
    std::string pairs_digest, model_digest, reference_digest;
};

void compare(const std::string& path, const std::string& name, const char* what, const std::string& stored,
             const std::string& wanted)
{
    SELM_VALIDATE(stored == wanted, ExitCode::bad_data,
                  path << ": the log-probs '" << name << "' were made with another " << what << " (" << stored
                       << ", this run has " << wanted
                       << "; the loss would compare different things). Run selm_logp again with the same options as "
                          "this training");
}

std::string text_of(const h5::Attributes& attributes, const std::string& name)
{
    const auto found = attributes.find(name);
    return found == attributes.end() ? "none" : std::visit([](const auto& one) { return cat(one); }, found->second);
}

void check_reference(const TrainOptions& options, const Rows& rows, const RowEncoder& encoder,
                     const std::string& engine)
{
    const LogProbAttributes& a = rows.reference.attributes;
    const std::string& path = options.iter;
    const std::string& name = options.reference;
    compare(path, name, "model", a.digest, rows.model_digest);
    compare(path, name, "encoding", a.encoding, options.encoding.encoding);
    compare(path, name, "chat format", a.chat_format, encoder.format_name());
    compare(path, name, "max-length", std::to_string(a.max_length), std::to_string(options.encoding.max_length));
    compare(path, name, "max-prompt-length", std::to_string(a.max_prompt_length),
            std::to_string(options.encoding.max_prompt_length));
    const h5::Attributes own = encoder.attributes();
    for (const auto& entry : own)
        if (entry.first != "on_long_row") // a row that is too long would have stopped selm_logp, or stops this run by name
            compare(path, name, entry.first.c_str(), text_of(a.extra, entry.first), text_of(own, entry.first));
    compare(path, name, "dtype", a.dtype, options.common.dtype);
    compare(path, name, "choice of pairs", a.pairs_digest, rows.pairs_digest);
    if (a.engine != engine)
        SELM_LOG(warning, path << ": the log-probs '" << name << "' were made with engine " << a.engine
                               << ", this run multiplies with " << engine << "; the first loss is log 2 only up to rounding");
}

std::string digest_of(const IterationReader::LogProbs& log_probs)
{
    Hasher hasher;
    hasher.update(log_probs.sum.data(), log_probs.sum.size() * sizeof(log_probs.sum[0]));
    return hasher.hex();
}

class SelmObjective final : public DecoderObjective {
  public:
    SelmObjective(const TrainOptions& options, double alpha, double beta, std::unique_ptr<DecoderTrainer> model,
                  RowEncoder encoder, Rows rows)
        : DecoderObjective(std::move(model), save_dtype(options)), alpha_(alpha), beta_(beta),
          encoder_(std::move(encoder)), rows_(std::move(rows))
    {
    }

    std::int64_t rows() const override { return rows_.reader->rows(); }
    std::string row_name(std::int64_t row) const override
    {
        return cat(rows_.reader->row_key(row), " (prompt_id \"", rows_.reader->id(row), "\")");
    }
    CheckpointBinding binding() const override
    {
        return {{"policy", rows_.model_digest},
                {"rows and pairs", rows_.pairs_digest},
                {"reference log-probs", rows_.reference_digest}};
    }

    void accumulate(std::span<const std::int64_t> rows, double scale, GradientSink& gradient, StepSums& sums,
                    std::vector<std::int64_t>& bad_rows) override
    {
        std::vector<PackedRow> packed;
        PackedBatch batch;
        for (const std::int64_t row : rows) {
            packed.push_back(encoder_.encode(*rows_.reader, row, pair(row)));
            batch.add_scored(packed.back().trunk, packed.back().branches);
        }
        model().plan_pass(batch);
        const auto pass = model().decoder().forward_scored(batch);
        std::vector<double> branch_sums(static_cast<std::size_t>(batch.branches), 0.0);
        for (std::size_t i = 0; i < batch.owner.size();
             ++i) // in the order of selm_logp, so that equal weights give equal sums
            branch_sums[static_cast<std::size_t>(batch.owner[i])] += static_cast<double>(pass->log_probs()[i]);
        std::vector<double> slopes(branch_sums.size(), 0.0);
        std::size_t first = 0;
        for (const PackedRow& row : packed) {
            row_loss(row, std::span(branch_sums).subspan(first, row.branches.size()),
                     std::span(slopes).subspan(first, row.branches.size()), sums, bad_rows);
            first += row.branches.size();
        }
        std::vector<float> g(batch.owner.size());
        for (std::size_t i = 0; i < g.size(); ++i)
            g[i] = static_cast<float>(scale * slopes[static_cast<std::size_t>(batch.owner[i])]);
        model().backward_scored(*pass, g, gradient);
        sums[StepSums::tokens] += static_cast<double>(batch.tokens.size());
    }

    ordered_json metrics(const StepSums& sums) const override
    {
        const bool generated = sums[StepSums::generated_rows] > 0;
        return {{"loss", sums.mean(StepSums::loss)},
                {"loss/dpo", sums.mean(StepSums::dpo)},
                {"loss/optimism", sums.mean(StepSums::optimism)},
                {"rewards/chosen", sums.mean(StepSums::reward_best)},
                {"rewards/rejected", sums.mean(StepSums::reward_worst)},
                {"rewards/accuracies", sums.mean(StepSums::accuracy)},
                {"rewards/margins", sums.mean(StepSums::margin)},
                {"logps/chosen", sums.mean(StepSums::logp_best)},
                {"logps/rejected", sums.mean(StepSums::logp_worst)},
                {"logps/generated", generated
                                        ? ordered_json(sums[StepSums::logp_generated] / sums[StepSums::generated_rows])
                                        : ordered_json(nullptr)}};
    }

    bool optimism(std::int64_t row) const { return alpha_ != 0 && rows_.reader->has_generated(row); }

    /// Answers that the loss of a row reads: without the optimism term the generated one counts only as best or worst.
    RowPair pair(std::int64_t row) const
    {
        const auto i = static_cast<std::size_t>(row);
        return {rows_.pairs.best[i], rows_.pairs.worst[i], optimism(row)};
    }
    const RowEncoder& encoder() const { return encoder_; }
    const IterationReader& reader() const { return *rows_.reader; }

  private:
    void row_loss(const PackedRow& row, std::span<const double> branch_sums, std::span<double> slopes, StepSums& sums,
                  std::vector<std::int64_t>& bad_rows) const
    {
        const auto i = static_cast<std::size_t>(row.position);
        const auto best = static_cast<std::size_t>(rows_.pairs.best[i]);
        const auto worst = static_cast<std::size_t>(rows_.pairs.worst[i]);
        const auto branch = [&](std::size_t candidate) { return static_cast<std::size_t>(row.branch_of[candidate]); };
        const auto& reference = rows_.reference.sum[i];
        RowLogProbs log_probs;
        log_probs.policy_best = branch_sums[branch(best)];
        log_probs.policy_worst = branch_sums[branch(worst)];
        log_probs.reference_best = reference[best];
        log_probs.reference_worst = reference[worst];
        log_probs.has_generated = optimism(row.position);
        if (log_probs.has_generated) {
            log_probs.policy_generated = branch_sums[branch(0)];
            log_probs.reference_generated = reference[0];
        }
        const SelmLoss loss = selm_loss(log_probs, alpha_, beta_);
        if (!std::isfinite(loss.loss))
            bad_rows.push_back(row.position);
        slopes[branch(best)] += loss.d_best; // branches that are equal add up
        slopes[branch(worst)] += loss.d_worst;
        if (log_probs.has_generated)
            slopes[branch(0)] += loss.d_generated;
        sums[StepSums::rows] += 1;
        sums[StepSums::loss] += loss.loss;
        sums[StepSums::dpo] += loss.dpo;
        sums[StepSums::optimism] += loss.optimism;
        sums[StepSums::reward_best] += loss.reward_best;
        sums[StepSums::reward_worst] += loss.reward_worst;
        sums[StepSums::margin] += loss.reward_best - loss.reward_worst;
        sums[StepSums::accuracy] += loss.reward_best > loss.reward_worst ? 1 : 0;
        sums[StepSums::logp_best] += log_probs.policy_best;
        sums[StepSums::logp_worst] += log_probs.policy_worst;
        if (log_probs.has_generated) {
            sums[StepSums::generated_rows] += 1;
            sums[StepSums::logp_generated] += log_probs.policy_generated;
        }
    }

    double alpha_, beta_;
    RowEncoder encoder_;
    Rows rows_;
};

} // namespace

double by_iteration(const std::vector<double>& values, std::int64_t iteration)
{
    SELM_EXPECT(!values.empty() && iteration >= 1);
    return values[std::min(static_cast<std::size_t>(iteration), values.size()) - 1];
}

std::vector<RowCost> gather_costs(std::int64_t rows, Communicator& comm, const std::function<RowCost(std::int64_t)>& cost)
{
    std::vector<RowCost> mine;
    agree(comm, "lengths of the rows", [&] {
        for (std::int64_t row = comm.rank(); row < rows; row += comm.size())
            mine.push_back(cost(row));
    });
    std::vector<RowCost> costs(static_cast<std::size_t>(rows));
    const auto parts = comm.all_gather_ragged(std::as_bytes(std::span<const RowCost>(mine)), "lengths of the rows");
    for (std::size_t rank = 0; rank < parts.size(); ++rank)
        for (std::size_t i = 0; i < parts[rank].size() / sizeof(RowCost); ++i)
            std::memcpy(&costs[rank + i * parts.size()], parts[rank].data() + i * sizeof(RowCost), sizeof(RowCost));
    return costs;
}

SelmObjectiveParts make_selm_objective(const TrainOptions& options, Communicator& comm)
{
    Rows rows;
    agree(comm, "opening the rows", [&] {
        rows.reader = std::make_unique<IterationReader>(options.iter);
        SELM_VALIDATE(rows.reader->rows() > 0, ExitCode::bad_data,
                      options.iter << " has no rows (there is nothing to train on)");
        rows.pairs = rows.reader->pairs();
        SELM_VALIDATE(
            rows.pairs.update_rule != "none", ExitCode::bad_data,
            options.iter
                << " holds held-out answers (there are no pairs to learn from). Pass --iter of ranked training rows");
        rows.reference = rows.reader->logprobs(options.reference);
        rows.reference_digest = digest_of(rows.reference);
    });
    rows.pairs_digest = root_string(comm, "digest of the pairs", [&] { return rows.reader->pairs_digest(); });
    rows.model_digest = root_string(comm, "digest of the policy", [&] { return model_digest(options.policy); });

    SelmObjectiveParts parts;
    parts.iteration = rows.reader->attributes().iteration;
    parts.alpha = by_iteration(options.alpha, parts.iteration);
    parts.beta = by_iteration(options.beta, parts.iteration);
    parts.learning_rate = by_iteration(options.learning_rate, parts.iteration);

    std::unique_ptr<DecoderTrainer> model;
    std::optional<RowEncoder> encoder;
    agree(comm, "opening the policy", [&] {
        model = std::make_unique<DecoderTrainer>(options, false);
        encoder.emplace(options.policy, options.encoding, model->config());
        check_reference(options, rows, *encoder, model->engine().numerics());
    });
    auto objective = std::make_unique<SelmObjective>(options, parts.alpha, parts.beta, std::move(model),
                                                     std::move(*encoder), std::move(rows));
    objective->encoder().check_lengths(
        objective->reader(), [&](std::int64_t row) { return objective->pair(row); }, comm);
    objective->set_costs(gather_costs(objective->rows(), comm, [&](std::int64_t row) {
        return objective->cost_of(objective->encoder().encode(objective->reader(), row, objective->pair(row)));
    }));
    parts.objective = std::move(objective);
    return parts;
}

} // namespace selm
