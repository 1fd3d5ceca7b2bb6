#include "selm/shard/sharded_weights.hpp"

#include <algorithm>
#include <atomic>
#include <utility>

#include "selm/base/error.hpp"
#include "selm/comm/agree.hpp"
#include "selm/kernels/engine.hpp"

namespace selm {

namespace {

constexpr std::int64_t panel_alignment = 16; // f32 elements: 64 bytes

std::int64_t aligned(std::int64_t elements)
{
    return (elements + panel_alignment - 1) / panel_alignment * panel_alignment;
}

/// Slots beyond those of the layer in use and the layers ahead: a rank that is ahead need not wait for the last one to
/// finish the layer before.
constexpr std::int64_t spare_slots = 1;

enum class Packed { nothing, forward, both };

} // namespace

/// Parameters that are gathered together.
struct ShardedWeights::Group {
    std::size_t first = 0, end = 0; ///< parameters
    ShardInfo units;
    ShardInfo flat;
    std::vector<std::int64_t> panels; ///< by parameter: where its panels begin; -1: it is used as it is
    std::int64_t panel_elements = 0;
};

struct ShardedWeights::Groups {
    Groups(const DecoderConfig& config, const Engine& engine, std::span<const ParameterSpec> parameters,
           const FlatLayout& layout, const Options& options)
    {
        const auto norm = static_cast<std::size_t>(ParameterIndex::final_norm(config));
        const auto head_index = static_cast<std::size_t>(ParameterIndex::head(config));
        const auto group = [&](std::size_t first, std::size_t end) {
            return make_group(engine, parameters, layout, first, end);
        };
        embedding = group(0, 1);
        if (head_index != 0)
            embedding.panel_elements = 0; // only looked up
        for (std::int64_t i = 0; i < config.layers; ++i)
            layers.push_back(group(static_cast<std::size_t>(ParameterIndex::input_norm(i)),
                                   static_cast<std::size_t>(ParameterIndex::down(i)) + 1));
        tail = group(norm, config.sequence_classifier ? head_index + 1 : norm + 1);
        if (head_index != 0 && !config.sequence_classifier)
            head = group(head_index, head_index + 1);
        for (const Group& layer : layers) {
            layer_flat = std::max(layer_flat, layer.flat.size);
            layer_panels = std::max(layer_panels, static_cast<std::size_t>(layer.panel_elements));
        }
        slots = std::min(config.layers, 1 + options.prefetch + spare_slots);
    }
    static Group make_group(const Engine& engine, std::span<const ParameterSpec> parameters,
                                const FlatLayout& layout, std::size_t first, std::size_t end)
    {
        Group group;
        group.first = first;
        group.end = end;
        group.units = layout.units_of_parameters(first, end);
        const FlatUnit& from = layout.unit(group.units.offset);
        const FlatUnit& to = layout.unit(group.units.offset + group.units.size - 1);
        SELM_EXPECT(from.first == first && to.first + to.parameters == end);
        group.flat = {from.flat.offset, to.flat.offset + to.flat.size - from.flat.offset};
        for (std::size_t p = first; p < end; ++p) {
            const ParameterSpec& spec = parameters[p];
            const std::int64_t elements = spec.rows == 1 ? 0 : engine.packed_elements(spec.rows, spec.columns, true);
            group.panels.push_back(elements > 0 ? group.panel_elements : -1);
            group.panel_elements += aligned(elements);
        }
        return group;
    }
    bool has_head() const { return head.end > 0; }

    Group embedding, tail;
    Group head; ///< empty when tied, or a classifier (its head is in the tail)
    std::vector<Group> layers;
    std::size_t layer_flat = 0, layer_panels = 0; ///< elements of the largest layer
    std::int64_t slots = 0;
};

/// Memory of a node for one group.
struct ShardedWeights::Slot {
    std::unique_ptr<NodeSharedMemory> flat;   ///< none where the compute weights are resident
    std::unique_ptr<NodeSharedMemory> panels; ///< none where nothing is packed
    const Group* group = nullptr;
    bool filled = false;
    Packed packed = Packed::nothing;
    bool in_use = false;
    bool arrived = false; ///< all exchanges are seen to be complete; their time is counted
    std::vector<std::unique_ptr<PendingCollective>> exchanges; ///< with other nodes
    std::unique_ptr<PendingCollective> all_filled;             ///< of the node's ranks
    std::unique_ptr<PendingCollective> all_released;
    Stopwatch::Clock::time_point start{};
    LayerWeights layer;
    PackedWeight head;
};

ShardedWeights::ShardedWeights(const DecoderConfig& config, Engine& engine, std::span<const ParameterSpec> parameters,
                               const ShardedAdamW& optimizer, Communicator& comm, Communicator& node,
                               SharedWeights* resident, const Options& options)
    : config_(config), engine_(engine), parameters_(parameters), optimizer_(optimizer), layout_(optimizer.layout()),
      node_(node), resident_(resident), options_(options), exchange_(layout_, comm, NodeMap(comm, node))
{
    SELM_EXPECT(options.prefetch >= 0);
    groups_ = std::make_unique<Groups>(config, engine, parameters, layout_, options);
    const Groups& g = *groups_;
    agree(comm, "memory for gathered weights", [&] {
        for (std::int64_t i = 0; i < g.slots; ++i)
            ring_.push_back(make_slot(g.layer_flat, g.layer_panels, "weights of a layer"));
        embedding_slot_ =
            make_slot(g.embedding.flat.size, static_cast<std::size_t>(g.embedding.panel_elements), "embedding");
        tail_slot_ = make_slot(g.tail.flat.size, 0, "final norm");
        if (g.has_head())
            head_slot_ = make_slot(g.head.flat.size, static_cast<std::size_t>(g.head.panel_elements), "head");
    });
}

ShardedWeights::~ShardedWeights() = default;

std::unique_ptr<ShardedWeights::Slot> ShardedWeights::make_slot(std::size_t flat_elements, std::size_t panel_elements,
                                                                const char* label)
{
    auto slot = std::make_unique<Slot>();
    if (resident_ == nullptr)
        slot->flat = std::make_unique<NodeSharedMemory>(node_, flat_elements * sizeof(float), label);
    if (panel_elements > 0)
        slot->panels = std::make_unique<NodeSharedMemory>(node_, panel_elements * sizeof(float), label);
    return slot;
}

float* ShardedWeights::values(const Slot& slot, std::size_t parameter) const
{
    if (resident_ != nullptr)
        return resident_->values().data() + layout_.offset(parameter);
    return reinterpret_cast<float*>(slot.flat->data()) + (layout_.offset(parameter) - slot.group->flat.offset);
}

Tensor ShardedWeights::view(const Slot& slot, std::size_t parameter) const
{
    return borrow_f32(values(slot, parameter), parameters_[parameter].rows, parameters_[parameter].columns);
}

/// Does this rank pack the parameter for its node?
bool ShardedWeights::mine(std::size_t parameter) const
{
    return parameter % static_cast<std::size_t>(node_.size()) == static_cast<std::size_t>(node_.rank());
}

void ShardedWeights::wait(std::unique_ptr<PendingCollective>& pending)
{
    if (!pending)
        return;
    const Stopwatch time(times_.exposed);
    pending->wait();
    pending.reset();
    std::atomic_thread_fence(std::memory_order_seq_cst);
}

void ShardedWeights::barrier()
{
    std::atomic_thread_fence(std::memory_order_seq_cst);
    const Stopwatch flight(times_.in_flight);
    auto all = node_.start_barrier("weights of a node");
    wait(all);
}

/// Starts to bring a group into a slot whose former one no rank uses any more.
void ShardedWeights::fill(Slot& slot, const Group& group)
{
    SELM_EXPECT(!slot.in_use && slot.exchanges.empty() && !slot.all_filled);
    wait(slot.all_released);
    slot.group = &group;
    slot.packed = Packed::nothing;
    slot.filled = resident_ != nullptr;
    if (slot.filled)
        return;
    slot.start = Stopwatch::Clock::now();
    slot.arrived = false;
    const bool bf16 = optimizer_.options().round_bf16;
    const std::span<float> memory(reinterpret_cast<float*>(slot.flat->data()), group.flat.size);
    for (std::size_t u = group.units.offset; u < group.units.offset + group.units.size; ++u) {
        const ShardInfo piece = optimizer_.pieces()[u];
        const ShardInfo unit = layout_.unit(u).flat;
        const auto own = memory.subspan(piece.offset - group.flat.offset, piece.size);
        std::copy(optimizer_.master(u).begin(), optimizer_.master(u).end(), own.begin());
        if (bf16)
            round_to_bf16(own);
        if (auto pending = exchange_.start(u, memory.subspan(unit.offset - group.flat.offset, unit.size), bf16,
                                           "weights of a layer"))
            slot.exchanges.push_back(std::move(pending));
    }
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (exchange_.map().nodes() == 1)
        slot.all_filled = node_.start_barrier("weights of a node");
}

void ShardedWeights::finish_filling(Slot& slot)
{
    if (slot.filled)
        return;
    const bool on_the_way = !slot.exchanges.empty() && !slot.arrived;
    for (auto& pending : slot.exchanges)
        wait(pending);
    slot.exchanges.clear();
    if (on_the_way)
        times_.in_flight += Stopwatch::seconds_since(slot.start);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (!slot.all_filled)
        slot.all_filled = node_.start_barrier("weights of a node");
    wait(slot.all_filled);
    slot.filled = true;
}

void ShardedWeights::pack_layer(Slot& slot, bool with_backward)
{
    const std::size_t first = slot.group->first;
    const auto packed = [&](std::size_t which) {
        const std::size_t p = first + which;
        const std::int64_t begin = slot.group->panels[which];
        Tensor storage;
        if (begin >= 0)
            storage = borrow_f32(reinterpret_cast<float*>(slot.panels->data()) + begin, 1,
                                 engine_.packed_elements(parameters_[p].rows, parameters_[p].columns, true));
        return engine_.pack(view(slot, p), with_backward, storage, begin >= 0 && !mine(p));
    };
    slot.layer.input_norm = view(slot, first);
    slot.layer.qkv = packed(1);
    slot.layer.out = packed(2);
    slot.layer.post_norm = view(slot, first + 3);
    slot.layer.gate_up = packed(4);
    slot.layer.down = packed(5);
}

/// Packs this rank's parameters and waits for those of the others.
void ShardedWeights::pack(Slot& slot, bool with_backward)
{
    const Packed wanted = with_backward ? Packed::both : Packed::forward;
    if (slot.packed >= wanted)
        return;
    wait(slot.all_released); // the panels may still be read by a rank that is behind
    if (slot.group == &groups_->embedding || slot.group == &groups_->head) {
        const std::size_t p = slot.group->first;
        const std::int64_t elements = slot.group->panel_elements;
        Tensor storage;
        if (elements > 0)
            storage = borrow_f32(reinterpret_cast<float*>(slot.panels->data()), 1, elements);
        slot.head = engine_.pack(view(slot, p), with_backward, storage, elements > 0 && !mine(p));
    } else {
        pack_layer(slot, with_backward);
    }
    barrier();
    slot.packed = wanted;
}

ShardedWeights::Slot* ShardedWeights::slot_of_layer(std::int64_t layer)
{
    for (const auto& slot : ring_)
        if (slot->group == &groups_->layers[static_cast<std::size_t>(layer)])
            return slot.get();
    return nullptr;
}

/// A slot that no rank needs for the layers from..to (in either order): the choice is the same on every rank.
ShardedWeights::Slot& ShardedWeights::free_slot(std::int64_t from, std::int64_t to)
{
    const auto low = static_cast<std::size_t>(std::min(from, to)), high = static_cast<std::size_t>(std::max(from, to));
    Slot* best = nullptr;
    std::int64_t farthest = -1;
    for (const auto& slot : ring_) {
        if (slot->in_use)
            continue;
        if (slot->group == nullptr)
            return *slot;
        const auto layer = static_cast<std::size_t>(slot->group - groups_->layers.data());
        if (layer >= low && layer <= high)
            continue;
        const auto distance = std::abs(static_cast<std::int64_t>(layer) - from);
        if (distance > farthest) {
            farthest = distance;
            best = slot.get();
        }
    }
    SELM_EXPECT(best != nullptr);
    return *best;
}

void ShardedWeights::start_ahead(std::int64_t layer, std::int64_t direction)
{
    const std::int64_t last = std::clamp<std::int64_t>(layer + direction * options_.prefetch, 0, config_.layers - 1);
    for (std::int64_t next = layer; next != last;) {
        next += direction;
        if (slot_of_layer(next) == nullptr)
            fill(free_slot(layer, last), groups_->layers[static_cast<std::size_t>(next)]);
    }
}

/// Open MPI moves data only inside its calls.
void ShardedWeights::poll()
{
    const Stopwatch time(times_.exposed);
    for (const auto& slot : ring_) {
        if (slot->exchanges.empty() || slot->arrived)
            continue;
        slot->arrived = true;
        for (const auto& pending : slot->exchanges)
            slot->arrived = pending->test() && slot->arrived;
        if (slot->arrived)
            times_.in_flight += Stopwatch::seconds_since(slot->start);
    }
}

const LayerWeights& ShardedWeights::layer(std::int64_t index, WeightUse use)
{
    SELM_EXPECT(index >= 0 && index < config_.layers);
    poll();
    Slot* slot = slot_of_layer(index);
    if (slot == nullptr) {
        slot = &free_slot(index, index);
        fill(*slot, groups_->layers[static_cast<std::size_t>(index)]);
    }
    slot->in_use = true;
    finish_filling(*slot);
    pack(*slot, use == WeightUse::backward);
    start_ahead(index, use == WeightUse::backward ? -1 : 1);
    return slot->layer;
}

void ShardedWeights::release(std::int64_t index)
{
    Slot* slot = slot_of_layer(index);
    SELM_EXPECT(slot != nullptr && slot->in_use);
    slot->in_use = false;
    wait(slot->all_released);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    slot->all_released = node_.start_barrier("weights of a node");
    poll();
}

const Tensor& ShardedWeights::embedding()
{
    if (embedding_slot_->group == nullptr)
        fill(*embedding_slot_, groups_->embedding);
    finish_filling(*embedding_slot_);
    embedding_ = view(*embedding_slot_, 0);
    return embedding_;
}

const Tensor& ShardedWeights::final_norm()
{
    return final_norm_;
}

const PackedWeight& ShardedWeights::head(WeightUse)
{
    if (config_.sequence_classifier)
        return score_;
    Slot& slot = head_slot_ ? *head_slot_ : *embedding_slot_;
    if (slot.group == nullptr)
        fill(slot, head_slot_ ? groups_->head : groups_->embedding);
    finish_filling(slot);
    pack(slot, true); // once for the forward and backward passes of a step
    return slot.head;
}

std::span<const float> ShardedWeights::score_head() const
{
    SELM_EXPECT(config_.sequence_classifier);
    return {values(*tail_slot_, groups_->tail.end - 1), static_cast<std::size_t>(config_.hidden)};
}

void ShardedWeights::refresh()
{
    for (const auto& slot : ring_) {
        SELM_EXPECT(!slot->in_use);
        if (slot->group != nullptr)
            finish_filling(*slot); // a layer that was fetched ahead for a pass that did not come
        wait(slot->all_released);
        slot->group = nullptr;
    }
    for (Slot* slot : {embedding_slot_.get(), tail_slot_.get(), head_slot_.get()})
        if (slot != nullptr)
            slot->group = nullptr;
    fill(*tail_slot_, groups_->tail);
    finish_filling(*tail_slot_);
    final_norm_ = view(*tail_slot_, groups_->tail.first);
    if (config_.sequence_classifier)
        score_ = engine_.pack(view(*tail_slot_, groups_->tail.end - 1), true, {}, false);
}

std::int64_t ShardedWeights::node_bytes(const DecoderConfig& config, const Engine& engine,
                                        std::span<const ParameterSpec> parameters, const FlatLayout& layout,
                                        bool resident, const Options& options)
{
    const Groups g(config, engine, parameters, layout, options);
    std::size_t elements = static_cast<std::size_t>(g.slots) * g.layer_panels +
                           static_cast<std::size_t>(g.embedding.panel_elements + g.head.panel_elements);
    if (!resident)
        elements += static_cast<std::size_t>(g.slots) * g.layer_flat + g.embedding.flat.size + g.tail.flat.size +
                    g.head.flat.size;
    return static_cast<std::int64_t>(elements * sizeof(float));
}

std::int64_t ShardedWeights::bytes() const
{
    std::size_t shared = 0;
    const auto add = [&](const Slot* slot) {
        if (slot != nullptr)
            shared += (slot->flat ? slot->flat->bytes() : 0) + (slot->panels ? slot->panels->bytes() : 0);
    };
    for (const auto& slot : ring_)
        add(slot.get());
    for (const Slot* slot : {embedding_slot_.get(), tail_slot_.get(), head_slot_.get()})
        add(slot);
    return static_cast<std::int64_t>(shared) / node_.size();
}

} // namespace selm
