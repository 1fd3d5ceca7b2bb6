#include "aten_engine.hpp"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/InferenceMode.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "aten_kv_cache.hpp"
#include "aten_view.hpp"
#include "engines.hpp"
#include "selm/base/scope_end.hpp"

namespace selm {

using aten::view;

/// Bytes handed out by allocate(); outlives the engine as long as a tensor does.
struct AtenEngine::Memory {
    std::int64_t now = 0;
    std::int64_t peak = 0;
    std::int64_t allocations = 0;
};

namespace {

/// The BLAS computes a row alike in all products of at least this many rows (measured: below 4 it does not).
constexpr std::int64_t fewest_rows = 8;
/// Rows of logits that exist at a time.
constexpr std::int64_t head_chunk = 128;
/// Floats; for small matrices the BLAS takes other kernels at other alignments of a row (measured: modulo 16 bytes).
constexpr std::int64_t row_alignment = 16;

/// x as a product's left side: at least fewest_rows rows, each aligned; x itself where it is so already.
at::Tensor left_side(const at::Tensor& x)
{
    const auto address = reinterpret_cast<std::uintptr_t>(x.const_data_ptr());
    const bool aligned = address % (row_alignment * sizeof(float)) == 0 && x.stride(0) % row_alignment == 0;
    if (!x.is_cpu() || (aligned && x.size(0) >= fewest_rows))
        return x;
    const std::int64_t rows = std::max(x.size(0), fewest_rows);
    const std::int64_t stride = (x.size(1) + row_alignment - 1) / row_alignment * row_alignment;
    at::Tensor out = at::empty({rows, stride}, x.options()).narrow(1, 0, x.size(1));
    out.narrow(0, 0, x.size(0)).copy_(x);
    out.narrow(0, x.size(0), rows - x.size(0)).zero_();
    return out;
}

/// a b in f32 whatever the inputs' dtype.
at::Tensor product_f32(const at::Tensor& a, const at::Tensor& b)
{
    return a.scalar_type() == at::kFloat ? at::mm(a, b) : at::mm(a, b, at::kFloat);
}

/// x w^T for one output, [T, 1]: the BLAS would multiply a matrix with a vector, in blocks of rows, and a row's bits would
/// depend on the others.
at::Tensor sum_rows(const at::Tensor& x, const at::Tensor& w) { return x.to(at::kFloat).mul(w).sum({1}, true); }

/// y = x w^T.
void multiply_into(const at::Tensor& x, const at::Tensor& w, at::Tensor y)
{
    if (w.size(0) == 1 && x.is_cpu()) {
        y.copy_(sum_rows(x, w));
        return;
    }
    const at::Tensor rows = left_side(x.to(w.scalar_type()));
    if (rows.size(0) == y.size(0) && y.scalar_type() == rows.scalar_type())
        at::mm_out(y, rows, w.t());
    else if (y.scalar_type() == at::kFloat)
        y.copy_(product_f32(rows, w.t()).narrow(0, 0, y.size(0)));
    else
        y.copy_(at::mm(rows, w.t()).narrow(0, 0, y.size(0)));
}

void expect_product(const Tensor& x, const PackedWeight& w, const Tensor& y)
{
    SELM_EXPECT(x.rows == y.rows && x.columns == w.inputs && y.columns == w.outputs);
}

/// Logits of up to head_chunk rows. The buffer's stride exceeds the vocabulary: see the class comment.
class LogitsBuffer {
  public:
    explicit LogitsBuffer(const at::Tensor& weight)
        : weight_(weight), vocabulary_(weight.size(0)),
          buffer_(at::empty({head_chunk, vocabulary_ + 16}, weight.options().dtype(at::kFloat)))
    {
    }
    at::Tensor compute(const at::Tensor& h)
    {
        at::Tensor logits = buffer_.narrow(0, 0, h.size(0)).narrow(1, 0, vocabulary_);
        multiply_into(h, weight_, logits);
        return logits;
    }

  private:
    at::Tensor weight_;
    std::int64_t vocabulary_;
    at::Tensor buffer_;
};

void expect_targets(std::span<const std::int32_t> targets, std::int64_t vocabulary)
{
    for (const std::int32_t target : targets)
        SELM_EXPECT(target >= 0 && target < vocabulary);
}

/// log-sum-exp and log-probs of a chunk; the logits are overwritten.
void score_chunk(at::Tensor logits, std::span<const std::int32_t> targets, Device device, std::span<float> log_probs,
                 std::span<float> lse)
{
    const at::Tensor index = aten::index_tensor(targets, device).to(at::kLong).unsqueeze(1);
    const at::Tensor largest_at = logits.amax({1}, true);
    logits.sub_(largest_at);
    const at::Tensor target = logits.gather(1, index).squeeze(1).cpu();
    const at::Tensor largest = largest_at.squeeze(1).cpu();
    const at::Tensor sum = logits.exp_().sum(1).cpu();
    // The logarithm is taken here, one by one: ATen's vector log has scalar tails.
    for (std::size_t i = 0; i < targets.size(); ++i) {
        const double log_sum = std::log(static_cast<double>(sum.const_data_ptr<float>()[i]));
        log_probs[i] = static_cast<float>(static_cast<double>(target.const_data_ptr<float>()[i]) - log_sum);
        lse[i] = static_cast<float>(static_cast<double>(largest.const_data_ptr<float>()[i]) + log_sum);
    }
}

} // namespace

AtenEngine::AtenEngine(const EngineOptions& options, aten::Parts parts)
    : memory_(std::make_shared<Memory>()), device_(options.device),
      activation_(options.device == Device::cpu ? DType::f32 : options.activation), threads_(options.threads),
      parts_(std::move(parts))
{
    SELM_EXPECT(options.threads >= 1);
    SELM_EXPECT(!parts_.recorder || parts_.cached_attention); // what else a step does is decided on the host
    at::set_num_threads(options.threads);
}

AtenEngine::~AtenEngine() = default;

std::string AtenEngine::description() const
{
    return cat("aten (LibTorch ", TORCH_VERSION, ", ", device_ == Device::cpu ? at::get_cpu_capability() : "CUDA",
               device_ == Device::cpu ? "" : parts_.packed_attention ? ", flash attention" : ", attention by products of f32",
               ", ", threads_, threads_ == 1 ? " thread)" : " threads)");
}

// --- memory ---------------------------------------------------------------------------------------------------------

Tensor AtenEngine::allocate(std::int64_t rows, std::int64_t columns, DType dtype)
{
    SELM_EXPECT(rows >= 0 && columns >= 0);
    const c10::InferenceMode no_autograd;
    auto block =
        at::empty({rows, columns}, at::TensorOptions(aten::scalar_type(dtype)).device(aten::at_device(device_)));
    const auto bytes = rows * columns * static_cast<std::int64_t>(size_of(dtype));
    memory_->now += bytes;
    ++memory_->allocations;
    memory_->peak = std::max(memory_->peak, memory_->now);
    void* data = block.data_ptr();
    std::shared_ptr<void> storage(data, [block, bytes, memory = memory_](void*) { memory->now -= bytes; });
    return {std::move(storage), data, rows, columns, columns, dtype, device_};
}

std::int64_t AtenEngine::allocated_bytes() const { return memory_->now; }
std::int64_t AtenEngine::peak_allocated_bytes() const { return memory_->peak; }

void AtenEngine::fill_zero(const Tensor& x)
{
    const c10::InferenceMode no_autograd;
    if (!x.empty())
        view(x).zero_();
}

void AtenEngine::copy_from_host(const void* host, const Tensor& to)
{
    const c10::InferenceMode no_autograd;
    if (!to.empty())
        view(to).copy_(
            view({nullptr, const_cast<void*>(host), to.rows, to.columns, to.columns, to.dtype, Device::cpu}));
}

void AtenEngine::copy_to_host(const Tensor& from, void* host)
{
    const c10::InferenceMode no_autograd;
    if (!from.empty())
        view({nullptr, host, from.rows, from.columns, from.columns, from.dtype, Device::cpu}).copy_(view(from));
}

// --- linear layers --------------------------------------------------------------------------------------------------

std::int64_t AtenEngine::packed_elements(std::int64_t outputs, std::int64_t inputs, bool) const
{
    return device_ == Device::cpu ? outputs * inputs : 0; // device weights are in the activation dtype, made by pack
}

PackedWeight AtenEngine::pack(const Tensor& weight, bool with_backward, const Tensor& storage, bool already_packed)
{
    const c10::InferenceMode no_autograd;
    PackedWeight out;
    out.outputs = weight.rows;
    out.inputs = weight.columns;
    if (storage.empty()) {
        SELM_EXPECT(!already_packed);
        out.forward = allocate(weight.rows, weight.columns, activation_);
    } else {
        SELM_EXPECT(device_ == Device::cpu && storage.rows * storage.columns >= weight.rows * weight.columns);
        out.forward = storage;
        out.forward.rows = weight.rows;
        out.forward.columns = weight.columns;
        out.forward.stride = weight.columns;
    }
    if (!already_packed)
        view(out.forward).copy_(view(weight)); // bf16 to f32 is exact
    if (with_backward)
        out.backward = out.forward;
    return out;
}

void AtenEngine::linear(const Tensor& x_TK, const PackedWeight& w, const Tensor& y_TN)
{
    expect_product(x_TK, w, y_TN);
    const c10::InferenceMode no_autograd;
    if (x_TK.rows > 0)
        multiply_into(view(x_TK), view(w.forward), view(y_TN));
}

void AtenEngine::linear_add(const Tensor& x_TK, const PackedWeight& w, const Tensor& y_TN)
{
    expect_product(x_TK, w, y_TN);
    SELM_EXPECT(y_TN.dtype == DType::f32);
    const c10::InferenceMode no_autograd;
    if (x_TK.rows == 0)
        return;
    if (w.outputs == 1 && device_ == Device::cpu)
        view(y_TN).add_(sum_rows(view(x_TK), view(w.forward)));
    else
        view(y_TN).add_(product_f32(left_side(view(x_TK)), view(w.forward).t()).narrow(0, 0, x_TK.rows));
}

void AtenEngine::linear_bias(const Tensor& x_TK, const PackedWeight& w, const Tensor& bias, const Tensor& y_TN)
{
    SELM_EXPECT(bias.rows == 1 && bias.columns == w.outputs);
    linear(x_TK, w, y_TN);
    const c10::InferenceMode no_autograd;
    if (x_TK.rows > 0)
        view(y_TN).add_(view(bias));
}

void AtenEngine::linear_backward_input(const Tensor& dy_TN, const PackedWeight& w, const Tensor& dx_TK)
{
    expect_product(dx_TK, w, dy_TN);
    SELM_EXPECT(!w.backward.empty());
    const c10::InferenceMode no_autograd;
    if (dy_TN.rows > 0)
        multiply_into(view(dy_TN), view(w.backward).t(), view(dx_TK));
}

void AtenEngine::linear_backward_weight(const Tensor& dy_TN, const Tensor& x_TK, const Tensor& dw_NK)
{
    SELM_EXPECT(dy_TN.rows == x_TK.rows && dw_NK.rows == dy_TN.columns && dw_NK.columns == x_TK.columns);
    SELM_EXPECT(dw_NK.dtype == DType::f32);
    const c10::InferenceMode no_autograd;
    if (x_TK.rows == 0)
        return;
    const at::Tensor dy_t = view(dy_TN).t();
    if (x_TK.dtype == DType::f32)
        view(dw_NK).addmm_(dy_t, view(x_TK));
    else
        view(dw_NK).add_(product_f32(dy_t, view(x_TK)));
}

// --- output head ----------------------------------------------------------------------------------------------------

void AtenEngine::logits(const Tensor& h_RH, const PackedWeight& head, const Tensor& logits_RV)
{
    expect_product(h_RH, head, logits_RV);
    SELM_EXPECT(logits_RV.dtype == DType::f32);
    const c10::InferenceMode no_autograd;
    if (h_RH.rows > 0)
        multiply_into(view(h_RH), view(head.forward), view(logits_RV));
}

void AtenEngine::head_log_probs(const Tensor& h_RH, const PackedWeight& head, std::span<const std::int32_t> targets,
                                std::span<float> log_probs, std::span<float> lse)
{
    const auto rows = static_cast<std::size_t>(h_RH.rows);
    SELM_EXPECT(h_RH.columns == head.inputs && targets.size() == rows && log_probs.size() == rows &&
                lse.size() == rows);
    expect_targets(targets, head.outputs);
    const c10::InferenceMode no_autograd;
    if (rows == 0)
        return;
    LogitsBuffer buffer(view(head.forward));
    for (std::int64_t begin = 0; begin < h_RH.rows; begin += head_chunk) {
        const std::int64_t count = std::min(head_chunk, h_RH.rows - begin);
        const auto first = static_cast<std::size_t>(begin);
        const auto n = static_cast<std::size_t>(count);
        score_chunk(buffer.compute(view(h_RH.slice_rows(begin, count))), targets.subspan(first, n), device_,
                    log_probs.subspan(first, n), lse.subspan(first, n));
    }
}

void AtenEngine::head_log_probs_backward(const Tensor& h_RH, const PackedWeight& head,
                                         std::span<const std::int32_t> targets, std::span<const float> lse,
                                         std::span<const float> g, const Tensor& dh_RH, const Tensor& dw_VH)
{
    const auto rows = static_cast<std::size_t>(h_RH.rows);
    SELM_EXPECT(h_RH.columns == head.inputs && targets.size() == rows && lse.size() == rows && g.size() == rows);
    SELM_EXPECT(dh_RH.rows == h_RH.rows && dh_RH.columns == head.inputs && !head.backward.empty());
    SELM_EXPECT(dw_VH.empty() || (dw_VH.rows == head.outputs && dw_VH.columns == head.inputs));
    expect_targets(targets, head.outputs);
    const c10::InferenceMode no_autograd;
    if (rows == 0)
        return;
    const at::Tensor weight = view(head.backward);
    LogitsBuffer buffer(weight);
    for (std::int64_t begin = 0; begin < h_RH.rows; begin += head_chunk) {
        const std::int64_t count = std::min(head_chunk, h_RH.rows - begin);
        const auto first = static_cast<std::size_t>(begin);
        const auto n = static_cast<std::size_t>(count);
        const at::Tensor h = view(h_RH.slice_rows(begin, count));
        const at::Tensor index = aten::index_tensor(targets.subspan(first, n), device_).to(at::kLong).unsqueeze(1);
        const at::Tensor minus_g = aten::float_tensor(g.subspan(first, n), device_).neg().unsqueeze(1);
        at::Tensor d = buffer.compute(h);
        d.sub_(aten::float_tensor(lse.subspan(first, n), device_).unsqueeze(1));
        // d logits = g (onehot - softmax); 1 - p of the target without cancellation.
        const at::Tensor at_target = d.gather(1, index).expm1().mul(minus_g);
        d.exp_().mul_(minus_g).scatter_(1, index, at_target);
        const at::Tensor d_logits = d.to(weight.scalar_type());
        view(dh_RH.slice_rows(begin, count)).copy_(at::mm(d_logits, weight));
        if (dw_VH.empty())
            continue;
        if (weight.scalar_type() == at::kFloat)
            view(dw_VH).addmm_(d_logits.t(), h);
        else
            view(dw_VH).add_(product_f32(d_logits.t(), h));
    }
}

// --- repeated steps -------------------------------------------------------------------------------------------------

at::Tensor AtenEngine::index(std::span<const std::int32_t> values) const
{
    if (step_ != nullptr && values.data() == step_->tokens.data())
        return step_inputs_.select(0, 0);
    if (step_ != nullptr && values.data() == step_->positions.data())
        return step_inputs_.select(0, 1);
    return aten::index_tensor(values, device_);
}

at::Tensor AtenEngine::index(std::span<const std::int64_t> values) const
{
    return step_ != nullptr && values.data() == step_->rows.data() ? step_inputs_.select(0, 3) : aten::index_tensor(values, device_);
}

std::int64_t AtenEngine::step_rows(std::int64_t rows) const
{
    // Few numbers of rows mean few recordings.
    constexpr std::int64_t tile = 8;
    if (!parts_.recorder || rows <= 2)
        return rows;
    return rows <= 4 ? 4 : (rows + tile - 1) / tile * tile;
}

void AtenEngine::run_step(const SingleTokenStep& step, KvCache& cache, const std::function<void()>& body)
{
    const std::size_t rows = step.tokens.size();
    SELM_EXPECT(step_ == nullptr && step.positions.size() == rows && step.spans.size() == rows && step.rows.size() == rows);
    if (!parts_.recorder || rows == 0) {
        body();
        return;
    }
    const c10::InferenceMode no_autograd;
    RecordedStep& recorded = dynamic_cast<AtenKvCache&>(cache).recorded_step(static_cast<std::int64_t>(rows));
    std::vector<std::int32_t> inputs(step.tokens.begin(), step.tokens.end());
    inputs.insert(inputs.end(), step.positions.begin(), step.positions.end());
    for (const CachedSpan& span : step.spans)
        inputs.push_back(static_cast<std::int32_t>(span.slot));
    for (const std::int64_t row : step.rows)
        inputs.push_back(static_cast<std::int32_t>(row));
    const at::Tensor host = aten::index_tensor(inputs, Device::cpu).view({4, static_cast<std::int64_t>(rows)});
    if (!recorded.inputs.defined())
        recorded.inputs = at::empty(host.sizes(), host.options().device(aten::at_device(device_)));
    recorded.inputs.copy_(host);

    // A recorder may keep it: all it refers to stays where it is as long as the cache.
    const auto run = [this, &recorded, step, body] {
        step_ = &step;
        step_inputs_ = recorded.inputs;
        const ScopeEnd end([this] {
            step_ = nullptr;
            step_inputs_ = at::Tensor();
        });
        body();
    };
    const bool nothing_moved = recorded.has_run && recorded.allocations == memory_->allocations;
    if (!nothing_moved) {
        // The first run allocates, and lets libraries prepare what they cannot while the device records.
        recorded.recording.reset();
        run();
        recorded.has_run = true;
        recorded.allocations = memory_->allocations;
        return;
    }
    if (!recorded.recording) {
        recorded.recording = parts_.recorder->record(run);
        SELM_EXPECT(recorded.allocations == memory_->allocations);
    }
    recorded.recording->replay();
}

// --- factory --------------------------------------------------------------------------------------------------------

std::unique_ptr<Engine> make_aten_engine(const EngineOptions& options)
{
    if (options.device == Device::cuda) {
#ifdef SELM_ENABLE_CUDA
        if (at::detail::getCUDAHooks().deviceCount() == 0)
            throw config_error(
                "--device cuda: no CUDA device is visible (no GPU, no driver, or CUDA_VISIBLE_DEVICES hides it). "
                "Run on a node with a GPU, or pass --device cpu");
#else
        throw config_error("--device cuda: this build has no CUDA device path (SELM_ENABLE_CUDA is off). "
                           "Build the preset \"cuda\", or pass --device cpu");
#endif
    }
#ifdef SELM_ENABLE_CUDA
    if (options.device == Device::cuda)
        return std::make_unique<AtenEngine>(options, aten::make_cuda_parts(options.activation));
#endif
    return std::make_unique<AtenEngine>(options);
}

} // namespace selm

extern "C" selm::Engine* selm_make_aten_engine(const selm::EngineOptions& options)
{
    return selm::make_aten_engine(options).release();
}

extern "C" selm::Engine* selm_make_aten_engine_of(const selm::EngineOptions& options, selm::aten::Parts& parts)
{
    return new selm::AtenEngine(options, std::move(parts));
}
