#pragma once

#include <cstdint>

#include "selm/kernels/engine.hpp"

namespace selm {

/// Memory reused from call to call; grows to the largest request and then stays.
class Buffer {
  public:
    Tensor view(Engine& engine, std::int64_t rows, std::int64_t columns, DType dtype)
    {
        const std::int64_t elements = rows * columns;
        if (memory_.columns < elements || memory_.dtype != dtype) {
            memory_ = {}; // the old memory goes first
            memory_ = engine.allocate(1, elements, dtype);
        }
        Tensor out = memory_;
        out.rows = rows;
        out.columns = out.stride = columns;
        return out;
    }

  private:
    Tensor memory_;
};

} // namespace selm
