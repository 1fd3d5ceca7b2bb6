#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace selm::xsmm {

/**
 * @brief Counted blocks of 64-byte aligned memory; freed large blocks are kept for the next request of their size
 * class, because the kernel clears every page that a process gets anew (a training step would clear gigabytes).
 *
 * Counted are the bytes asked for; what a size class adds to them is never touched. Blocks in use and kept blocks
 * together never exceed the most that was in use. Blocks may outlive the pool's owner.
 */
class MemoryPool {
  public:
    MemoryPool();
    /// At least `bytes` readable bytes plus 256: vector code may read (not write) a little past the end.
    std::shared_ptr<void> allocate(std::size_t bytes);
    std::int64_t allocated_bytes() const;
    std::int64_t peak_allocated_bytes() const;

  private:
    struct State;
    std::shared_ptr<State> state_;
};

/// Grow-only scratch memory of one operation, reused from call to call; contents are lost when it grows.
class Scratch {
  public:
    /// At least `floats` floats, 64-byte aligned, uninitialised.
    float* get(std::int64_t floats);

  private:
    std::shared_ptr<void> memory_;
    std::int64_t capacity_ = 0;
};

} // namespace selm::xsmm
