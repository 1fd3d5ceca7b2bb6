#pragma once

#include "cuda_emulation.hpp"

#include "cuda_cached_attention.cuh"

#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros_like.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <dlfcn.h>

#include "aten_parts.hpp"

// The parts that the aten engine has on CUDA devices, on the CPU: attention that its FlashAttention would compute, sequence by
// sequence with matrices of scores; this project's kernels, emulated; and a recorder that repeats what the host did.
namespace selm::test {

class PackedAttentionOnCpu final : public aten::PackedAttention {
  public:
    Result forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const aten::PackedSequences& s,
                   float scale) override
    {
        Result result{at::empty(q.sizes(), q.options()), at::empty({q.size(1), q.size(0)}, q.options())};
        for_each(q, k, s, [&](std::int64_t q_begin, std::int64_t n, std::int64_t k_begin, std::int64_t m) {
            const at::Tensor scores = scores_of(q.narrow(0, q_begin, n), k.narrow(0, k_begin, m), scale);
            const at::Tensor lse = scores.logsumexp({2}); // [NH, n]
            const at::Tensor weights = scores.sub(lse.unsqueeze(2)).exp();
            result.out.narrow(0, q_begin, n).copy_(at::bmm(weights, heads_of(v.narrow(0, k_begin, m), q.size(1))).permute({1, 0, 2}));
            result.lse.narrow(1, q_begin, n).copy_(lse);
        });
        return result;
    }

    Gradients backward(const at::Tensor& d_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const at::Tensor& out, const at::Tensor& lse, const aten::PackedSequences& s, float scale) override
    {
        Gradients d{at::zeros_like(q), at::zeros_like(k), at::zeros_like(v)};
        for_each(q, k, s, [&](std::int64_t q_begin, std::int64_t n, std::int64_t k_begin, std::int64_t m) {
            const at::Tensor q_heads = q.narrow(0, q_begin, n).permute({1, 0, 2}).contiguous();
            const at::Tensor k_heads = heads_of(k.narrow(0, k_begin, m), q.size(1)), v_heads = heads_of(v.narrow(0, k_begin, m), q.size(1));
            const at::Tensor do_heads = d_out.narrow(0, q_begin, n).permute({1, 0, 2}).contiguous();
            const at::Tensor delta = d_out.narrow(0, q_begin, n).mul(out.narrow(0, q_begin, n)).sum({2}).t().unsqueeze(2);
            const at::Tensor p =
                scores_of(q.narrow(0, q_begin, n), k.narrow(0, k_begin, m), scale).sub(lse.narrow(1, q_begin, n).unsqueeze(2)).exp();
            const at::Tensor ds = at::bmm(do_heads, v_heads.transpose(1, 2)).sub(delta).mul(p).mul(static_cast<double>(scale));
            d.q.narrow(0, q_begin, n).copy_(at::bmm(ds, k_heads).permute({1, 0, 2}));
            const auto of_groups = [&](const at::Tensor& by_head) { // [NH, m, D] -> [m, NK, D]
                return by_head.view({k.size(1), -1, m, q.size(2)}).sum({1}).permute({1, 0, 2});
            };
            d.k.narrow(0, k_begin, m).copy_(of_groups(at::bmm(ds.transpose(1, 2), q_heads)));
            d.v.narrow(0, k_begin, m).copy_(of_groups(at::bmm(p.transpose(1, 2), do_heads)));
        });
        return d;
    }

  private:
    template<typename Use>
    static void for_each(const at::Tensor& q, const at::Tensor& k, const aten::PackedSequences& s, Use&& use)
    {
        const auto* const q_begin = s.query_begin.const_data_ptr<std::int32_t>();
        const auto* const k_begin = s.key_begin.const_data_ptr<std::int32_t>();
        const std::int64_t count = s.query_begin.size(0) - 1;
        require(s.query_begin.is_contiguous() && s.key_begin.is_contiguous() && s.key_begin.size(0) == count + 1, "lists");
        require(q_begin[0] == 0 && k_begin[0] == 0 && q_begin[count] == q.size(0) && k_begin[count] == k.size(0), "ends");
        for (std::int64_t i = 0; i < count; ++i) {
            const std::int64_t n = q_begin[i + 1] - q_begin[i], m = k_begin[i + 1] - k_begin[i];
            require(n >= 1 && m >= n && n <= s.longest_query && m <= s.longest_key, "lengths");
            use(q_begin[i], n, k_begin[i], m);
        }
    }

    static void require(bool holds, const char* what)
    {
        if (!holds)
            throw std::logic_error(std::string("packed attention got sequences of wrong ") + what);
    }

    /// [m, NK, D] -> [NH, m, D]
    static at::Tensor heads_of(const at::Tensor& x, std::int64_t heads)
    {
        return x.permute({1, 0, 2}).repeat_interleave(heads / x.size(1), 0);
    }

    /// [NH, n, m]; the last query sees all keys.
    static at::Tensor scores_of(const at::Tensor& q, const at::Tensor& k, float scale)
    {
        at::Tensor scores = at::bmm(q.permute({1, 0, 2}), heads_of(k, q.size(1)).transpose(1, 2)).mul(static_cast<double>(scale));
        const at::Tensor later = at::ones({q.size(0), k.size(0)}, scores.options().dtype(at::kBool)).triu(1 + k.size(0) - q.size(0));
        return scores.masked_fill(later, -std::numeric_limits<double>::infinity());
    }
};

/// The launches of cuda_cached_attention.cu, emulated. T: float or std::uint16_t (bf16).
template<typename T>
void emulate_append(const cuda::CachedArguments<T>& a)
{
    emulation::launch(cuda::append_to_cache<T>, {static_cast<unsigned>(a.rows.count)}, cuda::cached_threads, a);
}

/// @param a without splits and partial. @param splits at least those of the longest sequence.
template<typename T>
void emulate_attend(cuda::CachedArguments<T> a, std::int64_t splits, bool backwards)
{
    std::vector<float> partial(static_cast<std::size_t>(a.rows.count * a.shape.heads * splits * (a.shape.head_dim + 2)),
                               std::numeric_limits<float>::quiet_NaN());
    a.splits = splits;
    a.partial = partial.data();
    const auto rows = static_cast<unsigned>(a.rows.count);
    cuda::with_split_kernel<T>(a.shape, [&](void (*kernel)(cuda::CachedArguments<T>), std::int64_t head_blocks) {
        emulation::launch(kernel, {rows, static_cast<unsigned>(head_blocks), static_cast<unsigned>(splits)}, cuda::cached_threads,
                          a, backwards);
    });
    emulation::launch(cuda::add_splits<T>, {rows, static_cast<unsigned>(a.shape.heads)}, 64, a, backwards);
}

class CachedAttentionOnCpu final : public aten::CachedAttention {
  public:
    void append(const at::Tensor& qkv, const AttentionShape& shape, const aten::CacheLayer& cache,
                const aten::CachedRows& rows) override
    {
        emulate_append(arguments(qkv, shape, cache, rows));
    }
    void attend(const at::Tensor& qkv, const AttentionShape& shape, const aten::CacheLayer& cache, const aten::CachedRows& rows,
                std::int64_t longest, const at::Tensor& out) override
    {
        cuda::CachedArguments<float> a = arguments(qkv, shape, cache, rows);
        a.out = out.mutable_data_ptr<float>();
        a.out_stride = out.stride(0);
        emulate_attend(a, (longest + cuda::keys_per_split - 1) / cuda::keys_per_split, false);
    }

  private:
    static cuda::CachedArguments<float> arguments(const at::Tensor& qkv, const AttentionShape& shape, const aten::CacheLayer& cache,
                                                  const aten::CachedRows& rows)
    {
        if (!cache.keys.is_contiguous() || !rows.row.is_contiguous())
            throw std::logic_error("the kernels take contiguous caches and lists");
        return {.shape = {shape.heads, shape.kv_heads, shape.head_dim, shape.scale},
                .rows = {rows.row.const_data_ptr<std::int32_t>(), rows.slot.const_data_ptr<std::int32_t>(),
                         rows.position.const_data_ptr<std::int32_t>(), rows.row.size(0)},
                .qkv = qkv.const_data_ptr<float>(),
                .stride = qkv.stride(0),
                .keys = cache.keys.mutable_data_ptr<float>(),
                .values = cache.values.mutable_data_ptr<float>(),
                .capacity = cache.keys.size(1),
                .splits = 0,
                .partial = nullptr,
                .out = nullptr,
                .out_stride = 0};
    }
};

/// Repeats the host's calls with the arrays of the step that was recorded: what these hold by then must not matter.
class RepeatingRecorder final : public aten::Recorder {
  public:
    struct Counts {
        int recordings = 0, replays = 0;
    };
    explicit RepeatingRecorder(std::shared_ptr<Counts> counts) : counts_(std::move(counts)) {}
    std::unique_ptr<aten::Recording> record(const std::function<void()>& body) override
    {
        ++counts_->recordings;
        return std::make_unique<Repeated>(body, counts_);
    }

  private:
    class Repeated final : public aten::Recording {
      public:
        Repeated(std::function<void()> body, std::shared_ptr<Counts> counts) : body_(std::move(body)), counts_(std::move(counts)) {}
        void replay() override
        {
            ++counts_->replays;
            body_();
        }

      private:
        std::function<void()> body_;
        std::shared_ptr<Counts> counts_;
    };
    std::shared_ptr<Counts> counts_;
};

/// @param counts of a recorder; null: none.
inline aten::Parts parts_on_cpu(std::shared_ptr<RepeatingRecorder::Counts> counts = nullptr)
{
    aten::Parts parts;
    parts.packed_attention = std::make_unique<PackedAttentionOnCpu>();
    parts.cached_attention = std::make_unique<CachedAttentionOnCpu>();
    if (counts)
        parts.recorder = std::make_unique<RepeatingRecorder>(std::move(counts));
    return parts;
}

inline std::unique_ptr<Engine> make_aten_engine_of(aten::Parts parts)
{
#ifdef SELM_ENABLE_CUDA
    return std::unique_ptr<Engine>(::selm_make_aten_engine_of({.engine = "aten"}, parts));
#else
    make_engine({.engine = "aten"}); // loads the library; throws where that fails
    const auto library = std::filesystem::read_symlink("/proc/self/exe").parent_path().parent_path() / "lib" / "libselm_aten.so";
    const auto loaded = ::dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD); // by its path: a sanitizer's dlopen searches its own run path
    if (loaded == nullptr)
        throw std::runtime_error(::dlerror());
    const auto make = reinterpret_cast<decltype(&::selm_make_aten_engine_of)>(::dlsym(loaded, "selm_make_aten_engine_of"));
    ::dlclose(loaded); // make_engine's hold on it is for ever
    if (make == nullptr)
        throw std::runtime_error("libselm_aten.so lacks selm_make_aten_engine_of");
    return std::unique_ptr<Engine>(make({.engine = "aten"}, parts));
#endif
}

} // namespace selm::test
