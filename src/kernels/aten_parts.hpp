#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>

#include "selm/kernels/engine.hpp"

// What a device computes for the aten engine better than ATen's products and softmax do. The engine without parts (CPU) uses
// those. Private to src/kernels; tests give the engine parts that compute on the CPU.
namespace selm::aten {

/**
 * @brief Sequences that lie one behind the other. Sequence i has queries [query_begin[i], query_begin[i+1]) and keys
 * [key_begin[i], key_begin[i+1]), at least as many: its last query sees all of its keys, the one before all but the last, and
 * so on.
 */
struct PackedSequences {
    at::Tensor query_begin; ///< i32 [sequences + 1], on the device
    at::Tensor key_begin;   ///< i32 [sequences + 1], on the device
    std::int64_t longest_query = 0, longest_key = 0;
};

/// Attention without a matrix of scores in memory (Dao, FlashAttention-2, 2023).
class PackedAttention {
  public:
    virtual ~PackedAttention() = default;
    struct Result {
        at::Tensor out; ///< [Tq, NH, D]
        at::Tensor lse; ///< f32 [NH, Tq]
    };
    struct Gradients {
        at::Tensor q, k, v;
    };
    /// @param q [Tq, NH, D], rows may lie apart. @param k, v [Tk, NK, D].
    virtual Result forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const PackedSequences& sequences,
                           float scale) = 0;
    /// Deterministic. @param out, lse of forward. @return of q's, k's and v's shapes.
    virtual Gradients backward(const at::Tensor& d_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const at::Tensor& out, const at::Tensor& lse, const PackedSequences& sequences, float scale) = 0;
};

/// Rows of a step's matrices, each the token at `position` of the sequence in `slot`; a slot of -1: of no sequence. i32 [n]
/// each, on the device.
struct CachedRows {
    at::Tensor row, slot, position;
};

/// One layer of a KvCache: [slots, capacity, NK, D], contiguous.
struct CacheLayer {
    at::Tensor keys, values;
};

/// Attention of single tokens to what is cached of their sequences. Uses the lists on the device alone, so that a recorded call
/// follows their contents.
class CachedAttention {
  public:
    virtual ~CachedAttention() = default;
    /// Keys and values of qkv [T, QKV] into the cache; rows of no sequence are left out.
    virtual void append(const at::Tensor& qkv, const AttentionShape& shape, const CacheLayer& cache, const CachedRows& rows) = 0;
    /// out [T, NH*D] at the rows; zeros at rows of no sequence. A row's bits do not depend on others.
    /// @param longest positions lie below it.
    virtual void attend(const at::Tensor& qkv, const AttentionShape& shape, const CacheLayer& cache, const CachedRows& rows,
                        std::int64_t longest, const at::Tensor& out) = 0;
};

/// Device work that can be done again.
class Recording {
  public:
    virtual ~Recording() = default;
    virtual void replay() = 0;
};

class Recorder {
  public:
    virtual ~Recorder() = default;
    /// What `body` lets the device do is recorded, not done. Memory that body takes from ATen belongs to the recording.
    virtual std::unique_ptr<Recording> record(const std::function<void()>& body) = 0;
};

/// Each may be missing.
struct Parts {
    std::unique_ptr<PackedAttention> packed_attention;
    std::unique_ptr<CachedAttention> cached_attention;
    std::unique_ptr<Recorder> recorder;
};

/// Of the current CUDA device. @param activation packed attention takes bf16 alone.
Parts make_cuda_parts(DType activation);

} // namespace selm::aten

/// For tests: an engine of these parts, which it takes over. The caller owns the engine.
extern "C" selm::Engine* selm_make_aten_engine_of(const selm::EngineOptions& options, selm::aten::Parts& parts);
