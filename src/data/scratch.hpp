#pragma once

#include <cstddef>
#include <memory>
#include <span>

namespace selm {

/// Memory that serves one column after another: pages that were touched once are not paid for again.
class Scratch {
  public:
    /// @p bytes of undefined content; what was taken before is gone.
    std::span<std::byte> take(std::size_t bytes)
    {
        if (bytes > capacity_) {
            data_.reset();
            data_ = std::make_unique_for_overwrite<std::byte[]>(bytes);
            capacity_ = bytes;
        }
        return {data_.get(), bytes};
    }

  private:
    std::unique_ptr<std::byte[]> data_;
    std::size_t capacity_ = 0;
};

} // namespace selm
