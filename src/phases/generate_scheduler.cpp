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
    std::int64_t unread = 0; // in whole tiles: however short a prompt is, its answer is work
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
        auto [prefix, donor] = slot.prefilled == 0 ? find_prefix(i) : std::pair{std::int64_t{0}, std::size_t{0}};
        while (prefix + slot.prefilled < length) {
            // Tiles begin at multiples of prefill_tile: a prefix leaves the rest of its last one.
            const std::int64_t begin = prefix + slot.prefilled;
            const std::int64_t count = std::min(prefill_tile - begin % prefill_tile, length - begin);
            if (count > budget)
                return;
            work_.push_back({.slot = static_cast<std::int64_t>(i),
                             .position_begin = begin,
                             .tokens = slot.prompt.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(count)),
                             .prefill = true,
                             .wants_logits = begin + count == length,
                             .prefix_slot = prefix > 0 ? static_cast<std::int64_t>(donor) : -1});
            slot.prefilled = begin + count;
            prompt_tokens_ += prefix + count;
            copied_tokens_ += prefix;
            budget -= count;
            prefix = 0;
        }
    }
}

std::pair<std::int64_t, std::size_t> ContinuousBatch::find_prefix(std::size_t i) const
{
    std::pair<std::int64_t, std::size_t> best{0, 0};
    const std::int64_t step = options_.prefix_granularity;
    const auto& prompt = slots_[i]->prompt;
    for (std::size_t j = 0; step > 0 && j < slots_.size(); ++j) {
        if (j == i || !slots_[j] || slots_[j]->prefilled <= best.first)
            continue;
        // The last token of a prompt is always read: its logits are wanted.
        const std::size_t most = std::min(prompt.size() - 1, static_cast<std::size_t>(slots_[j]->prefilled));
        const auto end = std::mismatch(prompt.begin(), prompt.begin() + static_cast<std::ptrdiff_t>(most),
                                       slots_[j]->prompt.begin()).first;
        const std::int64_t common = (end - prompt.begin()) / step * step;
        if (common > best.first)
            best = {common, j};
    }
    return best;
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
