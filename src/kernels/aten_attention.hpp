#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "aten_kv_cache.hpp"
#include "selm/kernels/engine.hpp"

// What attention by products and attention by parts share. Private to src/kernels.
namespace selm::aten {

struct Inputs {
    at::Tensor q; ///< [T, NH, D]
    at::Tensor k; ///< [T, NK, D]
    at::Tensor v; ///< [T, NK, D]
};

/// Views of qkv [T, QKV].
Inputs split(const Tensor& qkv, const AttentionShape& shape);

/// The keys and values of span.prefix_slot, where it has one, into the span's own slot.
void copy_prefix(const AtenKvCache& cache, std::int64_t layer, const CachedSpan& span);

/// A span's tokens, whose keys and values are in the cache, to their sequence up to themselves, by products. q, out [T, NH, D].
void attend_span(const at::Tensor& q, const AttentionShape& shape, const AtenKvCache& cache, std::int64_t layer,
                 const CachedSpan& span, const at::Tensor& out);

/// @throws Error configuration for heads that the parts on CUDA devices do not take.
void check_head_dim(const AttentionShape& shape);

} // namespace selm::aten
