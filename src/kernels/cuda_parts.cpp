#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAGraph.h>
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <memory>
#include <utility>

#include "aten_parts.hpp"
#include "cuda_launch.hpp"
#include "selm/base/error.hpp"

namespace selm::aten {
namespace {

void* current_stream()
{
    return at::cuda::getCurrentCUDAStream().stream();
}

void check_launch(const char* problem, const char* action)
{
    if (problem != nullptr)
        throw internal_error(cat("CUDA cannot start ", action, " (", problem, ")"));
}

/// ATen's deterministic algorithms, for the life of the object; FlashAttention looks at the same setting, and takes "warn only" as a no.
/// Memory is not filled meanwhile, which belongs to that setting otherwise.
class Deterministic {
  public:
    Deterministic()
        : was_(at::globalContext().deterministicAlgorithms()), warned_(at::globalContext().deterministicAlgorithmsWarnOnly()),
          filled_(at::globalContext().deterministicFillUninitializedMemory())
    {
        at::globalContext().setDeterministicAlgorithms(true, false);
        at::globalContext().setDeterministicFillUninitializedMemory(false);
    }
    ~Deterministic()
    {
        at::globalContext().setDeterministicAlgorithms(was_, warned_);
        at::globalContext().setDeterministicFillUninitializedMemory(filled_);
    }
    Deterministic(const Deterministic&) = delete;
    Deterministic& operator=(const Deterministic&) = delete;

  private:
    bool was_, warned_, filled_;
};

/// LibTorch's FlashAttention-2, of bf16.
class FlashAttention final : public PackedAttention {
  public:
    Result forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const PackedSequences& s, float scale) override
    {
        auto [out, lse, random_state, unused, mask] =
            at::_flash_attention_forward(q, k, v, s.query_begin, s.key_begin, s.longest_query, s.longest_key, no_dropout, true,
                                         false, static_cast<double>(scale));
        return {out, lse};
    }

    Gradients backward(const at::Tensor& d_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const at::Tensor& out, const at::Tensor& lse, const PackedSequences& s, float scale) override
    {
        const Deterministic guard;
        if (!random_state_.defined()) { // of dropout, which there is none of
            random_state_ = at::empty({2}, q.options().dtype(at::kUInt64));
            unused_ = at::empty({}, q.options().dtype(at::kUInt64));
        }
        auto [dq, dk, dv] = at::_flash_attention_backward(d_out, q, k, v, out, lse.contiguous(), s.query_begin, s.key_begin,
                                                          s.longest_query, s.longest_key, no_dropout, true, random_state_, unused_,
                                                          static_cast<double>(scale));
        return {dq, dk, dv};
    }

  private:
    static constexpr double no_dropout = 0;
    at::Tensor random_state_, unused_;
};

/// This project's kernels (cuda_cached_attention.cuh), of f32 or bf16.
class CudaCachedAttention final : public CachedAttention {
  public:
    void append(const at::Tensor& qkv, const AttentionShape& shape, const CacheLayer& cache, const CachedRows& rows) override
    {
        check_launch(cuda::launch_append_to_cache(call_of(qkv, shape, cache, rows), current_stream()), "the copy into the cache");
    }

    void attend(const at::Tensor& qkv, const AttentionShape& shape, const CacheLayer& cache, const CachedRows& rows,
                std::int64_t longest, const at::Tensor& out) override
    {
        SELM_EXPECT(out.scalar_type() == qkv.scalar_type());
        const cuda::CachedCall call = call_of(qkv, shape, cache, rows);
        const std::int64_t splits = cuda::cached_splits(longest);
        at::Tensor partial = at::empty({cuda::cached_partial_elements(call, splits)}, qkv.options().dtype(at::kFloat));
        check_launch(cuda::launch_cached_attention(call, splits, partial.mutable_data_ptr<float>(), out.mutable_data_ptr(),
                                                   out.stride(0), current_stream()),
                     "attention to the cache");
    }

  private:
    static const std::int32_t* list(const at::Tensor& x)
    {
        SELM_EXPECT(x.is_contiguous());
        return x.const_data_ptr<std::int32_t>();
    }

    static cuda::CachedCall call_of(const at::Tensor& qkv, const AttentionShape& shape, const CacheLayer& cache,
                                    const CachedRows& rows)
    {
        SELM_EXPECT(cache.keys.is_contiguous() && cache.values.is_contiguous());
        SELM_EXPECT(cache.keys.scalar_type() == qkv.scalar_type() && rows.row.size(0) == rows.slot.size(0) &&
                    rows.row.size(0) == rows.position.size(0));
        return {.is_bf16 = qkv.scalar_type() == at::kBFloat16,
                .heads = shape.heads,
                .kv_heads = shape.kv_heads,
                .head_dim = shape.head_dim,
                .scale = shape.scale,
                .row = list(rows.row),
                .slot = list(rows.slot),
                .position = list(rows.position),
                .count = rows.row.size(0),
                .qkv = qkv.const_data_ptr(),
                .stride = qkv.stride(0),
                .keys = cache.keys.mutable_data_ptr(),
                .values = cache.values.mutable_data_ptr(),
                .capacity = cache.keys.size(1)};
    }
};

class Graph final : public Recording {
  public:
    /// @param pool memory that all graphs of a recorder share: they run one after another.
    Graph(at::cuda::MempoolId_t pool, const std::function<void()>& body)
    {
        // The default stream cannot be captured.
        const at::cuda::CUDAStream stream = at::cuda::getStreamFromPool();
        at::cuda::getCurrentCUDAStream().synchronize();
        const c10::cuda::CUDAStreamGuard guard(stream);
        graph_.capture_begin(pool);
        try {
            body();
        } catch (...) {
            try {
                graph_.capture_end(); // else no stream of the process could be captured any more
            } catch (...) { // NOLINT: the first error says what happened
            }
            throw;
        }
        graph_.capture_end();
    }
    void replay() override { graph_.replay(); }

  private:
    at::cuda::CUDAGraph graph_;
};

class GraphRecorder final : public Recorder {
  public:
    std::unique_ptr<Recording> record(const std::function<void()>& body) override { return std::make_unique<Graph>(pool_, body); }

  private:
    at::cuda::MempoolId_t pool_ = at::cuda::graph_pool_handle();
};

} // namespace

Parts make_cuda_parts(DType activation)
{
    Parts parts;
    if (activation == DType::bf16)
        parts.packed_attention = std::make_unique<FlashAttention>();
    parts.cached_attention = std::make_unique<CudaCachedAttention>();
    parts.recorder = std::make_unique<GraphRecorder>();
    return parts;
}

} // namespace selm::aten
