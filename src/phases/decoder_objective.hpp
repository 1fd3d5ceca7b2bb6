#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "decoder_trainer.hpp"
#include "packed_rows.hpp"
#include "selm/model/model_files.hpp"
#include "training_objective.hpp"

namespace selm {

/// What objectives share that train all weights of a decoder: everything but rows and loss. Members as in TrainingObjective.
class DecoderObjective : public TrainingObjective {
  public:
    std::vector<ParameterSpec> parameters() const override { return decoder_parameters(model_->config()); }
    std::vector<std::int64_t> parameter_groups() const override { return decoder_parameter_groups(model_->config()); }
    std::int64_t cost(std::int64_t row) const override { return tokens_[static_cast<std::size_t>(row)]; }
    std::int64_t work(std::int64_t row) const override { return work_[static_cast<std::size_t>(row)]; }
    void check_memory() const override
    {
        model_->check_activations(tokens_, [&](std::int64_t row) { return row_name(row); });
    }
    std::int64_t planned_bytes(const FlatLayout& layout, int ranks_on_node) const override
    {
        return model_->planned_bytes(layout, ranks_on_node);
    }
    std::int64_t weight_bytes() const override { return model_->weight_bytes(); }
    CommTimes comm_times() const override { return model_->comm_times(); }
    void initialise(TrainingWeights& weights) const override { model_->initialise(weights); }
    void refresh(TrainingWeights& weights) override { model_->refresh(weights); }
    std::int64_t engine_bytes() const override { return model_->engine().peak_allocated_bytes(); }
    std::string engine_description() const override { return model_->engine().description(); }
    std::string numerics() const override { return model_->engine().numerics(); }
    std::vector<SafetensorSpec> tensors() const override { return model_tensors(model_->config()); }
    DType saved_dtype() const override { return saved_dtype_; }
    void write_files(const std::string& directory) const override { model_->write_files(directory, saved_dtype_); }

    /// Of every row, work as by work_of(); before training.
    void set_costs(std::span<const RowCost> costs)
    {
        for (const RowCost& cost : costs) {
            tokens_.push_back(cost.tokens);
            work_.push_back(cost.work);
        }
    }

    RowCost cost_of(const PackedRow& row) const { return {row.tokens(), work_of(row, model_->config(), true)}; }

  protected:
    DecoderObjective(std::unique_ptr<DecoderTrainer> model, DType saved_dtype)
        : model_(std::move(model)), saved_dtype_(saved_dtype)
    {
    }
    DecoderTrainer& model() { return *model_; }
    const DecoderTrainer& model() const { return *model_; }

  private:
    std::unique_ptr<DecoderTrainer> model_;
    DType saved_dtype_;
    std::vector<std::int64_t> tokens_, work_;
};

} // namespace selm
