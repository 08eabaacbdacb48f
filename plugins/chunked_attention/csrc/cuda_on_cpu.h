// As much of CUDA's device language as chunked_attention.cuh uses, on a CPU: a thread for each thread of a block, one block after another.
#pragma once

#include <barrier>
#include <cmath>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__ static

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 gridDim;

namespace on_cpu {

inline std::unique_ptr<std::barrier<>> block;
inline std::vector<std::unique_ptr<std::barrier<>>> warps;
inline std::vector<float> lanes;
inline std::vector<int> votes;

inline void wait_warp() { warps[threadIdx.x / 32]->arrive_and_wait(); }

inline float from_lane(float value, unsigned lane)
{
    lanes[threadIdx.x] = value;
    wait_warp();
    float const found = lanes[threadIdx.x / 32 * 32 + lane];
    wait_warp();
    return found;
}

inline void launch(dim3 grid, unsigned num_threads, std::function<void()> const& kernel)
{
    gridDim = grid;
    lanes.assign(num_threads, 0.0F);
    votes.assign(num_threads, 0);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                block = std::make_unique<std::barrier<>>(num_threads);
                warps.clear();
                for (unsigned i = 0; i < num_threads / 32; ++i) warps.push_back(std::make_unique<std::barrier<>>(32));
                std::vector<std::thread> threads;
                for (unsigned i = 0; i < num_threads; ++i)
                    threads.emplace_back([&, i] {
                        threadIdx = {i, 0, 0};
                        blockIdx = {x, y, z};
                        kernel();
                    });
                for (std::thread& one : threads) one.join();
            }
}

}  // namespace on_cpu

inline void __syncthreads() { on_cpu::block->arrive_and_wait(); }

inline int __syncthreads_or(int vote)
{
    on_cpu::votes[threadIdx.x] = vote;
    on_cpu::block->arrive_and_wait();
    int any = 0;
    for (int one : on_cpu::votes) any |= one;
    on_cpu::block->arrive_and_wait();
    return any;
}

inline float __shfl_xor_sync(unsigned, float value, int mask) { return on_cpu::from_lane(value, (threadIdx.x % 32) ^ mask); }
inline float __shfl_sync(unsigned, float value, int lane) { return on_cpu::from_lane(value, lane); }
