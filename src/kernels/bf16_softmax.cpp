#include "bf16_softmax.hpp"

#include <algorithm>
#include <limits>

#include "bf16_simd.hpp"
#include "selm/base/error.hpp"

#if defined(__x86_64__)

namespace selm::xsmm {
namespace {

constexpr float headroom = 8; ///< log2 of how far a weight may exceed 1

/// 16 floats as bf16 at place i of a row of bf16 numbers.
SELM_BF16_INLINE void store_rounded(float* row, std::int64_t i, __m512 values)
{
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + i / 2), (__m256i)_mm512_cvtneps_pbh(values));
}

SELM_BF16_INLINE void soften_row(const Bf16ScoreTile& tile, std::int64_t row, std::int64_t visible)
{
    const float* const scores = tile.scores + row * tile.stride;
    float* const weights = tile.weights + row * (tile.stride / 2);
    const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    const std::int64_t whole = visible & ~std::int64_t{15};
    const __mmask16 rest = first_lanes(visible - whole);
    __m512 largest = _mm512_mask_loadu_ps(lowest, rest, scores + whole);
    for (std::int64_t i = 0; i < whole; i += 16)
        largest = _mm512_max_ps(largest, _mm512_loadu_ps(scores + i));
    const float row_max = _mm512_reduce_max_ps(largest) * tile.factor;

    Bf16RowState& state = tile.states[row];
    if (tile.is_first) {
        state = {row_max, 0};
    } else if (row_max > state.max + headroom) [[unlikely]] {
        const float factor = _mm512_cvtss_f32(exp2(_mm512_set1_ps(state.max - row_max)));
        state = {row_max, state.sum * factor};
        scale_into(tile.sums + row * tile.columns, tile.columns, factor, tile.sums + row * tile.columns);
    }
    const __m512 factor = _mm512_set1_ps(tile.factor), max = _mm512_set1_ps(state.max);
    __m512 sum = _mm512_setzero_ps();
    std::int64_t i = 0;
    for (; i < whole; i += 16) {
        const __m512 p = exp2(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), factor, max));
        sum = _mm512_add_ps(sum, p);
        store_rounded(weights, i, p);
    }
    if (rest != 0) {
        const __m512 p = _mm512_maskz_mov_ps(
            rest, exp2(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(rest, scores + i), factor, max)));
        sum = _mm512_add_ps(sum, p);
        store_rounded(weights, i, p);
        i += 16;
    }
    for (; i < tile.width; i += 16)
        store_rounded(weights, i, _mm512_setzero_ps());
    state.sum += _mm512_reduce_add_ps(sum);
}

} // namespace

SELM_BF16 void soften_rows(const Bf16ScoreTile& tile)
{
    std::int64_t visible = tile.is_diagonal ? std::min(tile.before + 1, tile.keys) : tile.keys, head = 0;
    for (std::int64_t row = 0; row < tile.rows; ++row) {
        soften_row(tile, row, visible);
        if (++head == tile.group) {
            head = 0;
            visible += visible < tile.keys ? 1 : 0;
        }
    }
}

SELM_BF16 float soften_whole_row(const float* scores, std::int64_t keys, float factor, float* weights)
{
    Bf16RowState state;
    const Bf16ScoreTile tile{.scores = scores,
                             .weights = weights,
                             .rows = 1,
                             .group = 1,
                             .width = (keys + 15) / 16 * 16,
                             .keys = keys,
                             .is_first = true,
                             .factor = factor,
                             .states = &state};
    soften_row(tile, 0, keys);
    return state.sum;
}

SELM_BF16 void scale_into(const float* from, std::int64_t count, float factor, float* to)
{
    const __m512 factors = _mm512_set1_ps(factor);
    for (std::int64_t i = 0; i < count; i += 16) {
        const __mmask16 lanes = first_lanes(count - i);
        _mm512_mask_storeu_ps(to + i, lanes, _mm512_mul_ps(factors, _mm512_maskz_loadu_ps(lanes, from + i)));
    }
}

SELM_BF16 void differentiate_rows(const Bf16GradientTile& tile)
{
    const __m512 factor = _mm512_set1_ps(tile.factor), scale = _mm512_set1_ps(tile.scale);
    for (std::int64_t lane = 0; lane < tile.lanes; lane += 16) {
        const __m512 log2_sum = _mm512_loadu_ps(tile.log2_sums + lane);
        const __m512 scaled_delta = _mm512_mul_ps(scale, _mm512_loadu_ps(tile.delta + lane));
        for (std::int64_t key = 0; key < tile.keys; key += 2) {
            __m512i pair[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
            for (std::int64_t second = 0; second < 2 && key + second < tile.keys; ++second) {
                const std::int64_t at = (key + second) * tile.stride + lane;
                const __mmask16 hidden = first_lanes((key + second) * tile.hidden_lanes_per_key - lane);
                const __m512 exponent = _mm512_fmsub_ps(_mm512_loadu_ps(tile.scores + at), factor, log2_sum);
                const __m512 p = _mm512_maskz_mov_ps(static_cast<__mmask16>(~hidden), exp2(exponent));
                const __m512 d_score =
                    _mm512_mul_ps(p, _mm512_fmsub_ps(_mm512_loadu_ps(tile.d_weights + at), scale, scaled_delta));
                store_rounded(tile.weights_by_key, at, p);
                const __m256i numbers = (__m256i)_mm512_cvtneps_pbh(d_score);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile.d_scores_by_key + at / 2), numbers);
                pair[second] = _mm512_cvtepu16_epi32(numbers);
            }
            _mm512_storeu_si512(tile.d_scores_by_lane + key / 2 * tile.stride + lane,
                                _mm512_or_si512(pair[0], _mm512_slli_epi32(pair[1], 16)));
        }
    }
}

} // namespace selm::xsmm

#else

namespace selm::xsmm {

void soften_rows(const Bf16ScoreTile&)
{
    SELM_EXPECT(!"no bf16 on this CPU");
}

float soften_whole_row(const float*, std::int64_t, float, float*)
{
    SELM_EXPECT(!"no bf16 on this CPU");
    return 0;
}

void scale_into(const float*, std::int64_t, float, float*)
{
    SELM_EXPECT(!"no bf16 on this CPU");
}

void differentiate_rows(const Bf16GradientTile&)
{
    SELM_EXPECT(!"no bf16 on this CPU");
}

} // namespace selm::xsmm

#endif
