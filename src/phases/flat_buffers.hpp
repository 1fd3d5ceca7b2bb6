#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "selm/comm/communicator.hpp"
#include "selm/kernels/tensor.hpp"
#include "selm/model/decoder_config.hpp"
#include "selm/shard/flat_layout.hpp"
#include "selm/shard/shared_weights.hpp"

namespace selm {

/// Weights that the passes read, one copy per node, and the gradient that a rank's passes add to; both flat.
class FlatBuffers {
  public:
    /// Collective. @param shared false: every rank has a copy of the weights.
    FlatBuffers(std::vector<ParameterSpec> specs, Communicator& comm, bool shared);
    FlatBuffers(const FlatBuffers&) = delete;
    FlatBuffers& operator=(const FlatBuffers&) = delete;

    Tensor view(std::span<float> buffer, std::size_t parameter) const
    {
        const ParameterSpec& spec = parameters[parameter];
        return borrow_f32(buffer.data() + layout.offset(parameter), spec.rows, spec.columns);
    }
    /// Ranks that have one copy of the weights together.
    Communicator& node() { return *node_; }
    /// f32 [1, elements] of zeros, once per node, alive as long as this object. Collective over node().
    Tensor share(std::int64_t elements, std::string_view label);
    /// What a rank wrote to memory of share() becomes visible on its node. Collective over node().
    void fence();
    /// Of this rank; of memory that ranks share, its part.
    std::int64_t bytes() const;

    std::vector<ParameterSpec> parameters;
    FlatLayout layout;

  private:
    std::unique_ptr<Communicator> node_;
    std::vector<std::unique_ptr<NodeSharedMemory>> shared_;

  public:
    SharedWeights weights;
    std::span<float> compute; ///< the weights' values
    std::vector<float> gradient;
};

} // namespace selm
