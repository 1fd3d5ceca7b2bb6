#include "training_loop.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include <fnmatch.h>

#include "packed_rows.hpp"
#include "selm/algo/schedule.hpp"
#include "selm/base/error.hpp"
#include "selm/base/log.hpp"
#include "selm/comm/agree.hpp"
#include "selm/kernels/engine.hpp"
#include "selm/phases/shared_model.hpp"
#include "selm/shard/model_writer.hpp"

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

TrainingWeights::Options weights_options(const TrainOptions& o, const TrainingObjective& objective)
{
    TrainingWeights::Options options;
    options.optimizer = optimizer_options(o);
    options.layout.bucket = static_cast<std::size_t>(o.bucket_bytes) / sizeof(float);
    options.layout.group_ends = objective.parameter_groups();
    options.layout.frozen = frozen_parameters(o.freeze, objective.parameters());
    options.inside_node = o.zero == 3 && o.zero3_group == "node";
    options.prefetch = o.prefetch;
    options.node_ranks = static_cast<int>(o.node_ranks);
    return options;
}

ShardedGradient::Options gradient_options(const TrainOptions& o)
{
    return {.stage = static_cast<int>(o.zero),
            .accumulate = parse_dtype(o.accumulate_dtype),
            .most_in_flight = static_cast<std::size_t>(o.bucket_bytes) / sizeof(float)};
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

std::vector<bool> frozen_parameters(const std::vector<std::string>& patterns, std::span<const ParameterSpec> parameters)
{
    std::vector<bool> frozen(parameters.size(), false);
    std::vector<bool> used(patterns.size(), false);
    for (std::size_t i = 0; i < parameters.size(); ++i) {
        std::size_t fitting = 0;
        std::string names;
        for (const ParameterSpec::Part& part : parameters[i].parts) {
            bool fits = false;
            for (std::size_t p = 0; p < patterns.size(); ++p)
                if (fnmatch(patterns[p].c_str(), part.name.c_str(), 0) == 0)
                    fits = used[p] = true;
            fitting += fits ? 1 : 0;
            names += (names.empty() ? "" : ", ") + part.name;
        }
        SELM_VALIDATE(fitting == 0 || fitting == parameters[i].parts.size(), ExitCode::usage,
                      "--freeze names only some of " << names
                                                     << " (they are one matrix in training). Name all of them or none");
        frozen[i] = fitting > 0;
    }
    for (std::size_t p = 0; p < patterns.size(); ++p)
        SELM_VALIDATE(used[p], ExitCode::usage,
                      "--freeze " << patterns[p] << " fits no tensor of the model. Use names of its model.safetensors, such as "
                                                    << parameters.front().parts.front().name);
    SELM_VALIDATE(std::find(frozen.begin(), frozen.end(), false) != frozen.end(), ExitCode::usage,
                  "--freeze names every tensor (nothing would be trained). Leave some out");
    return frozen;
}

TrainingLoop::TrainingLoop(const TrainOptions& options, std::int64_t iteration, double learning_rate,
                           TrainingObjective& objective, TrainingOutput& output, CheckpointBinding binding,
                           Communicator& comm)
    : options_(options), iteration_(iteration), peak_rate_(learning_rate), objective_(objective), output_(output),
      binding_(std::move(binding)), comm_(comm),
      weights_(objective.parameters(), comm, weights_options(options, objective)),
      gradient_(weights_.parameters, weights_.layout, comm, gradient_options(options)),
      checkpoints_(output.checkpoints(), options.keep, weights_.parameters, weights_.layout, comm),
      stop_(options.stop_file, options.common.walltime_margin, comm),
      steps_per_epoch_(steps_per_epoch(objective.rows(), options.global_batch)),
      total_steps_(steps_per_epoch_ * options.epochs)
{
}

CommTimes TrainingLoop::comm_times() const
{
    CommTimes times = own_times_;
    times += gradient_.times();
    times += weights_.optimizer.times();
    times += objective_.comm_times();
    return times;
}

void TrainingLoop::start()
{
    std::optional<CheckpointState> found;
    if (options_.resume == "auto")
        found = checkpoints_.load_latest(binding_, weights_.optimizer);
    else
        output_.start_anew();
    if (found) {
        state_ = *found;
        SELM_LOG(info, "going on from the checkpoint of step " << state_.step << " of " << total_steps_);
        if (!state_.numerics.empty() && state_.numerics != objective_.numerics())
            SELM_LOG(warning, "the steps so far were computed with " << state_.numerics << ", those to come with "
                                                                      << objective_.numerics()
                                                                      << " (another engine or kind of CPU): the result is that of neither alone");
    } else {
        agree(comm_, "start weights", [&] { objective_.initialise(weights_); });
    }
    state_.numerics = objective_.numerics();
    resumed_from_ = state_.step;
    lines_ = output_.cut_metrics(state_.step);
    weights_.optimizer.publish();
    objective_.refresh(weights_);
    weights_.fence();
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

/// This rank's rows of the batch, in microbatches under the token budget. The last pass is the one behind which stages 0
/// and 1 reduce; at stages 2 and 3 every pass communicates, so all ranks make as many as the one with the most.
void TrainingLoop::accumulate(Step& step, std::vector<std::int64_t>& bad_rows)
{
    std::vector<std::int64_t> work;
    for (const std::int64_t row : step.rows)
        work.push_back(objective_.work(row));
    std::vector<std::vector<std::int64_t>> rows_of_pass;
    std::size_t passes = 1;
    const auto of_ranks = balance_rows(work, comm_.size());
    for (std::size_t rank = 0; rank < of_ranks.size(); ++rank) {
        std::vector<std::int64_t> tokens;
        for (const std::size_t i : of_ranks[rank])
            tokens.push_back(objective_.cost(step.rows[i]));
        const auto groups = microbatches(tokens, options_.tokens_per_microbatch);
        const bool mine = rank == static_cast<std::size_t>(comm_.rank());
        if (mine || options_.zero >= 2)
            passes = std::max(passes, groups.size());
        for (std::size_t pass = 0; mine && pass < groups.size(); ++pass) {
            rows_of_pass.emplace_back();
            for (const std::size_t i : groups[pass])
                rows_of_pass.back().push_back(step.rows[of_ranks[rank][i]]);
        }
    }
    rows_of_pass.resize(passes);
    const double scale = 1.0 / static_cast<double>(step.rows.size());
    gradient_.begin_step();
    for (std::size_t pass = 0; pass < passes; ++pass) {
        gradient_.begin_pass(pass + 1 == passes);
        objective_.accumulate(rows_of_pass[pass], scale, gradient_, step.sums, bad_rows);
        gradient_.end_pass();
    }
}

TrainingLoop::Step TrainingLoop::step()
{
    Step step;
    step.rows = batch_rows(state_.epoch, state_.epoch_step);
    step.learning_rate =
        learning_rate(parse_schedule(options_.schedule), peak_rate_, state_.step, total_steps_, options_.warmup_ratio);
    std::vector<std::int64_t> bad_rows;
    // Not under agree(): the passes communicate, and a rank that fails in one could only meet the others in another
    // collective. Its error ends the program on its own (program.cpp); rows were all encoded before the first step.
    accumulate(step, bad_rows);
    {
        const Stopwatch time(own_times_.exposed), flight(own_times_.in_flight);
        comm_.all_reduce(std::span<double>(step.sums.values), ReduceOp::sum, "losses of the step");
    }
    step.gradient_norm = gradient_.finish();
    if (!std::isfinite(step.sums[StepSums::loss]) || !std::isfinite(step.gradient_norm))
        check_finite(step, bad_rows);
    weights_.optimizer.apply(step.learning_rate, gradient_, step.gradient_norm);
    objective_.refresh(weights_);
    weights_.fence();
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

void TrainingLoop::record(const Step& step, double seconds, const CommTimes& comm)
{
    std::array<double, 3> largest{
        seconds,
        static_cast<double>(objective_.engine_bytes() + objective_.weight_bytes() + weights_.bytes() +
                            gradient_.peak_bytes()),
        static_cast<double>(objective_.planned_bytes(weights_.layout, weights_.node().size()))};
    comm_.all_reduce(std::span<double>(largest), ReduceOp::max, "time and memory of the step");
    std::array<double, 2> mean{comm.exposed, comm.hidden()};
    comm_.all_reduce(std::span<double>(mean), ReduceOp::sum, "communication of the step");
    const double epoch = static_cast<double>(state_.step) / static_cast<double>(steps_per_epoch_);
    ordered_json line{{"step", state_.step}, {"epoch", epoch}, {"learning_rate", step.learning_rate}};
    line.update(objective_.metrics(step.sums));
    line["grad_norm"] = step.gradient_norm;
    line["rows"] = static_cast<std::int64_t>(step.rows.size());
    line["tokens"] = static_cast<std::int64_t>(step.sums[StepSums::tokens]);
    line["tokens_per_s"] = step.sums[StepSums::tokens] / largest[0];
    line["step_s"] = largest[0];
    line["comm_s"] = mean[0] / comm_.size(); // waited for
    line["comm_hidden_s"] = mean[1] / comm_.size();
    line["peak_bytes"] = static_cast<std::int64_t>(largest[1]);
    if (largest[2] > 0)
        line["planned_bytes"] = static_cast<std::int64_t>(largest[2]);
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
    const auto start = Clock::now();
    checkpoints_.save(state_, binding_, weights_.optimizer);
    checkpoint_s_ = seconds_between(start, Clock::now());
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
                                  << options_.zero << ", " << ((weights_.bytes() + objective_.weight_bytes() + gradient_.bytes()) >> 20)
                                  << " MiB of weights, gradients and optimizer state per rank");
    start_ = Clock::now();
    while (state_.step < total_steps_) {
        const auto step_start = Clock::now();
        const CommTimes comm_before = comm_times();
        const Step done = step();
        const double seconds = seconds_between(step_start, Clock::now());
        longest_step_s_ = std::max(longest_step_s_, seconds);
        record(done, seconds, comm_times() - comm_before);
        if (state_.step == total_steps_)
            break;
        const bool enough = options_.max_steps > 0 && state_.step - resumed_from_ >= options_.max_steps;
        if (stop_.agreed(longest_step_s_ + checkpoint_s_) || enough) {
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
    const auto write_weights = [&](const std::string& directory) {
        SafetensorsWriter writer(directory, objective_.tensors(), objective_.saved_dtype(), "all-ranks");
        write_model_collectively(writer, comm_, [&] { objective_.write_weights(writer, weights_); });
    };
    output_.publish([&](const std::string& directory) { objective_.write_files(directory); }, write_weights,
                    report_to_json(report), binding_);
}

} // namespace selm
