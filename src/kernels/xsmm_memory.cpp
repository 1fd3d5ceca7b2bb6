#include "xsmm_memory.hpp"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>

#include <sys/mman.h>

#include "selm/base/error.hpp"

namespace selm::xsmm {
namespace {

constexpr std::size_t cache_line = 64, huge_page = std::size_t{2} << 20, padding = 256;
/// From here on blocks start at a huge page and are made of huge pages, but for their end.
constexpr std::size_t smallest_huge_block = 4 << 20;
constexpr std::size_t smallest_kept_block = 256 << 10;

/// Rounded up to one of eight sizes per power of two: at most an eighth is unused (and never touched).
std::size_t size_class(std::size_t bytes)
{
    const std::size_t step = std::max<std::size_t>(cache_line, std::bit_floor(bytes) / 8);
    return (bytes + step - 1) / step * step;
}

void* allocate_aligned(std::size_t bytes)
{
    const std::size_t alignment = bytes >= smallest_huge_block ? huge_page : cache_line;
    void* block = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    SELM_VALIDATE(block != nullptr, ExitCode::io,
                  "out of memory: " << bytes
                                    << " bytes could not be allocated. Use fewer ranks per node, or a smaller "
                                       "token budget or number of slots");
    // Panels and activations are swept from end to end: large pages spare most address translations. Advice only.
    if (alignment == huge_page)
        madvise(block, bytes / huge_page * huge_page, MADV_HUGEPAGE);
    return block;
}

} // namespace

struct MemoryPool::State {
    std::mutex mutex;
    std::multimap<std::size_t, void*> kept;
    std::int64_t allocated = 0, kept_bytes = 0, peak = 0; ///< of whole blocks
    std::int64_t requested = 0, requested_peak = 0;

    ~State()
    {
        for (const auto& [size, block] : kept)
            std::free(block);
    }

    /// Frees kept blocks, largest first, until allocated + kept <= peak.
    void trim()
    {
        while (!kept.empty() && allocated + kept_bytes > peak) {
            const auto largest = std::prev(kept.end());
            kept_bytes -= static_cast<std::int64_t>(largest->first);
            std::free(largest->second);
            kept.erase(largest);
        }
    }

    void* take(std::size_t size, std::size_t bytes)
    {
        const std::lock_guard lock(mutex);
        requested += static_cast<std::int64_t>(bytes);
        requested_peak = std::max(requested_peak, requested);
        allocated += static_cast<std::int64_t>(size);
        peak = std::max(peak, allocated);
        const auto found = kept.find(size);
        if (found == kept.end()) {
            trim();
            return nullptr;
        }
        void* block = found->second;
        kept.erase(found);
        kept_bytes -= static_cast<std::int64_t>(size);
        return block;
    }

    void give_back(std::size_t size, std::size_t bytes, void* block)
    {
        const std::lock_guard lock(mutex);
        requested -= static_cast<std::int64_t>(bytes);
        allocated -= static_cast<std::int64_t>(size);
        if (size < smallest_kept_block) {
            std::free(block);
            return;
        }
        kept.emplace(size, block);
        kept_bytes += static_cast<std::int64_t>(size);
        trim();
    }
};

MemoryPool::MemoryPool() : state_(std::make_shared<State>()) {}

std::shared_ptr<void> MemoryPool::allocate(std::size_t bytes)
{
    const std::size_t size = size_class(std::max<std::size_t>(bytes, 1) + padding);
    void* block = state_->take(size, bytes);
    if (block == nullptr)
        block = allocate_aligned(size);
    return {block, [state = state_, size, bytes](void* freed) { state->give_back(size, bytes, freed); }};
}

std::int64_t MemoryPool::allocated_bytes() const
{
    return state_->requested;
}

std::int64_t MemoryPool::peak_allocated_bytes() const
{
    return state_->requested_peak;
}

float* Scratch::get(std::int64_t floats)
{
    if (floats > capacity_) {
        capacity_ = floats + floats / 4;
        memory_.reset();
        memory_ = {allocate_aligned(static_cast<std::size_t>(capacity_) * sizeof(float) + padding), std::free};
    }
    return static_cast<float*>(memory_.get());
}

} // namespace selm::xsmm
