#include "training_loop.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <utility>

#include "packed_rows.hpp"
#include "selm/algo/schedule.hpp"
#include "selm/base/error.hpp"
#include "selm/base/log.hpp"
#include "selm/comm/agree.hpp"
#include "selm/kernels/engine.hpp"
#include "selm/phases/shared_model.hpp"

namespace selm {

using nlohmann::ordered_json;

namespace {

constexpr double progress_every_s = 5;
constexpr std::size_t most_named_rows = 8;

double seconds_between(std::chrono::steady_clock::time_point from, std::chrono::steady_clock::time_point to)
{
    return std::chrono::duration<double>(to - from).count();
}

ShardedAdamW::Options optimizer_options(const TrainOptions& o)
{
    return {.stage = static_cast<int>(o.zero),
            .beta1 = o.adam_beta1,
            .beta2 = o.adam_beta2,
            .epsilon = o.adam_epsilon,
            .weight_decay = o.weight_decay,
            .max_grad_norm = o.max_grad_norm,
            .round_bf16 = parse_dtype(o.common.dtype) == DType::bf16};
}

/// Mean of a metric over lines that have it; 0 when none has.
double mean_of(std::span<const ordered_json> lines, const char* key)
{
    double sum = 0;
    int count = 0;
    for (const ordered_json& line : lines)
        if (const auto found = line.find(key); found != line.end() && found->is_number()) {
            sum += found->get<double>();
            ++count;
        }
    return count > 0 ? sum / count : 0;
}

} // namespace

TrainingLoop::TrainingLoop(const TrainOptions& options, std::int64_t iteration, double learning_rate,
                           TrainingObjective& objective, TrainingOutput& output, CheckpointBinding binding,
                           Communicator& comm)
    : options_(options), iteration_(iteration), peak_rate_(learning_rate), objective_(objective), output_(output),
      binding_(std::move(binding)), comm_(comm), flat_(objective.parameters(), comm, options.zero != 0),
      optimizer_(flat_.layout, comm, optimizer_options(options), &flat_.weights),
      checkpoints_(output.checkpoints(), options.keep, flat_.parameters, flat_.layout, comm),
      steps_per_epoch_(steps_per_epoch(objective.rows(), options.global_batch)),
      total_steps_(steps_per_epoch_ * options.epochs)
{
}

void TrainingLoop::timed(const std::function<void()>& collective)
{
    const auto start = Clock::now();
    collective();
    reduce_seconds_ += seconds_between(start, Clock::now());
}

void TrainingLoop::start()
{
    std::optional<CheckpointState> found;
    if (options_.resume == "auto")
        found = checkpoints_.load_latest(binding_, optimizer_);
    else
        output_.start_anew();
    if (found) {
        state_ = *found;
        SELM_LOG(info, "going on from the checkpoint of step " << state_.step << " of " << total_steps_);
    } else {
        agree(comm_, "start weights",
              [&] { objective_.initialise(flat_, optimizer_.state_shard(), optimizer_.master()); });
    }
    resumed_from_ = state_.step;
    lines_ = output_.cut_metrics(state_.step);
    optimizer_.publish(flat_.compute);
    agree(comm_, "preparing the weights", [&] { objective_.refresh(flat_); });
    flat_.fence();
}

std::vector<std::int64_t> TrainingLoop::batch_rows(std::int64_t epoch, std::int64_t epoch_step)
{
    if (order_epoch_ != epoch) {
        order_ = epoch_order(objective_.rows(), static_cast<std::uint64_t>(options_.common.seed), iteration_, epoch,
                             options_.shuffle);
        order_epoch_ = epoch;
        objective_.start_epoch(epoch);
    }
    const std::int64_t begin = epoch_step * options_.global_batch;
    const std::int64_t end = std::min(begin + options_.global_batch, objective_.rows());
    return {order_.begin() + begin, order_.begin() + end};
}

/// This rank's rows of the batch, in microbatches under the token budget.
void TrainingLoop::accumulate(Step& step, std::vector<std::int64_t>& bad_rows)
{
    std::vector<std::int64_t> costs;
    for (const std::int64_t row : step.rows)
        costs.push_back(objective_.cost(row));
    const auto mine = balance_rows(costs, comm_.size())[static_cast<std::size_t>(comm_.rank())];
    std::vector<std::int64_t> rows, row_costs;
    for (const std::size_t i : mine) {
        rows.push_back(step.rows[i]);
        row_costs.push_back(costs[i]);
    }
    const double scale = 1.0 / static_cast<double>(step.rows.size());
    std::size_t begin = 0;
    for (const std::size_t end : microbatch_ends(row_costs, options_.tokens_per_microbatch)) {
        objective_.accumulate(std::span(rows).subspan(begin, end - begin), scale, flat_, step.sums, bad_rows);
        begin = end;
    }
}

TrainingLoop::Step TrainingLoop::step()
{
    Step step;
    step.rows = batch_rows(state_.epoch, state_.epoch_step);
    step.learning_rate =
        learning_rate(parse_schedule(options_.schedule), peak_rate_, state_.step, total_steps_, options_.warmup_ratio);
    std::vector<std::int64_t> bad_rows;
    agree(comm_, "training step", [&] {
        std::fill(flat_.gradient.begin(), flat_.gradient.end(), 0.0F);
        accumulate(step, bad_rows);
    });
    timed([&] { comm_.all_reduce(std::span<double>(step.sums.values), ReduceOp::sum, "losses of the step"); });
    step.gradient_norm = optimizer_.reduce(flat_.gradient);
    if (!std::isfinite(step.sums[StepSums::loss]) || !std::isfinite(step.gradient_norm))
        check_finite(step, bad_rows);
    optimizer_.apply(step.learning_rate, flat_.compute);
    agree(comm_, "updated weights", [&] { objective_.refresh(flat_); });
    flat_.fence();
    ++state_.step;
    if (++state_.epoch_step == steps_per_epoch_) {
        state_.epoch_step = 0;
        ++state_.epoch;
    }
    return step;
}

/// Throws the Error of a step whose loss or gradient is not finite, the same on every rank.
void TrainingLoop::check_finite(const Step& step, const std::vector<std::int64_t>& bad_rows)
{
    std::vector<std::int64_t> rows;
    for (const auto& part :
         comm_.all_gather_ragged(std::as_bytes(std::span(bad_rows)), "rows with a non-finite loss")) {
        std::vector<std::int64_t> of_rank(part.size() / sizeof(std::int64_t));
        if (!part.empty())
            std::memcpy(of_rank.data(), part.data(), part.size());
        rows.insert(rows.end(), of_rank.begin(), of_rank.end());
    }
    const bool loss = !rows.empty();
    if (!loss)
        rows = step.rows; // the gradients are added up already: it may be any row of the batch
    std::sort(rows.begin(), rows.end());
    std::string names;
    for (std::size_t i = 0; i < std::min(rows.size(), most_named_rows); ++i)
        names += (i > 0 ? ", " : "") + objective_.row_name(rows[i]);
    if (rows.size() > most_named_rows)
        names += cat(" and ", rows.size() - most_named_rows, " more");
    const std::string newest = root_string(comm_, "last checkpoint", [&] { return checkpoints_.newest(); });
    throw data_error(cat("step ", state_.step + 1, ": the ", loss ? "loss" : "gradient",
                         " is not finite (the weights would be lost). Rows: ", names,
                         ". Last good checkpoint: ", newest.empty() ? "none" : newest,
                         ". Check these rows, lower --learning-rate, or use --dtype fp32"));
}

void TrainingLoop::record(const Step& step, double seconds, double comm_seconds)
{
    std::array<double, 2> largest{seconds,
                                  static_cast<double>(objective_.engine_bytes() + flat_.bytes() + optimizer_.bytes())};
    comm_.all_reduce(std::span<double>(largest), ReduceOp::max, "time and memory of the step");
    const double mean_comm =
        all_reduce_value(comm_, comm_seconds, ReduceOp::sum, "communication of the step") / comm_.size();
    const double epoch = static_cast<double>(state_.step) / static_cast<double>(steps_per_epoch_);
    ordered_json line{{"step", state_.step}, {"epoch", epoch}, {"learning_rate", step.learning_rate}};
    line.update(objective_.metrics(step.sums));
    line["grad_norm"] = step.gradient_norm;
    line["rows"] = static_cast<std::int64_t>(step.rows.size());
    line["tokens"] = static_cast<std::int64_t>(step.sums[StepSums::tokens]);
    line["tokens_per_s"] = step.sums[StepSums::tokens] / largest[0];
    line["step_s"] = largest[0];
    line["comm_s"] = mean_comm;
    line["peak_bytes"] = static_cast<std::int64_t>(largest[1]);
    output_.append_metrics(line);
    show_progress(line);
    lines_.push_back(std::move(line));
}

void TrainingLoop::show_progress(const ordered_json& line)
{
    const auto now = Clock::now();
    const bool last = state_.step == total_steps_;
    if (options_.common.progress == "off" || (!last && seconds_between(shown_, now) < progress_every_s))
        return;
    shown_ = now;
    const double per_step = seconds_between(start_, now) / static_cast<double>(state_.step - resumed_from_);
    SELM_LOG(info,
             "train: step " << state_.step << "/" << total_steps_ << ", loss " << line["loss"].get<double>()
                            << ", margin " << line["rewards/margins"].get<double>() << ", "
                            << static_cast<std::int64_t>(line["tokens_per_s"].get<double>()) << " tokens/s"
                            << (last ? ""
                                     : cat(", about ",
                                           std::llround(per_step * static_cast<double>(total_steps_ - state_.step)),
                                           " s left")));
}

void TrainingLoop::save_checkpoint()
{
    checkpoints_.save(state_, binding_, optimizer_);
    SELM_LOG(info, "checkpoint of step " << state_.step << " saved in " << output_.checkpoints());
}

TrainReport TrainingLoop::report(Outcome outcome) const
{
    TrainReport report;
    report.outcome = outcome;
    report.rows = objective_.rows();
    report.steps = state_.step;
    report.resumed_from_step = resumed_from_;
    report.seconds = seconds_between(start_, Clock::now());
    if (lines_.empty())
        return report;
    const auto of_epoch = std::min<std::size_t>(static_cast<std::size_t>(steps_per_epoch_), lines_.size());
    const auto last = std::span<const ordered_json>(lines_).last(of_epoch);
    report.loss = mean_of(last, "loss");
    report.loss_dpo = mean_of(last, "loss/dpo");
    report.loss_optimism = mean_of(last, "loss/optimism");
    report.reward_margin = mean_of(last, "rewards/margins");
    report.reward_accuracy = mean_of(last, "rewards/accuracies");
    report.first_loss = mean_of(std::span<const ordered_json>(lines_).first(1), "loss");
    report.last_loss = mean_of(std::span<const ordered_json>(lines_).last(1), "loss");
    for (const ordered_json& line : lines_)
        report.tokens += line.value("tokens", std::int64_t{0});
    return report;
}

TrainReport TrainingLoop::run()
{
    start();
    SELM_LOG(info, "training on " << objective_.rows() << " rows, " << total_steps_ << " steps of "
                                  << options_.global_batch << " rows, " << comm_.size() << " rank(s), engine "
                                  << objective_.engine_description() << ", dtype " << options_.common.dtype << ", ZeRO-"
                                  << options_.zero << ", " << ((flat_.bytes() + optimizer_.bytes()) >> 20)
                                  << " MiB of weights, gradients and optimizer state per rank");
    start_ = Clock::now();
    while (state_.step < total_steps_) {
        const auto step_start = Clock::now();
        const double comm_before = optimizer_.comm_seconds() + reduce_seconds_;
        const Step done = step();
        record(done, seconds_between(step_start, Clock::now()),
               optimizer_.comm_seconds() + reduce_seconds_ - comm_before);
        if (state_.step == total_steps_)
            break;
        const bool enough = options_.max_steps > 0 && state_.step - resumed_from_ >= options_.max_steps;
        if (stop_requested(comm_, options_.stop_file) || enough) {
            save_checkpoint();
            SELM_LOG(info, "stopped after step " << state_.step << " of " << total_steps_
                                                 << ". Run the same command again to go on");
            return report(Outcome::stopped);
        }
        if (options_.checkpoint_every > 0 && state_.step % options_.checkpoint_every == 0)
            save_checkpoint();
    }
    return report(Outcome::done);
}

void TrainingLoop::publish(const TrainReport& report)
{
    optimizer_.gather_master(flat_.gradient); // not needed any more as a gradient
    output_.publish([&](const std::string& directory) { objective_.write_model(directory, flat_, flat_.gradient); },
                    report_to_json(report), binding_);
}

} // namespace selm
