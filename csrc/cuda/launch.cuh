// What every CUDA file needs: block-wide sums in a fixed order, 16-byte packs, aligned checks.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace histodd {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// 16 bytes of T, loaded and stored in one instruction.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T item[kSize];
};

__device__ __forceinline__ bool aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_down_sync(0xffffffffu, v, offset);
  return v;  // complete in lane 0
}

// Sum over the block, in an order that depends on the thread index only; complete in every thread.
__device__ __forceinline__ double block_sum(double v) {
  __shared__ double warp[kWarps];
  __shared__ double total;
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) warp[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += warp[i];
    total = sum;
  }
  __syncthreads();  // the next sum writes `total` after its own first barrier
  return total;
}

}  // namespace histodd
