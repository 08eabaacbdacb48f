// The kernels' arithmetic on a CPU: reads cases from standard input as test_csrc.py writes them, writes the results to standard output.
//
// int32: batch kv_heads groups num_queries num_slots head_dim sink left anchors splits; float scale; then q, k, v as float32, q_positions,
// kv_positions, chunk_size as int64. Back: y as float32.
#include "cuda_on_cpu.h"

#include "chunked_attention.cuh"

#include <cstdio>

namespace thoughtx {
template <>
float widened(float value) { return value; }
template <>
float narrowed(float value) { return value; }
}  // namespace thoughtx

template <typename T>
std::vector<T> taken(size_t count)
{
    std::vector<T> values(count);
    if (std::fread(values.data(), sizeof(T), count, stdin) != count) std::exit(2);
    return values;
}

template <int D>
std::vector<float> answered(thoughtx::Shape const& shape, int batch, int splits)
{
    size_t const rows = static_cast<size_t>(shape.num_queries) * shape.groups, heads = static_cast<size_t>(batch) * shape.kv_heads;
    auto const q = taken<float>(heads * rows * D), k = taken<float>(heads * shape.num_slots * D), v = taken<float>(k.size());
    auto const at = taken<int64_t>(static_cast<size_t>(batch) * shape.num_queries);
    auto const slots = taken<int64_t>(static_cast<size_t>(batch) * shape.num_slots), chunk = taken<int64_t>(batch);
    int per_split = (shape.num_slots + splits - 1) / splits;
    per_split = (per_split + thoughtx::kTile - 1) / thoughtx::kTile * thoughtx::kTile;
    unsigned const parts = (shape.num_slots + per_split - 1) / per_split;
    std::vector<float> y(q.size(), -7.0F), partial(parts * heads * rows * D), lse(parts * heads * rows);
    dim3 const grid{static_cast<unsigned>((rows + thoughtx::kWarps - 1) / thoughtx::kWarps), static_cast<unsigned>(heads), parts};
    unsigned const num_threads = 32 * thoughtx::kWarps;
    on_cpu::launch(grid, num_threads, [&] {
        thoughtx::attend<float, D>(
            q.data(), k.data(), v.data(), at.data(), slots.data(), chunk.data(), y.data(), partial.data(), lse.data(), shape, per_split);
    });
    if (parts > 1)
        on_cpu::launch({grid.x, grid.y, 1}, num_threads, [&] { thoughtx::combine<float, D>(partial.data(), lse.data(), y.data(), shape, parts); });
    return y;
}

int main()
{
    auto const n = taken<int32_t>(10);
    float const scale = taken<float>(1)[0];
    thoughtx::Shape const shape{n[1], n[2], n[3], n[4], scale, {n[6], n[7], n[8]}};
    std::vector<float> const y = n[5] == 32 ? answered<32>(shape, n[0], n[9]) : answered<64>(shape, n[0], n[9]);
    std::fwrite(y.data(), sizeof(float), y.size(), stdout);
    return 0;
}
