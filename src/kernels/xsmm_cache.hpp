#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <sys/mman.h>

#include "selm/base/error.hpp"
#include "selm/kernels/engine.hpp"
#include "xsmm_attention.hpp"
#include "xsmm_blocks.hpp"
#include "xsmm_gemm.hpp"

namespace selm::xsmm {

/**
 * Per layer, slot and key/value head: keys as transposed blocks [capacity/64][D][64], then values [capacity][D]. In bf16
 * (pairs, see bf16_rows.hpp): keys [capacity/64][D/2][64], values [capacity/2][D].
 * The memory is address space until it is written: the kernel supplies pages one by one.
 */
class XsmmKvCache final : public KvCache {
  public:
    XsmmKvCache(std::int64_t layers, std::int64_t slots, std::int64_t capacity, const AttentionShape& shape,
                bool is_bf16) :
        layers_(layers), slots_(slots), capacity_(capacity), kv_heads_(shape.kv_heads), head_dim_(shape.head_dim),
        pair_(is_bf16 ? 2 : 1), head_floats_(2 / pair_ * blocks_of(capacity) * tile * shape.head_dim)
    {
        SELM_EXPECT(layers >= 1 && slots >= 1 && capacity >= 1 && kv_heads_ >= 1 && head_dim_ >= 1);
        bytes_ = static_cast<std::size_t>(layers * slots * kv_heads_ * head_floats_) * sizeof(float) + 4096;
        void* memory =
            mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        SELM_VALIDATE(memory != MAP_FAILED, ExitCode::io,
                      "the address space of the key/value cache could not be reserved ("
                          << bytes_ << " bytes for " << slots << " slots of " << capacity
                          << " tokens: " << std::strerror(errno) << "). Use fewer slots or a shorter maximum length");
        data_ = static_cast<float*>(memory);
    }
    ~XsmmKvCache() override { munmap(data_, bytes_); }
    XsmmKvCache(const XsmmKvCache&) = delete;
    XsmmKvCache& operator=(const XsmmKvCache&) = delete;

    std::int64_t slots() const override { return slots_; }
    std::int64_t capacity() const override { return capacity_; }

    /// Blocks of 64 transposed keys of one head.
    float* keys(std::int64_t layer, std::int64_t slot, std::int64_t kv_head) const
    {
        return data_ + ((layer * slots_ + slot) * kv_heads_ + kv_head) * head_floats_;
    }
    float* values(std::int64_t layer, std::int64_t slot, std::int64_t kv_head) const
    {
        return keys(layer, slot, kv_head) + head_floats_ / 2;
    }

    /// The first positions (even) of a slot are those of another.
    void copy_prefix(std::int64_t layer, std::int64_t from, std::int64_t to, std::int64_t positions) const
    {
        const std::int64_t rows = head_dim_ / pair_, whole = positions / tile * tile, rest = positions % tile;
        for (std::int64_t kv = 0; kv < kv_heads_; ++kv) {
            const float* const keys_from = keys(layer, from, kv);
            float* const keys_to = keys(layer, to, kv);
            std::copy_n(keys_from, whole * rows, keys_to);
            for (std::int64_t row = 0; row < rows; ++row)
                std::copy_n(keys_from + whole * rows + row * tile, rest, keys_to + whole * rows + row * tile);
            std::copy_n(values(layer, from, kv), positions / pair_ * head_dim_, values(layer, to, kv));
        }
    }

    bool fits(const AttentionShape& shape, std::int64_t layer) const
    {
        return shape.kv_heads == kv_heads_ && shape.head_dim == head_dim_ && layer >= 0 && layer < layers_;
    }

  private:
    std::int64_t layers_, slots_, capacity_, kv_heads_, head_dim_, pair_, head_floats_;
    std::size_t bytes_ = 0;
    float* data_ = nullptr;
};

/// Query heads that share one key/value head, at most.
constexpr std::int64_t max_group = 64;

/// Scores of a decoded token against 64 keys. The heads of a group are neighbours in the token's row: rows of one small matrix,
/// which share every load of the keys.
inline GemmShape decode_score_shape(std::int64_t group, std::int64_t head_dim, std::int64_t score_stride, bool is_bf16)
{
    return {.m = tile,
            .n = narrow(group),
            .k = narrow(head_dim),
            .lda = tile,
            .ldb = narrow(head_dim),
            .ldc = narrow(score_stride),
            .accumulate = false,
            .bf16 = is_bf16};
}

} // namespace selm::xsmm
