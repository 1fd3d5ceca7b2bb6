#include "training_weights.hpp"

#include <utility>

#include "selm/base/error.hpp"

namespace selm {

TrainingWeights::TrainingWeights(std::vector<ParameterSpec> specs, Communicator& comm, const Options& options)
    : parameters(std::move(specs)), layout(parameters, comm.size(), options.layout), options_(options), comm_(comm),
      node_(stage() == 0 ? make_single_communicator()
                         : comm.split_node("ranks that share the weights", options.node_ranks)),
      compute_(stage() < 3 || options.inside_node ? std::make_unique<SharedWeights>(layout, comm, *node_) : nullptr),
      optimizer(layout, comm, options.optimizer, compute_.get())
{
}

Tensor TrainingWeights::view(std::size_t parameter) const
{
    SELM_EXPECT(compute_ != nullptr);
    const ParameterSpec& spec = parameters[parameter];
    return borrow_f32(compute_->values().data() + layout.offset(parameter), spec.rows, spec.columns);
}

Tensor TrainingWeights::share(std::int64_t elements, std::string_view label)
{
    shared_.push_back(
        std::make_unique<NodeSharedMemory>(*node_, static_cast<std::size_t>(elements) * sizeof(float), label));
    return borrow_f32(reinterpret_cast<float*>(shared_.back()->data()), 1, elements);
}

void TrainingWeights::fence()
{
    for (const auto& memory : shared_)
        memory->fence();
}

void TrainingWeights::visit_own_master(
    const std::function<void(const PartSlice&, std::span<const float>)>& visit) const
{
    for (const PartSlice& slice : part_slices(parameters, layout, rank_pieces(layout, comm_.rank()))) {
        if (slice.count == 0)
            continue;
        const std::size_t skip =
            layout.shard(slice.unit, comm_.rank()).offset - optimizer.pieces()[slice.unit].offset;
        visit(slice, optimizer.master(slice.unit).subspan(skip + slice.piece_begin, slice.count));
    }
}

std::int64_t TrainingWeights::bytes() const
{
    std::int64_t bytes = optimizer.bytes() + (compute_ ? compute_->bytes() : 0);
    for (const auto& memory : shared_)
        bytes += static_cast<std::int64_t>(memory->bytes()) / node_->size();
    return bytes;
}

} // namespace selm
