#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "selm/comm/communicator.hpp"
#include "selm/model/weights.hpp"
#include "selm/shard/comm_times.hpp"
#include "selm/shard/flat_layout.hpp"
#include "selm/shard/node_exchange.hpp"
#include "selm/shard/optimizer.hpp"
#include "selm/shard/shared_weights.hpp"

namespace selm {

/**
 * @brief A decoder's weights under ZeRO stage 3: gathered layer by layer from the ranks' pieces of the master weights,
 * packed, and given up after use.
 *
 * A node's ranks gather and pack together: each copies its pieces into memory that they share, receives some of the other
 * nodes' and packs some of the parameters. `prefetch` layers ahead of the one in use are on their way. Embedding and head
 * are gathered once per step and stay (one copy per node); the final norm and a score head stay on every rank.
 *
 * The calls of WeightStore communicate: every rank makes the same ones in the same order.
 */
class ShardedWeights final : public WeightStore {
  public:
    struct Options {
        std::int64_t prefetch = 1; ///< layers; 0: gather when needed
    };
    /// @param layout cut at decoder_parameter_groups(). @param node ranks that share memory. @param resident the whole
    /// compute weights where every node has them (parameters sharded inside a node), so that nothing is gathered; null:
    /// from the optimizer's master weights. All borrowed. Collective over comm. @throws Error io: no room on a node.
    ShardedWeights(const DecoderConfig& config, Engine& engine, std::span<const ParameterSpec> parameters,
                   const ShardedAdamW& optimizer, Communicator& comm, Communicator& node, SharedWeights* resident,
                   const Options& options);
    ~ShardedWeights() override;

    /// The master weights have changed: what was gathered is stale. No rank may be in a pass. Collective.
    void refresh();

    const LayerWeights& layer(std::int64_t index, WeightUse use) override;
    void release(std::int64_t index) override;
    const Tensor& embedding() override;
    const Tensor& final_norm() override;
    const PackedWeight& head(WeightUse use) override;
    /// f32 [1, H] of a sequence classifier, on every rank.
    std::span<const float> score_head() const;

    CommTimes times() const { return times_; }
    /// Of memory that the node's ranks share, this rank's part.
    std::int64_t bytes() const;
    /// Of a whole node, before anything is made.
    static std::int64_t node_bytes(const DecoderConfig& config, const Engine& engine,
                                   std::span<const ParameterSpec> parameters, const FlatLayout& layout, bool resident,
                                   const Options& options);

  private:
    struct Group;
    struct Groups;
    struct Slot;
    std::unique_ptr<Slot> make_slot(std::size_t flat_elements, std::size_t panel_elements, const char* label);
    float* values(const Slot& slot, std::size_t parameter) const;
    Tensor view(const Slot& slot, std::size_t parameter) const;
    bool mine(std::size_t parameter) const;
    void fill(Slot& slot, const Group& group);
    void finish_filling(Slot& slot);
    void pack(Slot& slot, bool with_backward);
    void pack_layer(Slot& slot, bool with_backward);
    void barrier();
    void wait(std::unique_ptr<PendingCollective>& pending);
    Slot* slot_of_layer(std::int64_t layer);
    Slot& free_slot(std::int64_t from, std::int64_t to);
    void start_ahead(std::int64_t layer, std::int64_t direction);
    void poll();

    DecoderConfig config_;
    Engine& engine_;
    std::span<const ParameterSpec> parameters_;
    const ShardedAdamW& optimizer_;
    const FlatLayout& layout_;
    Communicator& node_;
    SharedWeights* resident_;
    Options options_;
    NodeExchange exchange_;

    std::unique_ptr<Groups> groups_;
    std::vector<std::unique_ptr<Slot>> ring_; ///< of layers
    std::unique_ptr<Slot> embedding_slot_, tail_slot_, head_slot_;
    Tensor embedding_, final_norm_;
    PackedWeight score_;
    CommTimes times_;
};

} // namespace selm
