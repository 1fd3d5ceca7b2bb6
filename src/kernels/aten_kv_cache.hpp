#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <utility>

#include "aten_parts.hpp"
#include "selm/kernels/engine.hpp"

namespace selm {

/// A step of so many rows of a cache: where its inputs lie, and what the device does.
struct RecordedStep {
    at::Tensor inputs; ///< i32 [4, rows]: AtenEngine::step_inputs_
    std::unique_ptr<aten::Recording> recording;
    bool has_run = false;
    std::int64_t allocations = 0; ///< of the engine until the step had run last
};

/// Contiguous [layers, slots, capacity, NK, D] keys and values.
class AtenKvCache final : public KvCache {
  public:
    AtenKvCache(at::Tensor keys, at::Tensor values) : keys_(std::move(keys)), values_(std::move(values)) {}
    std::int64_t slots() const override { return keys_.size(1); }
    std::int64_t capacity() const override { return keys_.size(2); }
    std::int64_t layers() const { return keys_.size(0); }
    aten::CacheLayer layer(std::int64_t layer) const { return {keys_.select(0, layer), values_.select(0, layer)}; }
    /// [capacity, NK, D]
    at::Tensor keys(std::int64_t layer, std::int64_t slot) const { return keys_.select(0, layer).select(0, slot); }
    at::Tensor values(std::int64_t layer, std::int64_t slot) const { return values_.select(0, layer).select(0, slot); }
    RecordedStep& recorded_step(std::int64_t rows) { return recorded_[rows]; }

  private:
    at::Tensor keys_;
    at::Tensor values_;
    std::map<std::int64_t, RecordedStep> recorded_;
};

} // namespace selm
