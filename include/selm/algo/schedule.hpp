#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace selm {

enum class Schedule { cosine, linear, constant };
Schedule parse_schedule(const std::string& word); ///< @throws Error usage

/// Learning rate of 0-based optimizer step `step` of `steps`, as Hugging Face's get_*_schedule_with_warmup: warm-up
/// steps = ceil(warmup_ratio * steps); step 0 of a warm-up has rate 0. `constant` is constant_with_warmup.
double learning_rate(Schedule schedule, double peak, std::int64_t step, std::int64_t steps, double warmup_ratio);

/// ceil(warmup_ratio * steps), as transformers' Trainer.
std::int64_t warmup_steps(std::int64_t steps, double warmup_ratio);

/// Rows [begin, end) of portion t of T (1-based): floor(N/T) rows each, the remainder unused.
struct PortionRange {
    std::int64_t begin = 0, end = 0;
};
PortionRange portion_range(std::int64_t rows, std::int64_t portion,
                           std::int64_t portions); ///< @throws Error usage: out of range

/// Optimizer steps per epoch: floor(rows / global_batch), at least 1 when rows > 0 (an incomplete last batch is dropped
/// unless it is the only one).
std::int64_t steps_per_epoch(std::int64_t rows, std::int64_t global_batch);

/// Order of rows in an epoch: a seeded permutation (or 0..rows-1 when shuffle is off). f(seed, iteration, epoch).
std::vector<std::int64_t> epoch_order(std::int64_t rows, std::uint64_t seed, std::int64_t iteration, std::int64_t epoch,
                                      bool shuffle);

} // namespace selm
