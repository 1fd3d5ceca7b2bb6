#include "decoder_trainer.hpp"

#include <algorithm>
#include <filesystem>
#include <numeric>
#include <utility>

#include "dry_run_memory.hpp"
#include "selm/base/error.hpp"
#include "selm/comm/agree.hpp"
#include "selm/model/model_files.hpp"
#include "selm/phases/shared_model.hpp"
#include "selm/shard/staged_gradient.hpp"
#include "training_output.hpp"

namespace selm {

DecoderConfig reward_config(const std::string& directory)
{
    DecoderConfig config = DecoderConfig::from_directory(directory);
    config.sequence_classifier = true;
    return config;
}

DType save_dtype(const TrainOptions& options)
{
    return parse_dtype(options.save_dtype);
}

void copy_trained_model_files(const std::string& from, const std::string& to, DType dtype, bool reward)
{
    copy_model_files(from, to, {.dtype = dtype, .sequence_classifier = reward});
    std::error_code ignored; // it is there only when `from` was itself a training output
    std::filesystem::remove(to + "/" + training_record_name, ignored);
}

DecoderTrainer::DecoderTrainer(const TrainOptions& options, bool reward)
    : options_(options),
      config_(reward ? reward_config(options.policy) : DecoderConfig::from_directory(options.policy)),
      reader_(options.policy),
      engine_(make_engine(engine_options(options.common, parse_dtype(options.common.dtype))))
{
    SELM_VALIDATE(
        reward || !config_.sequence_classifier, ExitCode::configuration,
        options.policy << " is a reward model (it has no language-model head). Pass --policy a causal language model");
    check_model_tensors(reader_, config_, options.policy);
}

DecoderTrainer::~DecoderTrainer() = default;

void DecoderTrainer::initialise(TrainingWeights& weights) const
{
    for (const PartSlice& slice : part_slices(weights.parameters, weights.layout, weights.optimizer.pieces())) {
        if (slice.count == 0)
            continue;
        const auto out = weights.optimizer.master(slice.unit).subspan(slice.piece_begin, slice.count);
        if (config_.sequence_classifier && slice.part->name == "score.weight" && !reader_.has(slice.part->name))
            std::fill(out.begin(), out.end(), 0.0F);
        else
            reader_.read_f32(slice.part->name, slice.part->shape, static_cast<std::int64_t>(slice.part_begin), out);
    }
}

void DecoderTrainer::make_resident(TrainingWeights& weights)
{
    std::vector<Tensor> parameters;
    for (std::size_t i = 0; i < weights.parameters.size(); ++i)
        parameters.push_back(weights.view(i));
    const Tensor panels =
        weights.share(ResidentWeights::panel_elements(config_, *engine_, true), "packed weights of the training");
    const ResidentWeights::Options options{
        .dtype = parse_dtype(options_.common.dtype), .with_backward = true, .part = weights.node().rank(), .parts = weights.node().size()};
    resident_ = std::make_unique<ResidentWeights>(config_, *engine_, std::move(parameters), options, panels);
    if (config_.sequence_classifier)
        score_head_ = weights.view(static_cast<std::size_t>(ParameterIndex::head(config_)));
}

void DecoderTrainer::refresh(TrainingWeights& weights)
{
    if (weights.stage() == 3) {
        if (!sharded_)
            sharded_ = std::make_unique<ShardedWeights>(config_, *engine_, weights.parameters, weights.optimizer,
                                                        weights.comm(), weights.node(), weights.compute(),
                                                        ShardedWeights::Options{.prefetch = weights.options().prefetch});
        sharded_->refresh();
    } else {
        agree(weights.comm(), "preparing the weights", [&] {
            if (resident_)
                resident_->refresh();
            else
                make_resident(weights);
        });
    }
    if (!decoder_) {
        WeightStore& store = sharded_ ? static_cast<WeightStore&>(*sharded_) : *resident_;
        decoder_ = std::make_unique<Decoder>(config_, *engine_, store);
    }
}

std::int64_t DecoderTrainer::recomputed_layers(std::int64_t tokens, std::int64_t scored) const
{
    if (options_.recompute == "auto")
        return plan_recompute(config_, activation_types(*engine_), tokens, scored, options_.activation_bytes).layers;
    return options_.recompute == "layers" ? config_.layers : 0;
}

void DecoderTrainer::backward_scored(Decoder::ScoredPass& pass, std::span<const float> g, GradientSink& gradient)
{
    if (engine_->device() == Device::cpu) {
        decoder_->backward_scored(pass, g, gradient);
        return;
    }
    const auto parameters = decoder_parameters(config_);
    StagedGradient staged(parameters, *engine_, gradient);
    decoder_->backward_scored(pass, g, staged);
}

void DecoderTrainer::plan_pass(const PackedBatch& batch)
{
    if (batch.tokens.empty())
        return; // nothing is kept; whatever the last pass kept stays for the next one
    const std::int64_t layers = recomputed_layers(static_cast<std::int64_t>(batch.tokens.size()),
                                                  static_cast<std::int64_t>(batch.selected.size()));
    if (layers != recomputed_) {
        decoder_->set_recompute(recomputed_ = layers);
        most_tokens_ = most_scored_ = 0; // what earlier passes saved is let go
    }
    most_tokens_ = std::max(most_tokens_, static_cast<std::int64_t>(batch.tokens.size()));
    most_scored_ = std::max(most_scored_, static_cast<std::int64_t>(batch.selected.size()));
    planned_activations_ = std::max(planned_activations_, decoder_->activation_bytes(most_tokens_, most_scored_));
}

std::int64_t DecoderTrainer::planned_bytes(const FlatLayout& layout, int ranks_on_node) const
{
    const PhaseMemory memory = training_memory(options_, planned_activations_, config_, *engine_, layout);
    const std::int64_t shared = memory.node_bytes(0);
    return memory.rank_bytes() + shared / ranks_on_node;
}

void DecoderTrainer::check_activations(std::span<const std::int64_t> costs,
                                       const std::function<std::string(std::int64_t)>& row_name) const
{
    if (options_.activation_bytes == 0 || costs.empty())
        return;
    const auto needed = [&](std::int64_t tokens) { // at most all of them are scored
        return decoder_activation_bytes(config_, activation_types(*engine_), tokens, tokens, true,
                                        recomputed_layers(tokens, tokens));
    };
    const char* const less_kept = options_.recompute == "none" ? ", use --recompute auto" : "";
    const auto longest = std::max_element(costs.begin(), costs.end());
    SELM_VALIDATE(needed(*longest) <= options_.activation_bytes, ExitCode::configuration,
                  "row " << row_name(longest - costs.begin()) << " has " << *longest << " tokens, which need "
                         << needed(*longest) << " bytes of activations; --activation-bytes is " << options_.activation_bytes
                         << " (training would stop at this row). Raise it" << less_kept
                         << ", or cut the rows with --max-length");
    const std::int64_t all = std::accumulate(costs.begin(), costs.end(), std::int64_t{0});
    const std::int64_t full = std::min(options_.tokens_per_microbatch, all);
    SELM_VALIDATE(needed(full) <= options_.activation_bytes, ExitCode::configuration,
                  "a microbatch of " << full << " tokens needs " << needed(full)
                                     << " bytes of activations; --activation-bytes is " << options_.activation_bytes
                                     << ". Raise it" << less_kept << ", or lower --tokens-per-microbatch");
}

std::span<const float> DecoderTrainer::score_head() const
{
    return sharded_ ? sharded_->score_head()
                    : std::span<const float>(score_head_.f32(), static_cast<std::size_t>(score_head_.columns));
}

} // namespace selm
