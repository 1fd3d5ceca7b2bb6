#pragma once

#include <memory>
#include <string>

#include "selm/model/decoder.hpp"
#include "selm/model/safetensors.hpp"
#include "selm/model/weights.hpp"
#include "selm/phases/train.hpp"
#include "training_objective.hpp"

namespace selm {

/// The decoder whose weights are all trained: engine, packed weights of the flat buffer (once per node, each rank packs
/// some), gradients into the flat buffer.
class DecoderTrainer {
  public:
    /// Reads config.json, checks the weight files, makes the engine. Not collective.
    /// @param reward true: the model becomes a sequence classifier (a score head instead of the language-model head).
    DecoderTrainer(const TrainOptions& options, bool reward);

    const DecoderConfig& config() const { return config_; }
    const Engine& engine() const { return *engine_; }
    Engine& engine() { return *engine_; }
    Decoder& decoder() { return *decoder_; }
    GradientSink& sink() { return *sink_; }

    /// From the start directory; a score head that it does not have starts at zero (so the first loss is log 2).
    void initialise(const FlatBuffers& flat, ShardInfo shard, std::span<float> master) const;
    void refresh(FlatBuffers& flat);
    void write_model(const std::string& directory, const FlatBuffers& flat, std::span<const float> master,
                     DType dtype) const;

  private:
    class FlatSink;
    std::string directory_;
    DecoderConfig config_;
    DType dtype_;
    SafetensorsReader reader_;
    std::unique_ptr<Engine> engine_;
    std::unique_ptr<GradientSink> sink_;
    std::unique_ptr<ResidentWeights> weights_;
    std::unique_ptr<Decoder> decoder_;

  public:
    ~DecoderTrainer();
};

/// config of a reward model that starts from `directory` (a language model or a reward model).
DecoderConfig reward_config(const std::string& directory);

/// DType of --save-dtype.
DType save_dtype(const TrainOptions& options);

/// Copies the files beside the weights; records of another training run stay behind.
void copy_trained_model_files(const std::string& from, const std::string& to, DType dtype, bool reward);

} // namespace selm
