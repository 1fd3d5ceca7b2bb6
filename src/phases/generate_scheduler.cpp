#include "selm/phases/generate_scheduler.hpp"

#include <algorithm>
#include <utility>

#include "selm/base/error.hpp"

namespace selm {
namespace {

constexpr std::uint32_t sampling_purpose = 1; // see RandomStream

std::int64_t round_up_to_tile(std::int64_t tokens)
{
    return (tokens + prefill_tile - 1) / prefill_tile * prefill_tile;
}

} // namespace

ContinuousBatch::ContinuousBatch(const Options& options, Step step)
    : options_(options), step_(std::move(step)), sampler_(options.sampling, options.allowed_ids),
      slots_(static_cast<std::size_t>(options.slots))
{
    SELM_EXPECT(options.slots >= 1);
    options_.prefill_tokens = std::max(options.prefill_tokens / prefill_tile, std::int64_t{1}) * prefill_tile;
}

std::int64_t ContinuousBatch::free_slots() const
{
    return std::count_if(slots_.begin(), slots_.end(), [](const auto& slot) { return !slot; });
}

bool ContinuousBatch::empty() const
{
    return free_slots() == options_.slots;
}

bool ContinuousBatch::wants_row() const
{
    std::int64_t unread = 0; // whole tiles, as plan_prefill() counts them
    for (const auto& slot : slots_) {
        if (slot && slot->answer.tokens.empty())
            unread += round_up_to_tile(static_cast<std::int64_t>(slot->prompt.size()) - slot->prefilled);
    }
    return unread < options_.prefill_tokens && free_slots() > 0;
}

void ContinuousBatch::add(const GenerationRow& row)
{
    SELM_EXPECT(!row.prompt.empty() && row.max_new_tokens >= 1);
    const auto free = std::find_if(slots_.begin(), slots_.end(), [](const auto& slot) { return !slot; });
    SELM_EXPECT(free != slots_.end());
    free->emplace(Slot{.prompt = row.prompt,
                       .max_new_tokens = row.max_new_tokens,
                       .arrival = arrivals_++,
                       .stream = RandomStream(options_.seed, sampling_purpose, options_.iteration,
                                              static_cast<std::uint64_t>(row.row)),
                       .answer = {.row = row.row, .tokens = {}, .log_probs = {}}});
}

void ContinuousBatch::plan()
{
    work_.clear();
    for (std::size_t i = 0; i < slots_.size(); ++i) {
        auto& slot = slots_[i];
        if (!slot || slot->answer.tokens.empty())
            continue;
        const auto position = static_cast<std::int64_t>(slot->prompt.size() + slot->answer.tokens.size()) - 1;
        work_.push_back({.slot = static_cast<std::int64_t>(i),
                         .position_begin = position,
                         .tokens = {&slot->last_token, 1},
                         .prefill = false,
                         .wants_logits = true});
    }
    plan_prefill();
}

void ContinuousBatch::plan_prefill()
{
    std::vector<std::size_t> waiting;
    for (std::size_t i = 0; i < slots_.size(); ++i) {
        if (slots_[i] && slots_[i]->answer.tokens.empty())
            waiting.push_back(i);
    }
    std::sort(waiting.begin(), waiting.end(),
              [&](std::size_t a, std::size_t b) { return slots_[a]->arrival < slots_[b]->arrival; });
    std::int64_t budget = options_.prefill_tokens;
    for (const std::size_t i : waiting) {
        Slot& slot = *slots_[i];
        const auto length = static_cast<std::int64_t>(slot.prompt.size());
        while (budget > 0 && slot.prefilled < length) {
            const std::int64_t count = std::min(prefill_tile, length - slot.prefilled);
            work_.push_back({.slot = static_cast<std::int64_t>(i),
                             .position_begin = slot.prefilled,
                             .tokens = slot.prompt.subspan(static_cast<std::size_t>(slot.prefilled),
                                                           static_cast<std::size_t>(count)),
                             .prefill = true,
                             .wants_logits = slot.prefilled + count == length});
            slot.prefilled += count;
            prompt_tokens_ += count;
            budget -= prefill_tile; // a short last tile costs a whole one: the cap stays simple
        }
    }
}

bool ContinuousBatch::take_token(Slot& slot, std::span<const float> logits)
{
    const SampledToken token = sampler_.sample(logits, slot.stream);
    slot.answer.tokens.push_back(token.id);
    slot.answer.log_probs.push_back(token.log_prob);
    slot.last_token = token.id;
    ++new_tokens_;
    slot.answer.ended =
        std::find(options_.end_tokens.begin(), options_.end_tokens.end(), token.id) != options_.end_tokens.end();
    return slot.answer.ended || static_cast<std::int64_t>(slot.answer.tokens.size()) == slot.max_new_tokens;
}

std::vector<SampledAnswer> ContinuousBatch::step()
{
    plan();
    if (work_.empty())
        return {};
    const Tensor logits = step_(work_);
    std::vector<std::size_t> finished;
    std::int64_t row = 0;
    for (const DecodeWork& work : work_) {
        if (!work.wants_logits)
            continue;
        const auto index = static_cast<std::size_t>(work.slot);
        const std::span<const float> values(logits.row_f32(row++), static_cast<std::size_t>(logits.columns));
        const bool complete =
            with_context(cat("row ", slots_[index]->answer.row), [&] { return take_token(*slots_[index], values); });
        if (complete)
            finished.push_back(index);
    }
    SELM_ENSURE(row == logits.rows);
    std::sort(finished.begin(), finished.end());
    std::vector<SampledAnswer> answers;
    for (const std::size_t index : finished) {
        answers.push_back(std::move(slots_[index]->answer));
        slots_[index].reset();
    }
    return answers;
}

} // namespace selm
