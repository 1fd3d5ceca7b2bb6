#pragma once

#include <cstdint>

// Operands of bf16 products: rows of floats rounded (to nearest, ties to even; subnormal numbers become 0, NaN stays) by the
// instructions of CPUs that also multiply bf16 numbers. A pair is two bf16 numbers in the place of one float, the first in
// the low half. Pairs are handled as floats whose value means nothing: they are moved, not computed with.
namespace selm::xsmm {

/// Whether this build has the functions below (x86-64 alone) and this CPU can run them.
bool cpu_has_bf16();

/// Pairs that hold `count` numbers.
inline std::int64_t pairs_of(std::int64_t count)
{
    return (count + 1) / 2;
}

/// Neighbours in a row become a pair: to [rows][pairs_of(columns)] = from [rows][columns]; an odd last number is paired with 0.
void pair_columns(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns, float* to,
                  std::int64_t to_stride);

/// Rows 2i and 2i + 1 become row i of pairs: to [pairs_of(rows)][columns] = from [rows][columns]; an odd last row is paired
/// with zeros.
void pair_rows(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns, float* to,
               std::int64_t to_stride);

/// The same pairs, turned round: to [columns][pairs_of(rows)].
void pair_rows_transposed(const float* from, std::int64_t from_stride, std::int64_t rows, std::int64_t columns, float* to,
                          std::int64_t to_stride);

} // namespace selm::xsmm
