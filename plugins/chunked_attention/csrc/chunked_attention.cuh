// thoughtx::ChunkedAttention on CUDA cores: one warp per query and head, keys and values shared by the heads of a group.
//
// The mask is that of trtllm_thoughtx/graph/chunked_attention.py: positions are inputs, so a slot may be empty (-1) or hold any position, and
// each sequence has a chunk size of its own. Softmax is online, in float32. A tile of keys is skipped after its positions alone when no row of
// the block sees any of it. With splits > 1 every split looks at a part of the slots and `combine` joins them by the mass that they saw.
//
//   q, y [B, HK * groups, S, D]   k, v [B, HK, T, D]   q_positions int64 [B, S]   kv_positions int64 [B, T]   chunk_size int64 [B]
//
// Row r of a KV head is query r / groups of head r % groups in the group. The same text compiles for a CPU (cuda_on_cpu.h), in its test.
#pragma once

#include <cstdint>

namespace thoughtx {

constexpr int kTile = 32;   // keys at a time, one for each lane
constexpr int kWarps = 4;   // rows of a block
constexpr int kMany = 1 << 30;  // more than any position
constexpr float kNever = -1.0e30F;  // a score that no visible key has

struct Window {
    int sink, left, anchors;
};

struct Shape {
    int kv_heads, groups, num_queries, num_slots;
    float scale;
    Window window;
};

template <typename T>
__device__ float widened(T value);
template <typename T>
__device__ T narrowed(float value);

__device__ inline bool is_visible(int p, int j, int chunk, Window window)
{
    if (j < 0 || j > p) return false;
    int const first = p / chunk - window.left, c = j / chunk;
    if (j < window.sink || c >= first) return true;
    return window.anchors > 0 && (j + 1) % chunk == 0 && c >= first - window.anchors;
}

template <typename T, int D>
struct Tile {
    T keys[kTile][D + 2];  // two more, so that lanes read different banks
    T values[kTile][D];
    int positions[kTile];
    float queries[kWarps][D];
};

// Grid (rows / kWarps, B * HK, splits). `partial` float [splits, B * HK, rows, D] and `lse` float [splits, B * HK, rows] when splits > 1.
template <typename T, int D>
__global__ void attend(T const* q, T const* k, T const* v, int64_t const* q_positions, int64_t const* kv_positions,
    int64_t const* chunk_size, T* y, float* partial, float* lse, Shape shape, int per_split)
{
    __shared__ Tile<T, D> tile;
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int const rows = shape.num_queries * shape.groups, row = blockIdx.x * kWarps + warp;
    int const head = blockIdx.y, b = head / shape.kv_heads;
    bool const exists = row < rows;
    int const query = exists ? row / shape.groups : 0;
    int const p = exists ? static_cast<int>(q_positions[static_cast<int64_t>(b) * shape.num_queries + query]) : -1;
    int const chunk = chunk_size[b] < kMany ? static_cast<int>(chunk_size[b]) : kMany;
    int64_t const place = ((static_cast<int64_t>(head) * shape.groups + row % shape.groups) * shape.num_queries + query) * D;
    for (int d = lane; d < D; d += 32) tile.queries[warp][d] = exists ? widened(q[place + d]) * shape.scale : 0.0F;

    float best = kNever, total = 0.0F, acc[D / 32];
    for (float& one : acc) one = 0.0F;
    int const begin = blockIdx.z * per_split;
    int const end = begin + per_split < shape.num_slots ? begin + per_split : shape.num_slots;
    int64_t const base = static_cast<int64_t>(head) * shape.num_slots * D;
    for (int at = begin; at < end; at += kTile) {
        int const slot = at + lane;
        int const j = slot < end ? static_cast<int>(kv_positions[static_cast<int64_t>(b) * shape.num_slots + slot]) : -1;
        bool const seen = is_visible(p, j, chunk, shape.window);
        if (!__syncthreads_or(seen)) continue;  // also: nobody still reads the tile before
        for (int i = threadIdx.x; i < kTile * D; i += kWarps * 32) {
            int const n = i / D, d = i % D;
            bool const inside = at + n < end;
            tile.keys[n][d] = inside ? k[base + static_cast<int64_t>(at + n) * D + d] : narrowed<T>(0.0F);
            tile.values[n][d] = inside ? v[base + static_cast<int64_t>(at + n) * D + d] : narrowed<T>(0.0F);
        }
        __syncthreads();
        float score = 0.0F;
        for (int d = 0; d < D; ++d) score += tile.queries[warp][d] * widened(tile.keys[lane][d]);
        score = seen ? score : kNever;
        float highest = score;
        for (int step = 16; step > 0; step /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0U, highest, step));
        highest = fmaxf(highest, best);
        float const weight = seen ? expf(score - highest) : 0.0F, shrink = expf(best - highest);
        float mass = weight;
        for (int step = 16; step > 0; step /= 2) mass += __shfl_xor_sync(~0U, mass, step);
        total = total * shrink + mass;
        best = highest;
        for (float& one : acc) one *= shrink;
        for (int n = 0; n < kTile; ++n) {
            float const share = __shfl_sync(~0U, weight, n);
            for (int i = 0; i < D / 32; ++i) acc[i] += share * widened(tile.values[n][lane + 32 * i]);
        }
    }
    if (!exists) return;
    float const whole = total == 0.0F ? 1.0F : total;
    if (gridDim.z == 1) {
        for (int i = 0; i < D / 32; ++i) y[place + lane + 32 * i] = narrowed<T>(acc[i] / whole);
        return;
    }
    int64_t const line = (static_cast<int64_t>(blockIdx.z) * gridDim.y + head) * rows + row;
    for (int i = 0; i < D / 32; ++i) partial[line * D + lane + 32 * i] = acc[i] / whole;
    if (lane == 0) lse[line] = total == 0.0F ? kNever : best + logf(total);
}

// Grid (rows / kWarps, B * HK).
template <typename T, int D>
__global__ void combine(float const* partial, float const* lse, T* y, Shape shape, int splits)
{
    int const lane = threadIdx.x % 32, rows = shape.num_queries * shape.groups, row = blockIdx.x * kWarps + threadIdx.x / 32;
    int const head = blockIdx.y;
    if (row >= rows) return;
    int64_t const step = static_cast<int64_t>(gridDim.y) * rows, first = static_cast<int64_t>(head) * rows + row;
    float best = kNever, total = 0.0F, acc[D / 32];
    for (float& one : acc) one = 0.0F;
    for (int s = 0; s < splits; ++s) best = fmaxf(best, lse[first + s * step]);
    for (int s = 0; s < splits; ++s) {
        float const weight = lse[first + s * step] == kNever ? 0.0F : expf(lse[first + s * step] - best);
        total += weight;
        for (int i = 0; i < D / 32; ++i) acc[i] += weight * partial[(first + s * step) * D + lane + 32 * i];
    }
    int64_t const place
        = ((static_cast<int64_t>(head) * shape.groups + row % shape.groups) * shape.num_queries + row / shape.groups) * D;
    for (int i = 0; i < D / 32; ++i) y[place + lane + 32 * i] = narrowed<T>(acc[i] / (total == 0.0F ? 1.0F : total));
}

}  // namespace thoughtx
