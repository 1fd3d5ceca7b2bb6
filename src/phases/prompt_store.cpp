#include "prompt_store.hpp"

#include <algorithm>

#include "selm/base/error.hpp"
#include "selm/comm/agree.hpp"

namespace selm {

PromptStore::PromptStore(const PreferencesReader& prefs, std::int64_t begin, std::int64_t end,
                         const std::function<std::vector<std::int32_t>(std::span<const Message>)>& encode,
                         Communicator& comm)
    : begin_(begin), node_(comm.split_node("ranks that share the prompts"))
{
    const auto rows = static_cast<std::size_t>(end - begin);
    std::vector<std::int64_t> lengths(rows, 0);
    std::vector<std::vector<std::int32_t>> mine; // rows rank, rank + ranks, ... of this node
    const auto rank = static_cast<std::size_t>(node_->rank()), ranks = static_cast<std::size_t>(node_->size());
    agree(comm, "tokenising the prompts", [&] {
        for (std::size_t i = rank; i < rows; i += ranks) {
            const auto row = begin + static_cast<std::int64_t>(i);
            with_context(cat(prefs.path(), " row ", row), [&] { mine.push_back(encode(prefs.messages(row))); });
            lengths[i] = static_cast<std::int64_t>(mine.back().size());
        }
    });
    node_->all_reduce(lengths, ReduceOp::sum, "lengths of prompts");
    offsets_.assign(rows + 1, 0);
    for (std::size_t i = 0; i < rows; ++i)
        offsets_[i + 1] = offsets_[i] + lengths[i];
    agree(comm, "memory for the prompts", [&] {
        const auto bytes = static_cast<std::size_t>(std::max<std::int64_t>(offsets_.back(), 1)) * sizeof(std::int32_t);
        memory_ = std::make_unique<NodeSharedMemory>(*node_, bytes, "tokens of prompts");
    });
    auto* tokens = reinterpret_cast<std::int32_t*>(memory_->data());
    for (std::size_t i = rank, k = 0; i < rows; i += ranks, ++k)
        std::copy(mine[k].begin(), mine[k].end(), tokens + offsets_[i]);
    memory_->fence();
}

std::span<const std::int32_t> PromptStore::prompt(std::int64_t row) const
{
    const auto i = static_cast<std::size_t>(row - begin_);
    SELM_EXPECT(row >= begin_ && i + 1 < offsets_.size());
    return {reinterpret_cast<const std::int32_t*>(memory_->data()) + offsets_[i],
            static_cast<std::size_t>(offsets_[i + 1] - offsets_[i])};
}

} // namespace selm
