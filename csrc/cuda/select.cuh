// Exact selection of a pair of order statistics by one block: radix selection over histograms in shared memory.
// The first digit of a key is its place on a linear scale, which spreads the keys of an image evenly over the bins. The
// keys that share it with the one that is wanted are listed and ranked if they are few; otherwise the further digits
// are those of the ordered bits. Integer atomics only, and no use of the order they give.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../macenko_fit.h"

namespace histodd {

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;

constexpr int kFew = 512;

struct SelectShared {
  alignas(8) unsigned histogram[2][kBins];
  uint64_t prefix[2];  // digits known so far, the first one apart
  unsigned rank[2];    // from the top, among the keys that share them
  unsigned count[2];   // of the keys that share the first digit
  unsigned listed[2];
  int first[2];
};

// Place of a key on a scale from -bound to bound, scale = kBins / 2 / bound: never decreasing in the key.
template <typename T>
__device__ __forceinline__ int linear_bin(T key, T scale) {
  const T place = key * scale + T(kBins / 2);
  return place < T(0) ? 0 : place >= T(kBins) ? kBins - 1 : static_cast<int>(place);
}

// From the highest bin down: the one that holds the key of this rank, the rank among the bin's keys, and their number.
// By one warp.
__device__ __forceinline__ int find_bin(const unsigned* histogram, unsigned& rank, unsigned& count) {
  constexpr int kStretch = kBins / 32;
  static_assert(kStretch == 64, "a stretch is searched by 32 lanes, two bins each");
  const int lane = threadIdx.x % 32, top = kBins - 1 - lane * kStretch;
  unsigned sum = 0;
  for (int i = 0; i < kStretch; ++i) sum += histogram[top - (i + lane) % kStretch];  // every lane on a bank of its own
  const auto up_to = [lane](unsigned v) {                                            // inclusive sum over the lanes
    for (int offset = 1; offset < 32; offset <<= 1) {
      const unsigned other = __shfl_up_sync(0xffffffffu, v, offset);
      if (lane >= offset) v += other;
    }
    return v;
  };
  unsigned upto = up_to(sum);
  // At least the last lane holds it: the rank is below the number of keys.
  int holder = __ffs(__ballot_sync(0xffffffffu, upto > rank)) - 1;
  rank -= __shfl_sync(0xffffffffu, upto - sum, holder);
  const int first = kBins - 1 - holder * kStretch - 2 * lane;
  const unsigned a = histogram[first], b = histogram[first - 1];
  upto = up_to(a + b);
  holder = __ffs(__ballot_sync(0xffffffffu, upto > rank)) - 1;
  rank -= __shfl_sync(0xffffffffu, upto - a - b, holder);
  const unsigned held = __shfl_sync(0xffffffffu, a, holder), next = __shfl_sync(0xffffffffu, b, holder);
  const int bin = __shfl_sync(0xffffffffu, first, holder);
  if (rank < held) {
    count = held;
    return bin;
  }
  rank -= held;
  count = next;
  return bin - 1;
}

// For both streams of `read(i, first, second)`, i in [0, n): the key of rank `from_top`, NaN keys left out. Called by
// the whole block; from_top is below the number of keys that are not NaN; every thread gets the result. Two passes over
// the keys where few share the first digit of the one that is wanted, otherwise one for every digit.
template <typename T, typename Read>
__device__ void select_pair(const Read& read, int64_t n, T bound0, T bound1, const int64_t* from_top, SelectShared& s,
                            double* result) {
  using Bits = decltype(ordered_bits(T(0)));
  constexpr int kBits = 8 * sizeof(T);
  static_assert(kFew * sizeof(Bits) <= sizeof(s.histogram[0]), "the few keys lie where the histogram was");
  const int warp = threadIdx.x / 32, threads = static_cast<int>(blockDim.x);
  const T scale0 = T(kBins / 2) / bound0, scale1 = T(kBins / 2) / bound1;
  if (threadIdx.x < 2) {
    s.rank[threadIdx.x] = static_cast<unsigned>(from_top[threadIdx.x]);
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
        const int bin = linear_bin(key[k], k ? scale1 : scale0);
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
      unsigned rank = s.rank[warp], count;
      const int bin = find_bin(s.histogram[warp], rank, count);
      __syncwarp();
      if (threadIdx.x % 32 == 0) {
        s.rank[warp] = rank;
        if (level == 0) {
          s.first[warp] = bin;
          s.count[warp] = count;
          s.listed[warp] = 0;
        } else {
          s.prefix[warp] = (s.prefix[warp] << digit) | static_cast<uint64_t>(bin);
        }
      }
    }
    known += digit;
    __syncthreads();
    if (level > 0 || s.count[0] > kFew || s.count[1] > kFew) continue;
    for (int64_t i = threadIdx.x; i < n; i += threads) {
      T key[2];
      read(i, key[0], key[1]);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (key[k] != key[k] || linear_bin(key[k], k ? scale1 : scale0) != s.first[k]) continue;
        reinterpret_cast<Bits*>(s.histogram[k])[atomicAdd(&s.listed[k], 1u)] = ordered_bits(key[k]);
      }
    }
    __syncthreads();
    for (int t = threadIdx.x; t < 2 * kFew; t += threads) {
      const int k = t / kFew;
      const unsigned mine = t % kFew, count = s.count[k];
      if (mine >= count) continue;
      const Bits* keys = reinterpret_cast<const Bits*>(s.histogram[k]);
      unsigned larger = 0, equal = 0;
      for (unsigned j = 0; j < count; ++j) {
        larger += keys[j] > keys[mine];
        equal += keys[j] == keys[mine];
      }
      if (larger <= s.rank[k] && s.rank[k] < larger + equal)
        s.prefix[k] = keys[mine];  // the same by all that are equal
    }
    __syncthreads();
    break;
  }
  for (int k = 0; k < 2; ++k) result[k] = from_ordered_bits(static_cast<Bits>(s.prefix[k]));
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
