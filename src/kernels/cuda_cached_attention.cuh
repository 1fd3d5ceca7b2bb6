#pragma once

#include <cmath>
#include <cstdint>

#include "scalar_functions.hpp"

// Kernels of cached attention for single tokens. Every thread's code is C++17, so that tests can run blocks of threads on the
// CPU; launches are in cuda_cached_attention.cu. T: float, or std::uint16_t for bf16.
//
// A sequence is cut at multiples of keys_per_split of its own positions; a block of threads takes one split of one key/value
// head of one row, with up to `group` of the query heads that share it, so that keys and values are read once. Splits of a row
// are then added up. So a row's bits depend on its own sequence alone, and long sequences occupy many blocks (Dao et al.,
// Flash-Decoding, 2023).
#ifdef __CUDACC__
#define SELM_UNROLL _Pragma("unroll")
#else
#define SELM_UNROLL
#endif

namespace selm::cuda {

constexpr int cached_threads = 128;
constexpr std::int64_t keys_per_split = 256;
/// Neighbouring elements of a key that one thread holds: 16 bytes of bf16.
constexpr int lane_elements = 8;
constexpr std::int64_t largest_head_dim = 256;

struct CachedShape {
    std::int64_t heads, kv_heads, head_dim;
    float scale;
};

/// Rows of a step; see aten::CachedRows.
struct RowLists {
    const std::int32_t *row, *slot, *position;
    std::int64_t count;
};

template<typename T>
struct CachedArguments {
    CachedShape shape;
    RowLists rows;
    const T* qkv; ///< [T, stride]
    std::int64_t stride;
    T *keys, *values; ///< [slots, capacity, kv_heads, head_dim]
    std::int64_t capacity, splits;
    float* partial; ///< [count, heads, splits, head_dim + 2]: weighted values | largest score | sum of weights
    T* out;         ///< [T, out_stride]
    std::int64_t out_stride;
};

__device__ inline float to_float(float value)
{
    return value;
}

__device__ inline float to_float(std::uint16_t value)
{
    return float_of_bf16(value);
}

__device__ inline void assign(float& to, float value)
{
    to = value;
}

__device__ inline void assign(std::uint16_t& to, float value)
{
    to = bf16_of(value);
}

template<typename T>
struct alignas(16) Lane {
    T value[lane_elements];
};

/// One block per row; its threads copy the keys and values of all heads.
template<typename T>
__global__ void append_to_cache(CachedArguments<T> a)
{
    const std::int64_t item = blockIdx.x;
    const std::int64_t slot = a.rows.slot[item];
    if (slot < 0)
        return;
    const std::int64_t width = a.shape.kv_heads * a.shape.head_dim;
    const T* const k = a.qkv + a.rows.row[item] * a.stride + a.shape.heads * a.shape.head_dim;
    const std::int64_t to = (slot * a.capacity + a.rows.position[item]) * width;
    for (std::int64_t i = threadIdx.x; i < width; i += blockDim.x) {
        a.keys[to + i] = k[i];
        a.values[to + i] = k[width + i];
    }
}

/// Grid: rows, key/value heads times groups of query heads, splits. @tparam lanes threads that share a key: a power of two of
/// at most 32, with lanes * lane_elements >= head_dim. @tparam group query heads per block.
template<typename T, int lanes, int group>
__global__ void attend_split(CachedArguments<T> a)
{
    constexpr int teams = cached_threads / lanes;
    constexpr int keys_in_flight = 4;
    __shared__ float team_sum[teams][group][lanes * lane_elements];
    __shared__ float team_largest[teams][group], team_weight[teams][group];

    const std::int64_t item = blockIdx.x, split = blockIdx.z;
    const std::int64_t heads_per_kv = a.shape.heads / a.shape.kv_heads;
    const std::int64_t groups = (heads_per_kv + group - 1) / group;
    const std::int64_t kv_head = blockIdx.y / groups, first_head = (blockIdx.y % groups) * group;
    const std::int64_t slot = a.rows.slot[item], position = a.rows.position[item], begin = split * keys_per_split;
    if (slot < 0 || begin > position)
        return;
    const std::int64_t end = begin + keys_per_split <= position ? begin + keys_per_split : position + 1;

    const std::int64_t head_dim = a.shape.head_dim;
    const int lane = static_cast<int>(threadIdx.x) % lanes, team = static_cast<int>(threadIdx.x) / lanes;
    const int first = lane * lane_elements;
    const bool holds = first < head_dim;
    float q[group][lane_elements], sum[group][lane_elements], largest[group], weight[group];
    for (int h = 0; h < group; ++h) {
        const std::int64_t head = kv_head * heads_per_kv + first_head + h;
        const bool exists = holds && first_head + h < heads_per_kv;
        largest[h] = -INFINITY;
        weight[h] = 0;
        for (int e = 0; e < lane_elements; ++e) {
            q[h][e] = exists ? a.shape.scale * to_float(a.qkv[a.rows.row[item] * a.stride + head * head_dim + first + e]) : 0.0f;
            sum[h][e] = 0;
        }
    }

    const std::int64_t step = a.shape.kv_heads * head_dim;
    const std::int64_t origin = slot * a.capacity * step + kv_head * head_dim + first;
    // All threads of a warp run the same number of rounds, whether their key exists or not: they exchange sums.
    for (std::int64_t base = begin; base < end; base += teams * keys_in_flight) {
        Lane<T> k[keys_in_flight], v[keys_in_flight];
SELM_UNROLL
        for (int i = 0; i < keys_in_flight; ++i) {
            const std::int64_t key = base + i * teams + team;
            if (key < end && holds) {
                k[i] = *reinterpret_cast<const Lane<T>*>(a.keys + origin + key * step);
                v[i] = *reinterpret_cast<const Lane<T>*>(a.values + origin + key * step);
            } else {
                k[i] = v[i] = Lane<T>{};
            }
        }
SELM_UNROLL
        for (int i = 0; i < keys_in_flight; ++i) {
            const bool exists = base + i * teams + team < end;
SELM_UNROLL
            for (int h = 0; h < group; ++h) {
                float score = 0;
                for (int e = 0; e < lane_elements; ++e)
                    score += q[h][e] * to_float(k[i].value[e]);
                for (int distance = lanes / 2; distance > 0; distance /= 2)
                    score += __shfl_xor_sync(0xffffffffu, score, distance);
                if (exists) {
                    const float larger = score > largest[h] ? score : largest[h];
                    const float kept = expf(largest[h] - larger), added = expf(score - larger);
                    largest[h] = larger;
                    weight[h] = weight[h] * kept + added;
                    for (int e = 0; e < lane_elements; ++e)
                        sum[h][e] = sum[h][e] * kept + added * to_float(v[i].value[e]);
                }
            }
        }
    }

    for (int h = 0; h < group; ++h) {
        team_largest[team][h] = largest[h]; // the same in all lanes
        team_weight[team][h] = weight[h];
        for (int e = 0; e < lane_elements; ++e)
            team_sum[team][h][first + e] = sum[h][e];
    }
    __syncthreads();
    for (std::int64_t i = threadIdx.x; i < group * (head_dim + 2); i += cached_threads) {
        const int h = static_cast<int>(i / (head_dim + 2));
        const std::int64_t column = i % (head_dim + 2);
        if (first_head + h >= heads_per_kv)
            continue;
        float split_largest = -INFINITY;
        for (int t = 0; t < teams; ++t)
            split_largest = team_largest[t][h] > split_largest ? team_largest[t][h] : split_largest;
        float total = 0;
        for (int t = 0; t < teams; ++t) // a team without keys weighs nothing
            total += expf(team_largest[t][h] - split_largest) * (column < head_dim ? team_sum[t][h][column] : team_weight[t][h]);
        const std::int64_t head = kv_head * heads_per_kv + first_head + h;
        float* const to = a.partial + ((item * a.shape.heads + head) * a.splits + split) * (head_dim + 2);
        to[column] = column == head_dim ? split_largest : total;
    }
}

/// Grid: rows, query heads. Adds up a row's splits.
template<typename T>
__global__ void add_splits(CachedArguments<T> a)
{
    const std::int64_t item = blockIdx.x, head = blockIdx.y, head_dim = a.shape.head_dim;
    T* const out = a.out + a.rows.row[item] * a.out_stride + head * head_dim;
    const bool exists = a.rows.slot[item] >= 0;
    const std::int64_t splits = exists ? a.rows.position[item] / keys_per_split + 1 : 0;
    const float* const partial = a.partial + (item * a.shape.heads + head) * a.splits * (head_dim + 2);
    float largest = -INFINITY;
    for (std::int64_t s = 0; s < splits; ++s)
        largest = partial[s * (head_dim + 2) + head_dim] > largest ? partial[s * (head_dim + 2) + head_dim] : largest;
    for (std::int64_t i = threadIdx.x; i < head_dim; i += blockDim.x) {
        float sum = 0, weight = 0;
        for (std::int64_t s = 0; s < splits; ++s) {
            const float* const part = partial + s * (head_dim + 2);
            const float factor = expf(part[head_dim] - largest);
            sum += factor * part[i];
            weight += factor * part[head_dim + 1];
        }
        assign(out[i], exists ? sum / weight : 0.0f);
    }
}

template<typename T, int lanes, typename Launch>
void with_split_kernel_of(const CachedShape& shape, std::int64_t heads_per_kv, Launch&& launch)
{
    switch (heads_per_kv) {
    case 1: return launch(attend_split<T, lanes, 1>, shape.kv_heads);
    case 2: return launch(attend_split<T, lanes, 2>, shape.kv_heads);
    case 3: return launch(attend_split<T, lanes, 3>, shape.kv_heads);
    case 4: return launch(attend_split<T, lanes, 4>, shape.kv_heads);
    default: return launch(attend_split<T, lanes, 8>, shape.kv_heads * ((heads_per_kv + 7) / 8));
    }
}

/// launch(kernel, blocks of the grid's second dimension) with the attend_split that suits the shape. head_dim: a multiple of
/// lane_elements of at most largest_head_dim.
template<typename T, typename Launch>
void with_split_kernel(const CachedShape& shape, Launch&& launch)
{
    const std::int64_t heads_per_kv = shape.heads / shape.kv_heads;
    if (shape.head_dim <= 64)
        return with_split_kernel_of<T, 8>(shape, heads_per_kv, launch);
    if (shape.head_dim <= 128)
        return with_split_kernel_of<T, 16>(shape, heads_per_kv, launch);
    return with_split_kernel_of<T, 32>(shape, heads_per_kv, launch);
}

} // namespace selm::cuda
