// What one block does with an image or a part of it: reads pixels, sums moments, selects percentiles.
#pragma once

#include <limits>
#include <type_traits>

#include "../macenko_fit.h"
#include "launch.cuh"
#include "select.cuh"

namespace histodd {

template <typename T>
constexpr int kFitThreads = sizeof(T) == 4 ? 640 : 512;
constexpr int kMostWarps = 20;
constexpr int kFlushPixels = 16;  // float32 partial sums go into a double after this many pixels

// ---- Pixels ---------------------------------------------------------------------------------------------------------

// Optical densities of pixel i, wherever its three values lie. Planar or channels_last by the two strides.
template <typename In, typename T>
struct Pixels {
  const In* data;
  int64_t channel, step;
  Density<T> density;
  const T* table;  // of the 256 grey levels, in shared memory; for uint8 only

  __device__ __forceinline__ T one(int64_t i, int c, bool& bad) const {
    const In x = data[i * step + c * channel];
    if constexpr (std::is_same_v<In, uint8_t>) {
      return table[x];
    } else {
      const T v = static_cast<T>(x);
      bad = bad || !in_range(v);
      return optical_density(v, density);
    }
  }
  // Returns whether a value is out of range.
  __device__ __forceinline__ bool get(int64_t i, T& r, T& g, T& b) const {
    bool bad = false;
    r = one(i, 0, bad);
    g = one(i, 1, bad);
    b = one(i, 2, bad);
    return bad;
  }
};

template <typename Source>
struct Strided {  // every step-th pixel
  const Source& source;
  int64_t step;
  template <typename T>
  __device__ __forceinline__ bool get(int64_t i, T& r, T& g, T& b) const {
    return source.get(i * step, r, g, b);
  }
};

template <typename T>
struct Sample {  // optical densities kept by the first pass over a large image
  const T* od;
  int64_t size;
  __device__ __forceinline__ bool get(int64_t i, T& r, T& g, T& b) const {
    r = od[i];
    g = od[i + size];
    b = od[i + 2 * size];
    return false;
  }
};

template <typename T, typename Source, typename Keys>
struct KeysOf {
  const Source& source;
  const Keys& keys;
  __device__ __forceinline__ void operator()(int64_t i, T& first, T& second) const {
    T r, g, b;
    source.get(i, r, g, b);
    keys(r, g, b, first, second);
  }
};

template <typename T>
struct KeptKeys {
  const T *first_list, *second_list;
  int64_t first_count, second_count;
  __device__ __forceinline__ void operator()(int64_t i, T& first, T& second) const {
    first = i < first_count ? first_list[i] : static_cast<T>(NAN);
    second = i < second_count ? second_list[i] : static_cast<T>(NAN);
  }
};

// No key is larger: angle keys end at 2, concentrations where every density is at its largest.
template <typename T>
__device__ __forceinline__ T key_bound(const AngleKeys<T>&, int, T) {
  return T(2);
}
template <typename T>
__device__ __forceinline__ T key_bound(const ConcentrationKeys<T>& keys, int stream, T largest_density) {
  const T* w = stream == 0 ? keys.u : keys.v;
  return (fabs(w[0]) + fabs(w[1]) + fabs(w[2])) * largest_density + T(1e-6);
}

// ---- What a block does ----------------------------------------------------------------------------------------------

struct FitShared {
  union {
    SelectShared select;
    double sums[10][kMostWarps];
  };
  Plane plane;
  Stains stains;
  double tissue;
  int outcome;  // a status that ends the fit, or -1 to go on
};

struct BlockMoments {  // complete in thread 0
  Moments moments;
  bool bad;  // in every thread
};

// Over pixels [begin, end), in an order that depends on the thread index only.
template <typename T, typename Source, typename Visit>
__device__ BlockMoments block_moments(const Source& pixels, int64_t begin, int64_t end, T beta, FitShared& s,
                                      const Visit& visit) {
  double total[10] = {};
  T part[10] = {};
  bool bad = false;
  int pending = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kFitThreads<T>) {
    T r, g, b;
    bad = pixels.get(i, r, g, b) || bad;
    visit(i, r, g, b);
    if (is_tissue(r, g, b, beta)) {
      const T value[10] = {T(1), r, g, b, r * r, r * g, r * b, g * g, g * b, b * b};
#pragma unroll
      for (int k = 0; k < 10; ++k) part[k] += value[k];
    }
    if (++pending == kFlushPixels) {
      pending = 0;
#pragma unroll
      for (int k = 0; k < 10; ++k) {
        total[k] += part[k];
        part[k] = 0;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < 10; ++k) {
    const double sum = warp_sum(total[k] + part[k]);
    if (threadIdx.x % 32 == 0) s.sums[k][threadIdx.x / 32] = sum;
  }
  BlockMoments out;
  out.bad = __syncthreads_or(bad);
  if (threadIdx.x == 0) {
    double sum[10] = {};
    for (int k = 0; k < 10; ++k) {
      for (int w = 0; w < kFitThreads<T> / 32; ++w) sum[k] += s.sums[k][w];
    }
    out.moments.count = sum[0];
    for (int k = 0; k < 3; ++k) out.moments.sum[k] = sum[1 + k];
    for (int k = 0; k < 6; ++k) out.moments.product[k] = sum[4 + k];
  }
  return out;
}

// By thread 0.
static __device__ __noinline__ void decide_plane(const Moments& m, bool bad, int64_t pixels, const FitOptions& o,
                                                 Plane& plane, double& tissue, int& outcome) {
  tissue = m.count;
  outcome = -1;
  if (bad) {
    outcome = kFitOutOfRange;
  } else if (too_little_tissue(m.count, pixels, o)) {
    outcome = kFitLittleTissue;
  } else {
    plane = principal_plane(m, o.sign_by_first);
    if (plane.flat) outcome = kFitDegenerate;
  }
}

template <typename T, typename Source, typename Keys>
__device__ Tails select_keys(const Source& source, const Keys& keys, int64_t n, const TailRanks& ranks, bool linear,
                             T largest_density, SelectShared& s) {
  return select_tails(KeysOf<T, Source, Keys>{source, keys}, n, key_bound(keys, 0, largest_density),
                      key_bound(keys, 1, largest_density), ranks, linear, s);
}

// Thresholds that a little more than the wanted keys reach, from a sample of the pixels; count: how many keys are not
// NaN among all pixels. The whole block; `from` and `kept` may lie in shared or in device memory and are written by
// threads 0 and 1.
template <typename T, typename Source, typename Keys>
__device__ void guess_thresholds(const Source& sample, int64_t samples, const Keys& keys, const TailRanks& ranks,
                                 int64_t count, T largest_density, SelectShared& s, T* from, unsigned long long* kept) {
  __shared__ int counted;
  if (threadIdx.x == 0) counted = 0;
  __syncthreads();
  int mine = 0;
  for (int64_t i = threadIdx.x; i < samples; i += kFitThreads<T>) {
    T r, g, b, first, second;
    sample.get(i, r, g, b);
    keys(r, g, b, first, second);
    mine += second == second;
  }
  for (int offset = 16; offset > 0; offset >>= 1) mine += __shfl_down_sync(0xffffffffu, mine, offset);
  if (threadIdx.x % 32 == 0) atomicAdd(&counted, mine);
  __syncthreads();
  const int64_t n = counted;
  TailRanks wanted;
  bool guess[2];
  for (int k = 0; k < 2; ++k) {
    const int64_t rank = sample_rank(ranks.from_top[k], count, n);
    guess[k] = rank >= 0;
    wanted.from_top[k] = guess[k] ? rank : 0;
  }
  Tails tails{};
  if (guess[0] || guess[1]) {
    tails = select_keys(sample, keys, samples, wanted, false, largest_density, s);
  }
  if (threadIdx.x < 2) {
    const int k = threadIdx.x;
    from[k] = guess[k] ? static_cast<T>(tails.value[k]) : -std::numeric_limits<T>::infinity();
    kept[k] = 0;
  }
}

// Of pixels [begin, end): writes the keys that reach their thresholds, in any order.
template <typename T, typename Source, typename Keys>
__device__ void keep_tails(const Source& source, const Keys& keys, int64_t begin, int64_t end, const T* from,
                           unsigned long long* kept, T* const* list, int64_t capacity) {
  const T from0 = from[0], from1 = from[1];
  for (int64_t i = begin + threadIdx.x; i < end; i += kFitThreads<T>) {
    T r, g, b, key[2];
    source.get(i, r, g, b);
    keys(r, g, b, key[0], key[1]);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (!(key[k] >= (k ? from1 : from0))) continue;
      const int64_t place = static_cast<int64_t>(atomicAdd(&kept[k], 1ull));
      if (place < capacity) list[k][place] = key[k];
    }
  }
}

// Selects among the kept keys; where these are too few or too many, among all.
template <typename T, typename Source, typename Keys>
__device__ Tails select_kept(const Source& source, const Keys& keys, int64_t pixels, const TailRanks& ranks,
                             bool linear, T largest_density, SelectShared& s, const unsigned long long* kept,
                             T* const* list, int64_t capacity) {
  const int64_t held[2] = {static_cast<int64_t>(kept[0]), static_cast<int64_t>(kept[1])};
  bool complete = true;
  for (int k = 0; k < 2; ++k) complete = complete && held[k] > ranks.from_top[k] && held[k] <= capacity;
  if (!complete) return select_keys(source, keys, pixels, ranks, linear, largest_density, s);
  return select_tails(KeptKeys<T>{list[0], list[1], held[0], held[1]}, max(held[0], held[1]),
                      key_bound(keys, 0, largest_density), key_bound(keys, 1, largest_density), ranks, linear, s);
}

template <typename T>
struct Outputs {
  T *matrix, *top;
  uint8_t* status;
  __device__ void write(int64_t image, const Fit& fit) const {
    for (int k = 0; k < 6; ++k) matrix[6 * image + k] = static_cast<T>(fit.matrix[k / 2][k % 2]);
    for (int k = 0; k < 2; ++k) top[2 * image + k] = static_cast<T>(fit.top[k]);
    status[image] = fit.status;
  }
};

// What a kernel needs to know about the batch.
template <typename In, typename T>
struct Batch {
  const In* images;
  int64_t pixels, channel, step;
  FitOptions options;
  Density<T> density;
  T largest_density;
  Outputs<T> out;

  __device__ Pixels<In, T> source(const In* image, const T* table) const {
    return {image, channel, step, density, table};
  }
  __device__ void fill_table(T* table) const {
    if constexpr (std::is_same_v<In, uint8_t>) {
      for (int i = threadIdx.x; i < 256; i += kFitThreads<T>) table[i] = static_cast<T>(grey_density(i, options));
    }
  }
};

}  // namespace histodd
