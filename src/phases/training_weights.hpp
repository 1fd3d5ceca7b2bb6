#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "selm/comm/communicator.hpp"
#include "selm/kernels/tensor.hpp"
#include "selm/model/decoder_config.hpp"
#include "selm/shard/flat_layout.hpp"
#include "selm/shard/optimizer.hpp"
#include "selm/shard/shared_weights.hpp"

namespace selm {

/// The parameters of a training: their layout, the optimizer's state, and the weights that the passes read.
class TrainingWeights {
  public:
    struct Options {
        ShardedAdamW::Options optimizer;
        FlatLayoutOptions layout;
        bool inside_node = false;  ///< stage 3: every node has all parameters, cut over its ranks
        std::int64_t prefetch = 1; ///< stage 3: layers that are gathered ahead
        int node_ranks = 0;        ///< ranks that share memory at most; 0: all of a host
    };
    /// Collective. @throws Error io: no room.
    TrainingWeights(std::vector<ParameterSpec> specs, Communicator& comm, const Options& options);
    TrainingWeights(const TrainingWeights&) = delete;
    TrainingWeights& operator=(const TrainingWeights&) = delete;

    const Options& options() const { return options_; }
    int stage() const { return options_.optimizer.stage; }
    Communicator& comm() const { return comm_; }
    /// Ranks that have one copy of the weights together.
    Communicator& node() { return *node_; }

    /// The weights that passes read, once per node; null at stage 3 unless parameters are sharded inside nodes.
    SharedWeights* compute() { return compute_.get(); }
    /// Of one parameter. Only where there is compute().
    Tensor view(std::size_t parameter) const;

    /// f32 [1, elements] of zeros, once per node, alive as long as this object. Collective over node().
    Tensor share(std::int64_t elements, std::string_view label);
    /// What a rank wrote to memory of share() becomes visible on its node. Collective over node().
    void fence();

    /// Calls back with this rank's share of every tensor's master weights, such that every element is some rank's. Not
    /// collective.
    void visit_own_master(const std::function<void(const PartSlice&, std::span<const float>)>& visit) const;
    /// Of this rank: weights and optimizer state; of memory that ranks share, its part.
    std::int64_t bytes() const;

    const std::vector<ParameterSpec> parameters;
    const FlatLayout layout;

  private:
    Options options_;
    Communicator& comm_;
    std::unique_ptr<Communicator> node_;
    std::vector<std::unique_ptr<NodeSharedMemory>> shared_;
    std::unique_ptr<SharedWeights> compute_;

  public:
    ShardedAdamW optimizer;
};

} // namespace selm
