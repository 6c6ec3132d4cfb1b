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
  int64_t blocks;   // per image
  int rounds;       // of 4 x 256 pixels per block, without a warp
  double* partial;  // [n, blocks, 12], or null: the gradient of [A|b] is not wanted
};

// The grid's first dimension runs over the parts of an image, the other two over the images.
constexpr int64_t kImagesInGrid = 32768;

__device__ __forceinline__ int64_t image_index() { return static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y; }

template <typename S>
__global__ void prepare_kernel(Small stain, Small warp, Small mean, Small std, const bool* valid, double io, int64_t n,
                               int64_t height, int64_t width, bool grey, Prepared<S>* prepared) {
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
    p.stain.p = static_cast<S>((grey ? 1 : 255) / io);  // of grey levels, or of intensities in [0, 1]
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

// kRounds: of four pixels per thread, all read before the first is worked on.
template <typename S, int kRounds>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const __grid_constant__ Job job, const Prepared<S>* prepared) {
  const int64_t n = image_index(), plane = job.height * job.width, first = 3 * n * plane;
  if (n >= job.n) return;
  const int64_t start = (static_cast<int64_t>(blockIdx.x) * kRounds * kThreads + threadIdx.x) * kPixels;
  const auto pixel = [start](int round) { return start + round * kThreads * kPixels; };
  const auto count = [plane, &pixel](int round) {
    return static_cast<int>(min(static_cast<int64_t>(kPixels), plane - pixel(round)));
  };
  S x[kRounds][3][kPixels];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    if (pixel(r) < plane) load<S>(job.image, first, plane, pixel(r), count(r), x[r]);
  }
  const Prepared<S>& p = prepared[n];
  const bool stained = job.stained && !p.stain.skip, grey = job.image.type == Element::kByte;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    if (pixel(r) >= plane) return;
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      Rgb<S> v{x[r][0][k], x[r][1][k], x[r][2][k]};
      if (stained) {
        v = p.stain.value(v);
      } else if (grey) {
        v = {grey_to_unit(v.r), grey_to_unit(v.g), grey_to_unit(v.b)};
      }
      v = p.finish(v);
      x[r][0][k] = v.r, x[r][1][k] = v.g, x[r][2][k] = v.b;
    }
    store<S>(job.out, first, plane, pixel(r), count(r), x[r]);
  }
}

// A tile of 32 x 32 pixels: 16 x 16 threads, each with the pixels (row + 16 (k / 2), column + 16 (k % 2)), k = 0..3.
struct Tile {
  int row, column;

  __device__ __forceinline__ Tile(int64_t width, unsigned tile) {
    const unsigned across = (static_cast<unsigned>(width) + kTileSide - 1) / kTileSide;
    row = static_cast<int>(tile / across * kTileSide);
    column = static_cast<int>(tile % across * kTileSide);
  }
  static __device__ __forceinline__ int down(int k) { return static_cast<int>(threadIdx.x) / 16 + 16 * (k / 2); }
  static __device__ __forceinline__ int right(int k) { return static_cast<int>(threadIdx.x) % 16 + 16 * (k % 2); }
};

// Where a pixel of the output samples the image, and every 16th below it and to its right. Whole pixels are kept apart,
// so that what is left is small and exact.
template <typename S>
struct Positions {
  Split<S> x, y, xi, xj, yi, yj;
  int height, width;

  __device__ __forceinline__ Positions(const Job& job, const Warp& w, int row, int column)
      : x(Split<S>::of(w.x0 + w.xi * row + w.xj * column)),
        y(Split<S>::of(w.y0 + w.yi * row + w.yj * column)),
        xi(Split<S>::of(16 * w.xi)),
        xj(Split<S>::of(16 * w.xj)),
        yi(Split<S>::of(16 * w.yi)),
        yj(Split<S>::of(16 * w.yj)),
        height(static_cast<int>(job.height)),
        width(static_cast<int>(job.width)) {}
  // 16 i rows below and 16 j columns to the right.
  __device__ __forceinline__ Corners<S> at(int i, int j) const {
    const S a = static_cast<S>(i), b = static_cast<S>(j);
    return {x.rest + a * xi.rest + b * xj.rest,
            x.origin + i * xi.origin + j * xj.origin,
            y.rest + a * yi.rest + b * yj.rest,
            y.origin + i * yi.origin + j * yj.origin,
            height,
            width};
  }
};

template <typename S>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 1 : 4)
    warped_forward_kernel(const __grid_constant__ Job job, const Prepared<S>* prepared) {
  const int64_t n = image_index(), plane = job.height * job.width, first = 3 * n * plane;
  if (n >= job.n) return;
  const Prepared<S>& p = prepared[n];
  const Tile tile(job.width, blockIdx.x);
  const int row = tile.row + Tile::down(0), column = tile.column + Tile::right(0);
  const Positions<S> positions(job, p.warp, row, column);
  const bool stained = job.stained && !p.stain.skip;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int down = 16 * (k / 2), right = 16 * (k % 2);
    if (row + down >= job.height || column + right >= job.width) continue;
    Rgb<S> v = sample<S>(job.image, first, plane, positions.at(k / 2, k % 2));
    if (stained) v = p.stain.value(v);
    store_one<S>(job.out, first, plane, (row + down) * job.width + column + right, p.finish(v));
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

// Without a warp. kSums: the gradient of [A|b] is wanted.
template <typename S, bool kSums>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 1
                                            : kSums        ? 2
                                                           : 3)
    backward_kernel(const __grid_constant__ Job job, const Prepared<S>* prepared) {
  const int64_t n = image_index(), plane = job.height * job.width, first = 3 * n * plane;
  if (n >= job.n) return;
  const Prepared<S>& p = prepared[n];
  const bool stained = job.stained && !p.stain.skip;
  StainSums<S> sums;
#pragma unroll 1
  for (int round = 0; round < job.rounds; ++round) {
    const int64_t pixel = ((static_cast<int64_t>(blockIdx.x) * job.rounds + round) * kThreads + threadIdx.x) * kPixels;
    if (pixel >= plane) break;
    const int count = static_cast<int>(min(static_cast<int64_t>(kPixels), plane - pixel));
    S g[3][kPixels], x[3][kPixels];
    load<S>(job.out, first, plane, pixel, count, g);
    if (stained) load<S>(job.image, first, plane, pixel, count, x);
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      Rgb<S> d = p.finish_vjp({g[0][k], g[1][k], g[2][k]});
      if (stained && k < count) {
        const typename Stain<S>::Vjp v = p.stain.vjp({x[0][k], x[1][k], x[2][k]}, d);
        if constexpr (kSums) sums.add(v);
        d = v.d;
      }
      g[0][k] = d.r, g[1][k] = d.g, g[2][k] = d.b;
    }
    if (job.grad_image.data) store<S>(job.grad_image, first, plane, pixel, count, g);
  }
  if constexpr (kSums) sums.write(job.partial + 12 * (n * job.blocks + blockIdx.x));
}

// With a warp: the gradient of [A|b].
template <typename S>
__global__ void __launch_bounds__(kThreads)
    warped_sums_kernel(const __grid_constant__ Job job, const Prepared<S>* prepared) {
  const int64_t n = image_index(), plane = job.height * job.width, first = 3 * n * plane;
  if (n >= job.n) return;
  const Prepared<S>& p = prepared[n];
  StainSums<S> sums;
  if (!p.stain.skip) {
    const Tile tile(job.width, blockIdx.x);
    const int row = tile.row + Tile::down(0), column = tile.column + Tile::right(0);
    const Positions<S> positions(job, p.warp, row, column);
#pragma unroll 1
    for (int k = 0; k < 4; ++k) {
      const int down = 16 * (k / 2), right = 16 * (k % 2);
      if (row + down >= job.height || column + right >= job.width) continue;
      const int64_t pixel = (row + down) * job.width + column + right;
      const Rgb<S> d = p.finish_vjp(load_one<S>(job.out, first, plane, pixel));
      sums.add(p.stain.vjp(sample<S>(job.image, first, plane, positions.at(k / 2, k % 2)), d));
    }
  }
  sums.write(job.partial + 12 * (n * job.blocks + blockIdx.x));
}

// Which pixels of the output a warp lets sample near a pixel of the image: the inverse of its linear part. Where it has
// none that is of use, any pixel may.
struct Inverse {
  double ix, iy, jx, jy;  // of row and column of the output, by x and y in the image
  bool usable;

  __device__ explicit Inverse(const Warp& w) {
    const double determinant = w.xi * w.yj - w.xj * w.yi;
    ix = w.yj / determinant, iy = -w.xj / determinant;
    jx = -w.yi / determinant, jy = w.xi / determinant;
    usable = fabs(ix) + fabs(iy) + fabs(jx) + fabs(jy) < 1e6;  // false for NaN
  }
};

struct Range {
  int begin, end;

  // Integers within `reach` of a position, and of [0, size).
  template <typename S>
  static __device__ __forceinline__ Range around(S position, S reach, int size, bool usable) {
    if (!usable) return {0, size};
    const S low = ceil(position - reach), high = floor(position + reach) + S(1);
    return {low > S(0) ? static_cast<int>(min(low, static_cast<S>(size))) : 0,
            high > S(0) ? static_cast<int>(min(high, static_cast<S>(size))) : 0};
  }
};

// Whether pixels [top, top + height) x [left, left + width) of the output may sample a tile, or next to it.
__device__ __noinline__ bool touches(const Warp& w, int top, int left, int height, int width, const Tile& tile) {
  const double x = w.x0 + w.xi * top + w.xj * left - tile.column, xi = w.xi * (height - 1), xj = w.xj * (width - 1);
  const double y = w.y0 + w.yi * top + w.yj * left - tile.row, yi = w.yi * (height - 1), yj = w.yj * (width - 1);
  return x + fmax(xi, 0.0) + fmax(xj, 0.0) > -2 && x + fmin(xi, 0.0) + fmin(xj, 0.0) < kTileSide + 1 &&
         y + fmax(yi, 0.0) + fmax(yj, 0.0) > -2 && y + fmin(yi, 0.0) + fmin(yj, 0.0) < kTileSide + 1;
}

constexpr double kMargin = 1e-3;  // pixels; more than the rounding of a position
constexpr int kGathered = 36864;  // bytes of shared memory

// With a warp: the gradient of the image. A block has a tile of the image. It computes the gradients of the pixels of
// the output that may have sampled there, as many at a time as fit into shared memory, from which every pixel of the
// tile gathers its own, in a fixed order.
template <typename S>
__global__ void __launch_bounds__(kThreads, sizeof(S) == 8 ? 1 : 3)
    warped_backward_kernel(const __grid_constant__ Job job, const Prepared<S>* prepared) {
  constexpr int kCapacity = kGathered / (3 * sizeof(S)), kWidest = 64;
  __shared__ S gathered[3][kCapacity];
  const int64_t n = image_index(), plane = job.height * job.width, first = 3 * n * plane;
  if (n >= job.n) return;
  const Prepared<S>& p = prepared[n];
  const Warp& w = p.warp;
  const int height = static_cast<int>(job.height), width = static_cast<int>(job.width);
  const bool stained = job.stained && !p.stain.skip;
  const Tile tile(job.width, blockIdx.x);
  const Inverse inverse(w);
  // The tile and one pixel around it, seen from the output.
  constexpr double kHalf = 0.5 * (kTileSide + 1);
  const double cx = tile.column + 0.5 * (kTileSide - 1) - w.x0, cy = tile.row + 0.5 * (kTileSide - 1) - w.y0;
  const Range rows = Range::around(inverse.ix * cx + inverse.iy * cy,
                                   kHalf * (fabs(inverse.ix) + fabs(inverse.iy)) + kMargin, height, inverse.usable);
  const Range columns = Range::around(inverse.jx * cx + inverse.jy * cy,
                                      kHalf * (fabs(inverse.jx) + fabs(inverse.jy)) + kMargin, width, inverse.usable);
  const int across = min(columns.end - columns.begin, kWidest), most = across > 0 ? kCapacity / across : 1;
  S sum[4][3] = {};
  for (int top = rows.begin; top < rows.end; top += most) {
    for (int left = columns.begin; left < columns.end; left += across) {
      const int chunk_height = min(most, rows.end - top), chunk_width = min(across, columns.end - left);
      // Without this a warp that has no inverse would have every pair of pixels looked at.
      if (!inverse.usable && !touches(w, top, left, chunk_height, chunk_width, tile)) continue;
      __syncthreads();  // the chunk before has been read
      {
        const int down = Tile::down(0), right = Tile::right(0);
        const Positions<S> positions(job, w, top + down, left + right);
        for (int i = 0; down + 16 * i < chunk_height; ++i) {
          for (int j = 0; right + 16 * j < chunk_width; ++j) {
            const int row = down + 16 * i, column = right + 16 * j;
            const int64_t pixel = static_cast<int64_t>(top + row) * width + left + column;
            Rgb<S> d = p.finish_vjp(load_one<S>(job.out, first, plane, pixel));
            if (stained) d = p.stain.vjp(sample<S>(job.image, first, plane, positions.at(i, j)), d).d;
            const int at = row * chunk_width + column;
            gathered[0][at] = d.r, gathered[1][at] = d.g, gathered[2][at] = d.b;
          }
        }
      }
      __syncthreads();
      const S xi = static_cast<S>(w.xi), xj = static_cast<S>(w.xj);
      const S yi = static_cast<S>(w.yi), yj = static_cast<S>(w.yj);
      const S reach_i = static_cast<S>(fabs(inverse.ix) + fabs(inverse.iy) + kMargin);
      const S reach_j = static_cast<S>(fabs(inverse.jx) + fabs(inverse.jy) + kMargin);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const double x = tile.column + Tile::right(k) - w.x0, y = tile.row + Tile::down(k) - w.y0;
        const Range is =
            Range::around(static_cast<S>(inverse.ix * x + inverse.iy * y - top), reach_i, chunk_height, inverse.usable);
        const Range js =
            Range::around(static_cast<S>(inverse.jx * x + inverse.jy * y - left), reach_j, chunk_width, inverse.usable);
        // How far the first of them samples from this pixel.
        const double i0 = top + is.begin, j0 = left + js.begin;
        S dx = static_cast<S>(w.xi * i0 + w.xj * j0 - x), dy = static_cast<S>(w.yi * i0 + w.yj * j0 - y);
        for (int i = is.begin; i < is.end; ++i, dx += xi, dy += yi) {
          S ex = dx, ey = dy;
          for (int j = js.begin; j < js.end; ++j, ex += xj, ey += yj) {
            const S weight = Neighbours<S>::hat(ex) * Neighbours<S>::hat(ey);
            if (!(weight > S(0))) continue;
            const int at = i * chunk_width + j;
            sum[k][0] += weight * gathered[0][at];
            sum[k][1] += weight * gathered[1][at];
            sum[k][2] += weight * gathered[2][at];
          }
        }
      }
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int row = tile.row + Tile::down(k), column = tile.column + Tile::right(k);
    if (row >= height || column >= width) continue;
    store_one<S>(job.grad_image, first, plane, static_cast<int64_t>(row) * width + column,
                 {sum[k][0], sum[k][1], sum[k][2]});
  }
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
