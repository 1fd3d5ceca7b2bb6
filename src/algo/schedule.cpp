#include "selm/algo/schedule.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <utility>

#include "selm/base/error.hpp"
#include "selm/base/rng.hpp"

namespace selm {

namespace {
constexpr std::uint32_t shuffling = 2; // RandomStream purpose
}

Schedule parse_schedule(const std::string& word)
{
    if (word == "cosine")
        return Schedule::cosine;
    if (word == "linear")
        return Schedule::linear;
    if (word == "constant")
        return Schedule::constant;
    throw usage_error(cat("--schedule ", word, " is not known. Use one of cosine|linear|constant"));
}

std::int64_t warmup_steps(std::int64_t steps, double warmup_ratio)
{
    return static_cast<std::int64_t>(std::ceil(static_cast<double>(steps) * warmup_ratio));
}

double learning_rate(Schedule schedule, double peak, std::int64_t step, std::int64_t steps, double warmup_ratio)
{
    SELM_EXPECT(step >= 0 && steps >= 0);
    const std::int64_t warmup = warmup_steps(steps, warmup_ratio);
    if (step < warmup)
        return peak * (static_cast<double>(step) / static_cast<double>(std::max<std::int64_t>(1, warmup)));
    const auto decay_steps = static_cast<double>(std::max<std::int64_t>(1, steps - warmup));
    switch (schedule) {
    case Schedule::cosine: {
        const double progress = static_cast<double>(step - warmup) / decay_steps;
        return peak * std::max(0.0, 0.5 * (1 + std::cos(std::numbers::pi * progress)));
    }
    case Schedule::linear:
        return peak * std::max(0.0, static_cast<double>(steps - step) / decay_steps);
    case Schedule::constant:
        break;
    }
    return peak;
}

PortionRange portion_range(std::int64_t rows, std::int64_t portion, std::int64_t portions)
{
    SELM_VALIDATE(portions >= 1, ExitCode::usage, "--portions " << portions << " is too small. Use 1 or more");
    SELM_VALIDATE(portion >= 1 && portion <= portions, ExitCode::usage,
                  "portion " << portion << " does not exist (the data are cut into " << portions
                             << "). Pass --portion 1.." << portions);
    const std::int64_t size = rows / portions;
    return {(portion - 1) * size, portion * size};
}

std::int64_t steps_per_epoch(std::int64_t rows, std::int64_t global_batch)
{
    SELM_EXPECT(rows >= 0 && global_batch >= 1);
    return rows == 0 ? 0 : std::max<std::int64_t>(1, rows / global_batch);
}

std::vector<std::int64_t> epoch_order(std::int64_t rows, std::uint64_t seed, std::int64_t iteration, std::int64_t epoch,
                                      bool shuffle)
{
    SELM_EXPECT(rows >= 0 && iteration >= 0 && epoch >= 0);
    std::vector<std::int64_t> order(static_cast<std::size_t>(rows));
    std::iota(order.begin(), order.end(), std::int64_t{0});
    if (!shuffle)
        return order;
    RandomStream stream(seed, shuffling, static_cast<std::uint64_t>(iteration), static_cast<std::uint64_t>(epoch));
    for (std::size_t i = order.size(); i > 1; --i) // Fisher-Yates
        std::swap(order[i - 1], order[stream.next_below(i)]);
    return order;
}

} // namespace selm
