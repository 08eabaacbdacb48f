// What the plugin asks of the kernels: whether they take a shape, how much workspace it needs, and to run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime_api.h>

namespace thoughtx {

enum class Type : int32_t { kHalf, kBfloat16 };

struct Call {
    int32_t batch, kv_heads, groups, num_queries, num_slots, head_dim;
    int32_t sink, left, anchors;
    float scale;
    Type type;
};

bool takes_head_dim(int32_t head_dim);
// Bytes for the largest shape of a profile; also enough for every smaller one.
size_t workspace_bytes(Call const& largest);
// inputs: q, k, v, q_positions, kv_positions, chunk_size; all on the device.
cudaError_t run(Call const& call, void const* const* inputs, void* output, void* workspace, cudaStream_t stream);

}  // namespace thoughtx
