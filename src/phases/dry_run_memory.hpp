#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "selm/kernels/engine.hpp"
#include "selm/model/decoder_config.hpp"
#include "selm/phases/generate.hpp"
#include "selm/phases/logprob.hpp"
#include "selm/phases/rank.hpp"
#include "selm/phases/train.hpp"
#include "selm/shard/flat_layout.hpp"

namespace selm {

/// Memory that a phase asks for, by what it is for: bytes on every rank, and bytes that the ranks of a node share.
struct PhaseMemory {
    using Parts = std::vector<std::pair<std::string, std::int64_t>>;
    std::string phase;
    Parts per_rank, per_node;
    std::vector<std::string> not_counted; ///< models that are not at hand

    std::int64_t rank_bytes() const;
    std::int64_t node_bytes(std::int64_t ranks_on_node) const;
};

/// Are a model's weights there, and not its shape alone?
bool has_weights(const std::string& directory);

/// Tokens that one pass computes at most: the budget, or a single row's prompt and three answers where they need more.
std::int64_t most_tokens(std::int64_t budget, const EncodingOptions& encoding, std::int64_t max_new_tokens);

/// Keys and values are those of prompts within max-prompt-length; longer prompts touch more.
PhaseMemory generate_memory(const GenerateOptions& options, const DecoderConfig& policy, const Engine& engine);
PhaseMemory rank_memory(const RankOptions& options, std::int64_t max_new_tokens, const Engine& engine);
PhaseMemory logprob_memory(const LogProbOptions& options, std::int64_t max_new_tokens, const DecoderConfig& policy,
                           const Engine& engine);
/// The rank with the largest shard.
PhaseMemory train_memory(const TrainOptions& options, std::int64_t max_new_tokens, const DecoderConfig& policy,
                         const Engine& engine, const FlatLayout& layout);
/// The same where it is known what activations take.
PhaseMemory training_memory(const TrainOptions& options, std::int64_t activation_bytes, const DecoderConfig& policy,
                            const Engine& engine, const FlatLayout& layout);

/// How evenly a flat space of elements is cut.
struct ShardBalance {
    std::size_t smallest = 0, largest = 0;
};

/// @throws Error internal unless the shards cover [0, total) in order, without gap or overlap, and none is larger than an
/// equal share rounded up to the alignment.
ShardBalance check_shards(std::size_t total, std::size_t alignment, const std::vector<ShardInfo>& shards);
/// The same for every unit of a layout; the balance is that of all units together.
ShardBalance check_shards(const FlatLayout& layout);

/// @throws Error internal unless every element of every checkpoint tensor lies in exactly one rank's shard.
void check_tensor_slices(const std::vector<ParameterSpec>& parameters, const FlatLayout& layout);

} // namespace selm
