#pragma once

#include <cstdint>

// Tiles of disentangled attention taken out of products with relative positions whose index is gradual: from one distance to
// the next it rises by 0 or 1. Then 16 neighbouring distances lie within 16 neighbouring numbers.
namespace selm::xsmm {

/// Whether this build has the functions below (x86-64 alone) and this CPU can run them.
bool can_take_gradual_tiles();

/// to[j * to_stride + i] = from[j * stride + index[i - j]], j below `keys`, i below `rows`. Fifteen floats behind the largest
/// index must be readable.
void take_by_key(const float* from, std::int64_t stride, const std::int32_t* index, std::int32_t keys, std::int32_t rows,
                 float* to, std::int64_t to_stride);

/// scores[i * to_stride + j] += added[i * to_stride + j] + from[i * stride - index[i - j]]. Fifteen floats behind the smallest
/// index must be readable.
void add_by_query(const float* from, std::int64_t stride, const std::int32_t* index, std::int32_t keys, std::int32_t rows,
                  const float* added, float* scores, std::int64_t to_stride);

/// The gradient of take_by_key: to[j * stride + index[i - j]] += from[j * from_stride + i]. Numbers for one place are summed first.
void sum_by_key(const float* from, std::int64_t from_stride, const std::int32_t* index, std::int32_t keys, std::int32_t rows,
                float* to, std::int64_t stride);

/// The gradient of add_by_query: to[i * stride - index[i - j]] += from[i * from_stride + j].
void sum_by_query(const float* from, std::int64_t from_stride, const std::int32_t* index, std::int32_t keys,
                  std::int32_t rows, float* to, std::int64_t stride);

} // namespace selm::xsmm
