// The kernels of stain_augment, forward and backward.
#pragma once

#include "stain_augment.cuh"

namespace histodd {
namespace {

struct Job {
  int64_t n, height, width;
  Image image, out;  // in the backward pass `out` is the gradient of the result
  Image grad_image;  // not null: wanted
  bool stained, warped;
  int64_t blocks;     // per image
  int rounds;         // of 4 x 256 pixels per block, without a warp
  double* partial;    // [n, blocks, 12], or null: the gradient of [A|b] is not wanted
  void* scattered;    // like grad_image, of type S: the sums, with a warp
  long long* fixed;   // the same in fixed point, or null
  unsigned* largest;  // [n]: bits of the largest finite term, as a float
};

template <typename S>
__global__ void prepare_kernel(Small stain, Small warp, Small mean, Small std, const bool* valid, double io, int64_t n,
                               int64_t height, int64_t width, Prepared<S>* prepared) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  Prepared<S>& p = prepared[i];
  p.stain.range = Exponents<S>();
  p.stain.skip = stain.data == nullptr || (valid && !valid[i]);
  if (stain.data) {
    double ab[12];
    for (int k = 0; k < 12; ++k) ab[k] = stain.get(12 * i + k);
    for (int k = 0; k < 9; ++k) p.stain.a[k] = static_cast<S>(ab[4 * (k / 3) + k % 3]);
    for (int k = 0; k < 3; ++k) p.stain.c[k] = static_cast<S>(log2(io / 255) - ab[4 * k + 3] / kLn2);
    p.stain.p = static_cast<S>(255 / io);
    p.stain.q = static_cast<S>(1 / io);
  }
  if (warp.data) {
    double m[6];
    for (int k = 0; k < 6; ++k) m[k] = warp.get(6 * i + k);
    p.warp = Warp::make(m, height, width);
  }
  for (int c = 0; c < 3; ++c) {
    p.scale[c] = mean.data ? static_cast<S>(1 / std.get(c)) : S(1);
    p.shift[c] = mean.data ? static_cast<S>(-mean.get(c) / std.get(c)) : S(0);
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const __grid_constant__ Job job, const Prepared<S>* prepared) {
  const int64_t n = blockIdx.x / job.blocks, plane = job.height * job.width;
  const int64_t pixel = ((blockIdx.x % job.blocks) * kThreads + threadIdx.x) * kPixels;
  if (pixel >= plane) return;
  const int count = static_cast<int>(min(static_cast<int64_t>(kPixels), plane - pixel));
  const Prepared<S>& p = prepared[n];
  S x[3][kPixels];
  load<S>(job.image, 3 * n * plane, plane, pixel, count, x);
  const bool stained = job.stained && !p.stain.skip;
#pragma unroll
  for (int k = 0; k < kPixels; ++k) {
    Rgb<S> v{x[0][k], x[1][k], x[2][k]};
    if (stained) v = p.stain.value(v);
    v = p.finish(v);
    x[0][k] = v.r, x[1][k] = v.g, x[2][k] = v.b;
  }
  store<S>(job.out, 3 * n * plane, plane, pixel, count, x);
}

// A block's tile of the output: thread (lane, warp) has the pixels (row + 8 k, column), k = 0..3.
template <typename S>
struct Tile {
  int64_t n, row, column;
  Split<S> x, y;
  S dx, dy;  // per eight rows

  __device__ Tile(const Job& job, const Prepared<S>* prepared) {
    const int64_t across = (job.width + kTileSide - 1) / kTileSide, tile = blockIdx.x % job.blocks;
    n = blockIdx.x / job.blocks;
    row = tile / across * kTileSide + threadIdx.x / 32;
    column = tile % across * kTileSide + threadIdx.x % 32;
    const Warp w = prepared[n].warp;
    const double i = static_cast<double>(row), j = static_cast<double>(column);
    x = Split<S>::of(w.x0 + w.xi * i + w.xj * j);
    y = Split<S>::of(w.y0 + w.yi * i + w.yj * j);
    dx = static_cast<S>(kWarps * w.xi);
    dy = static_cast<S>(kWarps * w.yi);
  }
  __device__ __forceinline__ Corners<S> corners(const Job& job, int k) const {
    return {x.rest + static_cast<S>(k) * dx, x.origin,
            y.rest + static_cast<S>(k) * dy, y.origin,
            static_cast<int>(job.height),    static_cast<int>(job.width)};
  }
  __device__ __forceinline__ bool inside(const Job& job, int k) const {
    return row + kWarps * k < job.height && column < job.width;
  }
  __device__ __forceinline__ int64_t pixel(const Job& job, int k) const {
    return (row + kWarps * k) * job.width + column;
  }
};

template <typename S>
__global__ void __launch_bounds__(kThreads)
    warped_forward_kernel(const __grid_constant__ Job job, const Prepared<S>* prepared) {
  const Tile<S> tile(job, prepared);
  const Prepared<S>& p = prepared[tile.n];
  const int64_t plane = job.height * job.width, first = 3 * tile.n * plane;
  const bool stained = job.stained && !p.stain.skip;
#pragma unroll
  for (int k = 0; k < kTileSide / kWarps; ++k) {
    if (!tile.inside(job, k)) continue;
    Rgb<S> v = sample<S>(job.image, first, plane, tile.corners(job, k));
    if (stained) v = p.stain.value(v);
    store_one<S>(job.out, first, plane, tile.pixel(job, k), p.finish(v));
  }
}

// The gradient of [A|b] over the pixels of a thread, and then of a block.
template <typename S>
struct StainSums {
  S sum[12] = {};

  __device__ __forceinline__ void add(const typename Stain<S>::Vjp& v) {
    const S h[3] = {v.h.r, v.h.g, v.h.b}, l[3] = {v.l.r, v.l.g, v.l.b};
#pragma unroll
    for (int m = 0; m < 12; ++m) sum[m] += m % 4 == 3 ? -h[m / 4] : h[m / 4] * l[m % 4 % 3];
  }
  __device__ void write(double* partial) const {
    __shared__ double warps[kWarps][12];
#pragma unroll
    for (int m = 0; m < 12; ++m) {
      const double v = warp_sum(static_cast<double>(sum[m]) * (m % 4 == 3 ? 1.0 : kLn2));
      if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32][m] = v;
    }
    __syncthreads();
    if (threadIdx.x >= 12) return;
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += warps[w][threadIdx.x];
    partial[threadIdx.x] = total;
  }
};

template <typename S>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const __grid_constant__ Job job, const Prepared<S>* prepared) {
  const int64_t n = blockIdx.x / job.blocks, plane = job.height * job.width, block = blockIdx.x % job.blocks;
  const Prepared<S>& p = prepared[n];
  const bool stained = job.stained && !p.stain.skip;
  StainSums<S> sums;
  for (int round = 0; round < job.rounds; ++round) {
    const int64_t pixel = ((block * job.rounds + round) * kThreads + threadIdx.x) * kPixels;
    if (pixel >= plane) break;
    const int count = static_cast<int>(min(static_cast<int64_t>(kPixels), plane - pixel));
    S g[3][kPixels], x[3][kPixels];
    load<S>(job.out, 3 * n * plane, plane, pixel, count, g);
    if (stained) load<S>(job.image, 3 * n * plane, plane, pixel, count, x);
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      Rgb<S> d = p.finish_vjp({g[0][k], g[1][k], g[2][k]});
      if (stained && k < count) {
        const typename Stain<S>::Vjp v = p.stain.vjp({x[0][k], x[1][k], x[2][k]}, d);
        if (job.partial) sums.add(v);
        d = v.d;
      }
      g[0][k] = d.r, g[1][k] = d.g, g[2][k] = d.b;
    }
    if (job.grad_image.data) store<S>(job.grad_image, 3 * n * plane, plane, pixel, count, g);
  }
  if (job.partial) sums.write(job.partial + 12 * blockIdx.x);
}

enum class Pass { kLargest, kScatter };

// 2^scale is what a term is multiplied with to become an integer: the sum of one term per pixel of the output, each at
// most `largest`, stays below 2^62.
__device__ __forceinline__ int fixed_point(unsigned largest, int64_t plane) {
  int exponent;
  frexp(static_cast<double>(float_of(largest)), &exponent);
  return 61 - exponent - (64 - __clzll(plane));
}

template <typename S>
__device__ __forceinline__ void add_one(const Job& job, int64_t at, int scale, S v) {
  if (v == S(0)) return;
  if (job.fixed && isfinite(static_cast<float>(v))) {
    const long long term = __double2ll_rn(ldexp(static_cast<double>(v), scale));
    atomicAdd(reinterpret_cast<unsigned long long*>(job.fixed) + at, static_cast<unsigned long long>(term));
  } else {  // what is not finite adds up to the same in any order
    atomicAdd(static_cast<S*>(job.scattered) + at, v);
  }
}

// Adds the gradient of one sampled pixel to its neighbours. Where the pixel of the next lane continues this one's row,
// its left neighbours are this one's right ones, and both are added at once. All lanes of a warp take part.
template <typename S>
__device__ void scatter(const Job& job, int64_t n, bool active, const Corners<S>& at, const Rgb<S>& d, int scale) {
  const int64_t plane = job.height * job.width;
  const int64_t first = active ? at.first : -2, previous = __shfl_up_sync(0xffffffffu, first, 1);
  const bool lane0 = threadIdx.x % 32 == 0, lane31 = threadIdx.x % 32 == 31;
  const int64_t following = __shfl_down_sync(0xffffffffu, first, 1);
  const bool takes = !lane0 && active && previous >= 0 && previous + 1 == first;
  const bool gives = !lane31 && active && following >= 0 && first + 1 == following;
  const S value[3] = {d.r, d.g, d.b};
#pragma unroll
  for (int y = 0; y < 2; ++y) {
    const S weight = y ? at.by : at.ay;
    const int64_t to = at.first + (y ? at.below : 0);
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      S left = active ? weight * at.ax * value[c] : S(0);
      const S right = active ? weight * at.bx * value[c] : S(0);
      const S received = __shfl_up_sync(0xffffffffu, right, 1);
      if (takes) left += received;
      if (!active) continue;
      const int64_t base = 3 * n * plane + (job.grad_image.last ? c : c * plane), step = job.grad_image.last ? 3 : 1;
      add_one(job, base + step * to, scale, left);
      if (!gives) add_one(job, base + step * (to + at.right), scale, right);
    }
  }
}

template <typename S, Pass P>
__global__ void __launch_bounds__(kThreads)
    warped_backward_kernel(const __grid_constant__ Job job, const Prepared<S>* prepared) {
  const Tile<S> tile(job, prepared);
  const Prepared<S>& p = prepared[tile.n];
  const int64_t plane = job.height * job.width, first = 3 * tile.n * plane;
  const bool stained = job.stained && !p.stain.skip;
  const int scale = P == Pass::kScatter && job.fixed ? fixed_point(job.largest[tile.n], plane) : 0;
  StainSums<S> sums;
  float largest = 0;
#pragma unroll 1
  for (int k = 0; k < kTileSide / kWarps; ++k) {
    const bool active = tile.inside(job, k);
    const Corners<S> corners = tile.corners(job, k);
    Rgb<S> d{};
    if (active) {
      d = p.finish_vjp(load_one<S>(job.out, first, plane, tile.pixel(job, k)));
      if (stained) {
        const typename Stain<S>::Vjp v = p.stain.vjp(sample<S>(job.image, first, plane, corners), d);
        if (P == Pass::kScatter && job.partial) sums.add(v);
        d = v.d;
      }
    }
    if constexpr (P == Pass::kLargest) {
      const S values[3] = {d.r, d.g, d.b};
      for (S v : values) {
        const float size = static_cast<float>(abs_of(v));
        if (isfinite(size) && size > largest) largest = size;
      }
    } else if (job.grad_image.data) {
      scatter(job, tile.n, active, corners, d, scale);
    }
  }
  if constexpr (P == Pass::kLargest) {
    // As integers, floats that are not negative have the same order.
    unsigned bits = bits_of(largest);
    for (int offset = 16; offset > 0; offset >>= 1) bits = max(bits, __shfl_down_sync(0xffffffffu, bits, offset));
    if (threadIdx.x % 32 == 0) atomicMax(job.largest + tile.n, bits);
  } else if (job.partial) {
    sums.write(job.partial + 12 * blockIdx.x);
  }
}

// From the sums of a scatter to the gradient of the image, in its type.
template <typename S>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Job job) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, plane = job.height * job.width;
  if (i >= 3 * job.n * plane) return;
  S v = static_cast<const S*>(job.scattered)[i];
  if (job.fixed) {
    const int scale = fixed_point(job.largest[i / (3 * plane)], plane);
    v += static_cast<S>(ldexp(static_cast<double>(job.fixed[i]), -scale));
  }
  with_type<S>(job.grad_image.type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    static_cast<T*>(job.grad_image.data)[i] = static_cast<T>(v);
  });
}

// One warp per value: lanes strided over the blocks, so that the order is fixed.
template <typename T>
__global__ void sum_kernel(const double* partial, int64_t blocks, T* out) {
  const int64_t value = blockIdx.x, n = value / 12;
  double sum = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += 32) sum += partial[12 * (n * blocks + b) + value % 12];
  sum = warp_sum(sum);
  if (threadIdx.x == 0) out[value] = static_cast<T>(sum);
}

}  // namespace
}  // namespace histodd
