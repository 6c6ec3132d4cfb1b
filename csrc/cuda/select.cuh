// Exact selection of a pair of order statistics by one block: radix selection over histograms in shared memory.
// The first digit of a key is its place on a linear scale, which spreads the keys of an image evenly over the bins; the
// further digits are those of its ordered bits. Integer atomics only, so that the result does not depend on their
// order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../macenko_fit.h"

namespace histodd {

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;

struct SelectShared {
  unsigned histogram[2][kBins];
  unsigned long long rank[2];  // from the top, among the keys that share all digits so far
  uint64_t prefix[2];          // those digits, the first one apart
  int first[2];
};

// Place of a key on a scale from -bound to bound: never decreasing in the key.
template <typename T>
__device__ __forceinline__ int linear_bin(T key, T bound) {
  const T place = (key / bound + T(1)) * T(kBins / 2);
  return place < T(0) ? 0 : place >= T(kBins) ? kBins - 1 : static_cast<int>(place);
}

// From the highest bin down: the one that holds the key of this rank. One warp; each lane adds up a stretch of bins.
__device__ __forceinline__ int find_bin(const unsigned* histogram, unsigned long long& rank) {
  constexpr int kStretch = kBins / 32;
  const int lane = threadIdx.x % 32, top = kBins - 1 - lane * kStretch;
  unsigned long long sum = 0;
  for (int i = 0; i < kStretch; ++i) sum += histogram[top - i];
  unsigned long long upto = sum;  // inclusive sum over the lanes
  for (int offset = 1; offset < 32; offset <<= 1) {
    const unsigned long long other = __shfl_up_sync(0xffffffffu, upto, offset);
    if (lane >= offset) upto += other;
  }
  const unsigned holders = __ballot_sync(0xffffffffu, upto > rank);
  const int holder = __ffs(holders) - 1;  // at least the last lane: rank is below the number of keys
  int bin = 0;
  unsigned long long left = 0;
  if (lane == holder) {
    left = rank - (upto - sum);
    bin = top;
    while (left >= histogram[bin]) left -= histogram[bin--];
  }
  bin = __shfl_sync(0xffffffffu, bin, holder);
  rank = __shfl_sync(0xffffffffu, left, holder);
  return bin;
}

// For both streams of `read(i, first, second)`, i in [0, n): the key of rank `from_top`, NaN keys left out. Called by
// the whole block; from_top is below the number of keys that are not NaN; every thread gets the result.
template <typename T, typename Read>
__device__ void select_pair(const Read& read, int64_t n, T bound0, T bound1, const int64_t* from_top, SelectShared& s,
                            double* result) {
  constexpr int kBits = 8 * sizeof(T);
  const int warp = threadIdx.x / 32, threads = static_cast<int>(blockDim.x);
  if (threadIdx.x < 2) {
    s.rank[threadIdx.x] = static_cast<unsigned long long>(from_top[threadIdx.x]);
    s.prefix[threadIdx.x] = 0;
  }
  int known = 0;  // bits of the prefix
  for (int level = 0; known < kBits; ++level) {
    const int digit = level == 0 ? 0 : (kBits - known < kDigitBits ? kBits - known : kDigitBits);
    for (int i = threadIdx.x; i < 2 * kBins; i += threads) s.histogram[i / kBins][i % kBins] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += threads) {
      T key[2];
      read(i, key[0], key[1]);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (key[k] != key[k]) continue;
        const int bin = linear_bin(key[k], k ? bound1 : bound0);
        if (level == 0) {
          atomicAdd(&s.histogram[k][bin], 1u);
          continue;
        }
        const uint64_t bits = ordered_bits(key[k]);
        if (bin != s.first[k] || (known > 0 && (bits >> (kBits - known)) != s.prefix[k])) continue;
        atomicAdd(&s.histogram[k][(bits >> (kBits - known - digit)) & ((1u << digit) - 1)], 1u);
      }
    }
    __syncthreads();
    if (warp < 2) {
      unsigned long long rank = s.rank[warp];
      const int bin = find_bin(s.histogram[warp], rank);
      if (threadIdx.x % 32 == 0) {
        s.rank[warp] = rank;
        if (level == 0) {
          s.first[warp] = bin;
        } else {
          s.prefix[warp] = (s.prefix[warp] << digit) | static_cast<uint64_t>(bin);
        }
      }
    }
    known += digit;
    __syncthreads();
  }
  for (int k = 0; k < 2; ++k) {
    if constexpr (sizeof(T) == 4) {
      result[k] = from_ordered_bits(static_cast<uint32_t>(s.prefix[k]));
    } else {
      result[k] = from_ordered_bits(s.prefix[k]);
    }
  }
  __syncthreads();  // the shared memory may be reused at once
}

// Both ranks of both streams; the one above only where percentiles are interpolated.
template <typename T, typename Read>
__device__ Tails select_tails(const Read& read, int64_t n, T bound0, T bound1, const TailRanks& ranks, bool linear,
                              SelectShared& s) {
  Tails tails;
  select_pair(read, n, bound0, bound1, ranks.from_top, s, tails.value);
  tails.above[0] = tails.value[0];
  tails.above[1] = tails.value[1];
  if (linear) {
    int64_t above[2];
    for (int k = 0; k < 2; ++k) above[k] = ranks.from_top[k] > 0 ? ranks.from_top[k] - 1 : 0;
    select_pair(read, n, bound0, bound1, above, s, tails.above);
  }
  return tails;
}

}  // namespace histodd
