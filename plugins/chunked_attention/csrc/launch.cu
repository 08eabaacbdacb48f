// Chooses types and sizes at compile time, and into how many parts the slots are split; see launch.h.
#include "launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "chunked_attention.cuh"

namespace thoughtx {

template <>
__device__ float widened(__half value) { return __half2float(value); }
template <>
__device__ float widened(__nv_bfloat16 value) { return __bfloat162float(value); }
template <>
__device__ __half narrowed(float value) { return __float2half_rn(value); }
template <>
__device__ __nv_bfloat16 narrowed(float value) { return __float2bfloat16_rn(value); }

namespace {

constexpr int kMaxSplits = 32;      // parts of the slots
constexpr int kMaxSplitRows = 64;   // of a KV head; with more rows there are enough blocks without splitting
constexpr int kSplitSlots = 256;    // of a part, at least
constexpr int kWantedBlocks = 264;  // twice the multiprocessors of an H100

int ceil_div(int a, int b) { return (a + b - 1) / b; }

int splits_of(Call const& call)
{
    int const rows = call.num_queries * call.groups;
    if (rows > kMaxSplitRows) return 1;
    int const blocks = ceil_div(rows, kWarps) * call.batch * call.kv_heads;
    int splits = ceil_div(kWantedBlocks, blocks);
    splits = splits < kMaxSplits ? splits : kMaxSplits;
    int const most = call.num_slots / kSplitSlots;
    return splits < most ? splits : (most > 1 ? most : 1);
}

template <typename T, int D>
cudaError_t run_as(Call const& call, void const* const* inputs, void* output, void* workspace, cudaStream_t stream)
{
    int const rows = call.num_queries * call.groups, heads = call.batch * call.kv_heads;
    int const per_split = ceil_div(ceil_div(call.num_slots, splits_of(call)), kTile) * kTile;
    int const splits = ceil_div(call.num_slots, per_split);
    Shape const shape{call.kv_heads, call.groups, call.num_queries, call.num_slots, call.scale, {call.sink, call.left, call.anchors}};
    float* const partial = static_cast<float*>(workspace);
    float* const lse = splits > 1 ? partial + static_cast<int64_t>(splits) * heads * rows * D : nullptr;
    dim3 const grid(ceil_div(rows, kWarps), heads, splits), block(32 * kWarps);
    attend<T, D><<<grid, block, 0, stream>>>(static_cast<T const*>(inputs[0]), static_cast<T const*>(inputs[1]),
        static_cast<T const*>(inputs[2]), static_cast<int64_t const*>(inputs[3]), static_cast<int64_t const*>(inputs[4]),
        static_cast<int64_t const*>(inputs[5]), static_cast<T*>(output), partial, lse, shape, per_split);
    if (splits > 1) combine<T, D><<<dim3(grid.x, grid.y), block, 0, stream>>>(partial, lse, static_cast<T*>(output), shape, splits);
    return cudaGetLastError();
}

template <typename T>
cudaError_t run_type(Call const& call, void const* const* inputs, void* output, void* workspace, cudaStream_t stream)
{
    switch (call.head_dim) {
    case 32: return run_as<T, 32>(call, inputs, output, workspace, stream);
    case 64: return run_as<T, 64>(call, inputs, output, workspace, stream);
    case 96: return run_as<T, 96>(call, inputs, output, workspace, stream);
    case 128: return run_as<T, 128>(call, inputs, output, workspace, stream);
    default: return cudaErrorInvalidValue;
    }
}

}  // namespace

bool takes_head_dim(int32_t head_dim) { return head_dim == 32 || head_dim == 64 || head_dim == 96 || head_dim == 128; }

size_t workspace_bytes(Call const& largest)
{
    int64_t const all = static_cast<int64_t>(largest.num_queries) * largest.groups;
    int64_t const rows = all < kMaxSplitRows ? all : kMaxSplitRows;
    return sizeof(float) * kMaxSplits * largest.batch * largest.kv_heads * rows * (largest.head_dim + 1);
}

cudaError_t run(Call const& call, void const* const* inputs, void* output, void* workspace, cudaStream_t stream)
{
    if (call.batch == 0 || call.num_queries == 0 || call.num_slots == 0) return cudaSuccess;
    return call.type == Type::kHalf ? run_type<__half>(call, inputs, output, workspace, stream)
                                    : run_type<__nv_bfloat16>(call, inputs, output, workspace, stream);
}

}  // namespace thoughtx
