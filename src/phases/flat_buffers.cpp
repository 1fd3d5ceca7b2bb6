#include "flat_buffers.hpp"

#include <utility>

#include "selm/comm/agree.hpp"

namespace selm {

FlatBuffers::FlatBuffers(std::vector<ParameterSpec> specs, Communicator& comm, bool shared)
    : parameters(std::move(specs)), layout(parameters, comm.size()),
      node_(shared ? comm.split_node("ranks that share the weights") : make_single_communicator()),
      weights(layout, comm, *node_), compute(weights.values())
{
    agree(comm, "memory for the gradient", [&] { gradient.assign(layout.total(), 0.0F); });
}

Tensor FlatBuffers::share(std::int64_t elements, std::string_view label)
{
    shared_.push_back(
        std::make_unique<NodeSharedMemory>(*node_, static_cast<std::size_t>(elements) * sizeof(float), label));
    return borrow_f32(reinterpret_cast<float*>(shared_.back()->data()), 1, elements);
}

void FlatBuffers::fence()
{
    for (const auto& memory : shared_)
        memory->fence();
}

std::int64_t FlatBuffers::bytes() const
{
    std::size_t bytes = gradient.size() * sizeof(float);
    for (const auto& memory : shared_)
        bytes += memory->bytes() / static_cast<std::size_t>(node_->size());
    return static_cast<std::int64_t>(bytes) + weights.bytes();
}

} // namespace selm
