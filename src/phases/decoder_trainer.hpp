#pragma once

#include <functional>
#include <memory>
#include <string>

#include "selm/model/decoder.hpp"
#include "selm/model/safetensors.hpp"
#include "selm/model/weights.hpp"
#include "selm/phases/train.hpp"
#include "selm/shard/sharded_weights.hpp"
#include "training_objective.hpp"

namespace selm {

/// Copies the files beside the weights; records of another training run stay behind.
void copy_trained_model_files(const std::string& from, const std::string& to, DType dtype, bool reward);

/// The decoder whose weights are trained: engine, and weights packed from the training's (once per node, each rank packs
/// some; stage 3: layer by layer).
class DecoderTrainer {
  public:
    /// Reads config.json, checks the weight files, makes the engine. Not collective.
    /// @param reward true: the model becomes a sequence classifier (a score head instead of the language-model head).
    DecoderTrainer(const TrainOptions& options, bool reward);

    const DecoderConfig& config() const { return config_; }
    const Engine& engine() const { return *engine_; }
    Engine& engine() { return *engine_; }
    Decoder& decoder() { return *decoder_; }
    std::int64_t weight_bytes() const { return sharded_ ? sharded_->bytes() : 0; }
    CommTimes comm_times() const { return sharded_ ? sharded_->times() : CommTimes{}; }
    /// f32 [H] of a reward model, as the passes use it.
    std::span<const float> score_head() const;

    /// From the start directory; a score head that it does not have starts at zero (so the first loss is log 2).
    void initialise(TrainingWeights& weights) const;
    /// Collective. @throws Error io: no room for packed weights.
    void refresh(TrainingWeights& weights);
    /// The decoder's, with gradients that come down to the host where the engine is on a device.
    void backward_scored(Decoder::ScoredPass& pass, std::span<const float> g, GradientSink& gradient);
    /// Before a kept pass of this batch: how many layers it recomputes.
    void plan_pass(const PackedBatch& batch);
    /// By the formula of a dry run, with the activations of the passes so far.
    std::int64_t planned_bytes(const FlatLayout& layout, int ranks_on_node) const;
    /// @throws Error configuration naming the row, when a pass of it alone, or one of a full microbatch, exceeds
    /// --activation-bytes. @param costs tokens of every row.
    void check_activations(std::span<const std::int64_t> costs,
                           const std::function<std::string(std::int64_t)>& row_name) const;
    /// What belongs to the trained model's directory besides the weights, which are written as `dtype`.
    void write_files(const std::string& directory, DType dtype) const
    {
        copy_trained_model_files(options_.policy, directory, dtype, config_.sequence_classifier);
    }

  private:
    void make_resident(TrainingWeights& weights);
    std::int64_t recomputed_layers(std::int64_t tokens, std::int64_t scored) const;

    TrainOptions options_;
    std::int64_t recomputed_ = 0; ///< as the decoder was last told
    std::int64_t most_tokens_ = 0, most_scored_ = 0; ///< of passes since then
    std::int64_t planned_activations_ = 0;
    DecoderConfig config_;
    SafetensorsReader reader_;
    std::unique_ptr<Engine> engine_;
    std::unique_ptr<ResidentWeights> resident_; ///< stages 0 to 2
    std::unique_ptr<ShardedWeights> sharded_;   ///< stage 3
    Tensor score_head_;
    std::unique_ptr<Decoder> decoder_;

  public:
    ~DecoderTrainer();
};

/// config of a reward model that starts from `directory` (a language model or a reward model).
DecoderConfig reward_config(const std::string& directory);

/// DType of --save-dtype.
DType save_dtype(const TrainOptions& options);

} // namespace selm
