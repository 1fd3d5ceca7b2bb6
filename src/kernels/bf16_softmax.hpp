#pragma once

#include <cstdint>

// The elementwise part of attention on operands rounded to bf16 (bf16_rows.hpp says what a pair is). Exponentials are powers
// of two: scores are multiplied by `factor` = scale * log2(e).
namespace selm::xsmm {

inline constexpr float log2_e = 1.44269504088896341f;

/// Running softmax of one row: sums are those of 2^(factor * score - max).
struct Bf16RowState {
    float max = 0;
    float sum = 0;
};

/// Scores of some rows (neighbouring rows are the heads of a group, then comes the next query) and some keys.
struct Bf16ScoreTile {
    const float* scores = nullptr; ///< [rows][stride]
    float* weights = nullptr;      ///< pairs [rows][stride / 2]: 2^(factor * score - max), 0 for keys a row does not see
    std::int64_t stride = 0, rows = 0, group = 0;
    std::int64_t width = 0;   ///< columns of a row that are written, a multiple of 16
    std::int64_t keys = 0;    ///< valid ones among them
    std::int64_t before = 0;  ///< diagonal: keys before the first query's own
    bool is_diagonal = false; ///< query i of the tile sees keys 0..before + i only
    bool is_first = false;    ///< the states hold nothing yet
    float factor = 0;
    Bf16RowState* states = nullptr; ///< [rows]
    float* sums = nullptr;          ///< [rows][columns]: weighted sums of earlier tiles, multiplied when a row's max moves
    std::int64_t columns = 0;
};
/// The max of a row moves when a score exceeds it by more than a factor of 2^8: weights stay below that, and seldom do the
/// sums have to be multiplied. Each row decides alone.
void soften_rows(const Bf16ScoreTile& tile);

/// pairs of 2^(factor * score - max) for one row of `keys` scores, up to the next multiple of 16 with zeros.
/// @return their sum.
float soften_whole_row(const float* scores, std::int64_t keys, float factor, float* weights);

/// to = from * factor.
void scale_into(const float* from, std::int64_t count, float factor, float* to);

/// Transposed scores and products [keys][stride] of a tile's keys and lanes; a lane is a query of one head.
struct Bf16GradientTile {
    const float* scores = nullptr;
    const float* d_weights = nullptr; ///< dout . values
    std::int64_t stride = 0, keys = 0;
    std::int64_t lanes = 0;               ///< a multiple of 16
    std::int64_t hidden_lanes_per_key = 0; ///< the first i times this many lanes do not see key i
    float factor = 0, scale = 0;
    const float* log2_sums = nullptr;  ///< [lanes] log2 of the softmax denominators
    const float* delta = nullptr;      ///< [lanes] dout . out
    float* weights_by_key = nullptr;   ///< to: p = 2^(factor * score - log2_sum), bf16 [keys][stride]
    float* d_scores_by_key = nullptr;  ///< to: ds = scale * p * (d_weight - delta), bf16 [keys][stride]
    float* d_scores_by_lane = nullptr; ///< to: ds, pairs of keys [ceil(keys / 2)][stride]
};
void differentiate_rows(const Bf16GradientTile& tile);

} // namespace selm::xsmm
