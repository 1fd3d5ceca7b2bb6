#include "decoder_trainer.hpp"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "selm/base/error.hpp"
#include "selm/model/model_files.hpp"
#include "selm/phases/shared_model.hpp"
#include "training_output.hpp"

namespace selm {

/// Gradients go straight into the flat buffer.
class DecoderTrainer::FlatSink final : public GradientSink {
  public:
    explicit FlatSink(FlatBuffers& flat) : flat_(flat) {}
    Tensor gradient(std::int64_t parameter) override
    {
        return flat_.view(flat_.gradient, static_cast<std::size_t>(parameter));
    }
    void ready(std::int64_t) override {} // the reduction starts when all microbatches are done

  private:
    FlatBuffers& flat_;
};

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
    : directory_(options.policy),
      config_(reward ? reward_config(options.policy) : DecoderConfig::from_directory(options.policy)),
      dtype_(parse_dtype(options.common.dtype)), reader_(options.policy),
      engine_(make_engine({.engine = options.common.engine,
                           .device = Device::cpu,
                           .threads = static_cast<int>(options.common.threads)}))
{
    SELM_VALIDATE(
        reward || !config_.sequence_classifier, ExitCode::configuration,
        options.policy << " is a reward model (it has no language-model head). Pass --policy a causal language model");
    check_model_tensors(reader_, config_, options.policy);
}

DecoderTrainer::~DecoderTrainer() = default;

void DecoderTrainer::initialise(const FlatBuffers& flat, ShardInfo shard, std::span<float> master) const
{
    for (const PartSlice& slice : part_slices(flat.parameters, flat.layout, shard)) {
        if (slice.count == 0)
            continue;
        const auto out = master.subspan(slice.shard_begin, slice.count);
        if (config_.sequence_classifier && slice.part->name == "score.weight" && !reader_.has(slice.part->name))
            std::fill(out.begin(), out.end(), 0.0F);
        else
            reader_.read_f32(slice.part->name, slice.part->shape, static_cast<std::int64_t>(slice.part_begin), out);
    }
}

void DecoderTrainer::refresh(FlatBuffers& flat)
{
    if (weights_) {
        weights_->refresh();
        return;
    }
    std::vector<Tensor> parameters;
    for (std::size_t i = 0; i < flat.parameters.size(); ++i)
        parameters.push_back(flat.view(flat.compute, i));
    const Tensor panels =
        flat.share(ResidentWeights::panel_elements(config_, *engine_, true), "packed weights of the training");
    const ResidentWeights::Options weights{
        .dtype = dtype_, .with_backward = true, .part = flat.node().rank(), .parts = flat.node().size()};
    weights_ = std::make_unique<ResidentWeights>(config_, *engine_, std::move(parameters), weights, panels);
    decoder_ = std::make_unique<Decoder>(config_, *engine_, *weights_);
    sink_ = std::make_unique<FlatSink>(flat);
}

void DecoderTrainer::write_model(const std::string& directory, const FlatBuffers& flat, std::span<const float> master,
                                 DType dtype) const
{
    copy_trained_model_files(directory_, directory, dtype, config_.sequence_classifier);
    const auto read = [&](std::int64_t parameter, std::int64_t begin, std::span<float> out) {
        const auto from = master.subspan(
            flat.layout.offset(static_cast<std::size_t>(parameter)) + static_cast<std::size_t>(begin), out.size());
        std::copy(from.begin(), from.end(), out.begin());
    };
    write_model_weights(directory, config_, ParameterReader(read), dtype);
}

} // namespace selm
