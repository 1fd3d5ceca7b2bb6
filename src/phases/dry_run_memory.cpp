#include "dry_run_memory.hpp"

#include <algorithm>
#include <filesystem>

#include "selm/base/error.hpp"
#include "selm/model/decoder.hpp"
#include "selm/model/pair_model.hpp"
#include "selm/model/weights.hpp"
#include "selm/phases/shared_model.hpp"
#include "selm/rank/ranker.hpp"
#include "selm/shard/gradient.hpp"
#include "selm/shard/sharded_weights.hpp"

namespace selm {
namespace {

constexpr std::int64_t float_bytes = 4;

std::int64_t sum(const PhaseMemory::Parts& parts)
{
    std::int64_t total = 0;
    for (const auto& part : parts)
        total += part.second;
    return total;
}

std::int64_t shared_weights(const DecoderConfig& config, const Engine& engine, const CommonOptions& common)
{
    return float_bytes * ResidentWeights::memory_elements(config, engine, false, parse_dtype(common.dtype));
}

std::int64_t round_up(std::int64_t value, std::int64_t multiple)
{
    return (value + multiple - 1) / multiple * multiple;
}

} // namespace

bool has_weights(const std::string& directory)
{
    return std::filesystem::exists(directory + "/model.safetensors")
        || std::filesystem::exists(directory + "/model.safetensors.index.json");
}

std::int64_t PhaseMemory::rank_bytes() const
{
    return sum(per_rank);
}

std::int64_t PhaseMemory::node_bytes(std::int64_t ranks_on_node) const
{
    return sum(per_node) + ranks_on_node * rank_bytes();
}

std::int64_t most_tokens(std::int64_t budget, const EncodingOptions& encoding, std::int64_t max_new_tokens)
{
    // recipe: a middle-ranked answer is not cut.
    const std::int64_t row = candidates_per_row * encoding.max_length + (encoding.encoding == "recipe" ? max_new_tokens : 0);
    return std::max(budget, row);
}

PhaseMemory generate_memory(const GenerateOptions& options, const DecoderConfig& policy, const Engine& engine)
{
    const std::int64_t sequence = std::min(options.encoding.max_prompt_length + options.max_new_tokens, policy.max_positions);
    const std::int64_t keys_and_values = 2 * policy.layers * policy.kv_heads * policy.head_dim * round_up(sequence, prefill_tile);
    PhaseMemory memory{"generate", {}, {{"weights", shared_weights(policy, engine, options.common)}}, {}};
    memory.per_rank = {
        {"keys and values", static_cast<std::int64_t>(size_of(engine.cache_dtype())) * options.slots * keys_and_values},
        {"activations",
         decoder_activation_bytes(policy, activation_types(engine), options.slots + options.prefill_tokens, options.slots, false)},
        {"logits", float_bytes * options.slots * policy.vocabulary}};
    return memory;
}

PhaseMemory rank_memory(const RankOptions& options, std::int64_t max_new_tokens, const Engine& engine)
{
    PhaseMemory memory{"rank", {}, {}, {}};
    const std::int64_t tokens = most_tokens(options.tokens_per_microbatch, options.encoding, max_new_tokens);
    for (const std::string& word : options.rankers) {
        const RankerSpec spec = RankerSpec::parse(word);
        if (spec.kind == "file")
            continue;
        if (!std::filesystem::exists(spec.path + "/config.json") || (spec.kind == "pairrm" && !has_weights(spec.path))) {
            memory.not_counted.push_back(word);
            continue;
        }
        if (spec.kind == "pairrm") {
            memory.per_node.emplace_back(
                "weights of " + word, float_bytes * PairWeights::memory_elements(DebertaConfig::from_directory(spec.path), engine, false));
            memory.not_counted.push_back("activations of " + word);
            continue;
        }
        const DecoderConfig config = DecoderConfig::from_directory(spec.path);
        memory.per_node.emplace_back("weights of " + word, shared_weights(config, engine, options.common));
        memory.per_rank.emplace_back("activations of " + word,
                                     decoder_activation_bytes(config, activation_types(engine), tokens, candidates_per_row, false));
    }
    return memory;
}

PhaseMemory logprob_memory(const LogProbOptions& options, std::int64_t max_new_tokens, const DecoderConfig& policy,
                           const Engine& engine)
{
    const std::int64_t tokens = most_tokens(options.tokens_per_microbatch, options.encoding, max_new_tokens);
    return {"logprob",
            {{"activations", decoder_activation_bytes(policy, activation_types(engine), tokens, tokens, false)}},
            {{"weights", shared_weights(policy, engine, options.common)}},
            {}};
}

PhaseMemory train_memory(const TrainOptions& options, std::int64_t max_new_tokens, const DecoderConfig& policy,
                         const Engine& engine, const FlatLayout& layout)
{
    const std::int64_t tokens = most_tokens(options.tokens_per_microbatch, options.encoding, max_new_tokens);
    const std::int64_t recomputed =
        options.recompute == "layers" ? policy.layers
        : options.recompute == "auto"
            ? plan_recompute(policy, activation_types(engine), tokens, tokens, options.activation_bytes).layers
            : 0;
    return training_memory(
        options, decoder_activation_bytes(policy, activation_types(engine), tokens, tokens, true, recomputed), policy,
        engine, layout);
}

PhaseMemory training_memory(const TrainOptions& options, std::int64_t activation_bytes, const DecoderConfig& policy,
                            const Engine& engine, const FlatLayout& layout)
{
    const auto whole = static_cast<std::int64_t>(layout.total());
    const auto shard = [&](bool trained) { // the largest
        std::size_t elements = 0;
        for (std::size_t u = 0; options.zero == 0 && u < layout.units(); ++u)
            elements += trained && layout.unit(u).frozen ? 0 : layout.unit(u).flat.size;
        return static_cast<std::int64_t>(options.zero == 0 ? elements : layout.shard_elements(0, trained));
    };
    // Beside both moments: master weights, where the weights that passes read are not the master weights themselves.
    const bool gathered = options.zero == 3 && options.zero3_group == "world";
    const bool own_master = gathered || parse_dtype(options.common.dtype) == DType::bf16;
    PhaseMemory memory{"train", {}, {}, {}};
    auto& weights = options.zero == 0 ? memory.per_rank : memory.per_node;
    if (!gathered)
        weights.emplace_back("parameters", float_bytes * whole);
    if (options.zero == 3)
        weights.emplace_back("weights of layers in use",
                             ShardedWeights::node_bytes(policy, engine, decoder_parameters(policy), layout, !gathered,
                                                        {.prefetch = options.prefetch}));
    else
        weights.emplace_back("packed weights", float_bytes * ResidentWeights::panel_elements(policy, engine, true));
    const ShardedGradient::Options gradient{.stage = static_cast<int>(options.zero),
                                            .accumulate = parse_dtype(options.accumulate_dtype),
                                            .most_in_flight =
                                                static_cast<std::size_t>(options.bucket_bytes) / sizeof(float)};
    for (const auto& part :
         {std::pair{"gradients", ShardedGradient::planned_peak_bytes(layout, 0, gradient, policy.tied_embeddings)},
          {"optimizer state", float_bytes * ((own_master ? shard(false) : 0) + 2 * shard(true))},
          {"activations", activation_bytes}})
        memory.per_rank.emplace_back(part);
    return memory;
}

ShardBalance check_shards(std::size_t total, std::size_t alignment, const std::vector<ShardInfo>& shards)
{
    SELM_EXPECT(!shards.empty() && alignment >= 1);
    ShardBalance balance{shards.front().size, 0};
    std::size_t end = 0;
    for (std::size_t rank = 0; rank < shards.size(); ++rank) {
        if (shards[rank].offset != end)
            throw internal_error(cat("the shard of rank ", rank, " of ", shards.size(), " begins at element ", shards[rank].offset,
                                     ", but the one before it ends at ", end,
                                     " (elements would have no owner, or two). Report this"));
        end += shards[rank].size;
        balance.smallest = std::min(balance.smallest, shards[rank].size);
        balance.largest = std::max(balance.largest, shards[rank].size);
    }
    if (end != total)
        throw internal_error(cat("the shards end at element ", end, " of ", total, " (the rest would have no owner). Report this"));
    const std::size_t equal_share = (total + shards.size() - 1) / shards.size();
    if (balance.largest >= equal_share + alignment)
        throw internal_error(cat("the largest of ", shards.size(), " shards has ", balance.largest, " elements, an equal share is ",
                                 equal_share, " (that rank would need more memory than planned). Report this"));
    return balance;
}

ShardBalance check_shards(const FlatLayout& layout)
{
    for (std::size_t u = 0; u < layout.units(); ++u) {
        std::vector<ShardInfo> shards;
        for (int rank = 0; rank < layout.ranks(); ++rank) {
            shards.push_back(layout.shard(u, rank));
            shards.back().offset -= layout.unit(u).flat.offset;
        }
        check_shards(layout.unit(u).flat.size, layout.alignment(), shards);
    }
    ShardBalance balance{layout.total(), 0};
    for (int rank = 0; rank < layout.ranks(); ++rank) {
        balance.smallest = std::min(balance.smallest, layout.shard_elements(rank, false));
        balance.largest = std::max(balance.largest, layout.shard_elements(rank, false));
    }
    return balance;
}

void check_tensor_slices(const std::vector<ParameterSpec>& parameters, const FlatLayout& layout)
{
    std::vector<std::size_t> covered;
    for (int rank = 0; rank < layout.ranks(); ++rank) {
        const auto slices = part_slices(parameters, layout, rank_pieces(layout, rank));
        covered.resize(slices.size(), 0);
        for (std::size_t i = 0; i < slices.size(); ++i) {
            if (slices[i].count == 0)
                continue;
            if (slices[i].part_begin != covered[i])
                throw internal_error(cat(slices[i].part->name, ": rank ", rank, " owns elements from ", slices[i].part_begin,
                                         ", but the ranks before it own ", covered[i], ". Report this"));
            covered[i] += slices[i].count;
        }
    }
    std::size_t i = 0;
    for (const ParameterSpec& parameter : parameters)
        for (const ParameterSpec::Part& part : parameter.parts)
            if (covered.at(i++) != static_cast<std::size_t>(part.rows * parameter.columns))
                throw internal_error(cat(part.name, ": ", covered[i - 1], " of ", part.rows * parameter.columns,
                                         " elements have an owner. Report this"));
}

} // namespace selm
