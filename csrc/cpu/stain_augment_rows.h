// The float32 kernels of stain_augment on rows of pixels, included once per instruction set by a file that names it in
// HISTODD_ISA. Chunks of pixels pass through buffers that stay in the first-level cache: load (or gather), apply,
// store. Loops are plain, for the compiler to vectorise; nothing here may have external linkage but the table at the
// end.
#include "stain_augment_kernels.h"

namespace histodd {
namespace {
namespace HISTODD_ISA {

#if defined(__GNUC__) && !defined(__clang__)
#define HISTODD_SCALAR __attribute__((noinline, optimize("no-tree-vectorize,no-tree-slp-vectorize")))
#else
#define HISTODD_SCALAR
#endif

constexpr int kChunk = 256;
constexpr int kWorthATable = 1024;  // pixels

constexpr int kTile = 64, kTileRows = 32;  // of the output, with a warp
constexpr int kBlock = 32;                 // pixels whose sampling positions are relative to one origin

struct Rows {
  alignas(64) float c[3][kChunk];
};

HISTODD_INLINE float to_float(uint8_t v) { return static_cast<float>(v); }
HISTODD_INLINE float to_float(float v) { return v; }
HISTODD_INLINE float to_float(c10::BFloat16 v) { return float_of(static_cast<uint32_t>(v.x) << 16); }
HISTODD_INLINE float to_float(c10::Half v) { return static_cast<float>(v); }

// To the scale [0, 1]; the division is exact, so that grey levels come out as they do elsewhere.
template <typename T>
HISTODD_INLINE float to_unit(T v) {
  return sizeof(T) == 1 ? to_float(v) / 255.0f : to_float(v);
}

// Pixel `first` on, of one image. The channels of a float image in planes are used where they are.
template <typename T>
void load(const T* image, bool last, int64_t plane, int64_t first, int count, Rows& rows, const float* x[3]) {
  for (int c = 0; c < 3; ++c) {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (!last) {
        x[c] = image + c * plane + first;
        continue;
      }
    }
    float* to = rows.c[c];
    x[c] = to;
    if (last) {
      const T* from = image + 3 * first + c;
#pragma omp simd
      for (int k = 0; k < count; ++k) to[k] = to_unit(from[3 * k]);
    } else {
      const T* from = image + c * plane + first;
#pragma omp simd
      for (int k = 0; k < count; ++k) to[k] = to_unit(from[k]);
    }
  }
}

// Where the result of a chunk goes first: straight to the image if that is float in planes, else to rows, to be stored.
template <typename T>
bool place(T* image, bool last, int64_t plane, int64_t first, Rows& rows, float* to[3]) {
  const bool direct = std::is_same_v<T, float> && !last;
  for (int c = 0; c < 3; ++c) to[c] = direct ? reinterpret_cast<float*>(image) + c * plane + first : rows.c[c];
  return direct;
}

template <typename T>
void store(const Rows& rows, T* image, bool last, int64_t plane, int64_t first, int count) {
  for (int c = 0; c < 3; ++c) {
    const float* from = rows.c[c];
    T* to = last ? image + 3 * first + c : image + c * plane + first;
    if (last) {
      for (int k = 0; k < count; ++k) to[3 * k] = static_cast<T>(from[k]);
    } else {
#pragma omp simd
      for (int k = 0; k < count; ++k) to[k] = static_cast<T>(from[k]);
    }
  }
}

#include "stain_augment_warp.h"

void stain_forward(const Stain<float>& stain, const float* const x[3], float* const y[3], const StainJob& job,
                   int count) {
  const Stain<float> s = stain;
  const float s0 = job.scale[0], s1 = job.scale[1], s2 = job.scale[2];
  const float t0 = job.shift[0], t1 = job.shift[1], t2 = job.shift[2];
  const float *x0 = x[0], *x1 = x[1], *x2 = x[2];
  float *y0 = y[0], *y1 = y[1], *y2 = y[2];
#pragma omp simd
  for (int k = 0; k < count; ++k) {
    const Rgb<float> v = s.value({x0[k], x1[k], x2[k]});
    y0[k] = v.r * s0 + t0;
    y1[k] = v.g * s1 + t1;
    y2[k] = v.b * s2 + t2;
  }
}

// Whether the exponents of all bytes, and every part of them, stay within the range of float: not so for a stain far
// from any real one.
bool moderate(const Stain<float>& s) {
  const float black = abs_of(log2_of(s.q)), white = abs_of(log2_of(s.p + s.q));
  for (int i = 0; i < 3; ++i) {
    const float sum = abs_of(s.a[3 * i]) + abs_of(s.a[3 * i + 1]) + abs_of(s.a[3 * i + 2]);
    const float reach = sum * (black > white ? black : white) + abs_of(s.c[i]);
    if (!(reach < 120.0f)) return false;  // NaN too
  }
  return true;
}

#ifdef HISTODD_VBMI
#include "stain_augment_bytes_vbmi.h"
#else
#include "stain_augment_bytes.h"
#endif

// d = gradient of x for the gradient g of the result; l and h as in Stain::vjp, if asked for.
template <bool kSums>
void stain_backward(const Stain<float>& stain, const float* const x[3], const float* const g[3], const StainJob& job,
                    int count, float* const d[3], Rows& l, Rows& h) {
  const Stain<float> s = stain;
  const float s0 = job.scale[0], s1 = job.scale[1], s2 = job.scale[2];
  const float *x0 = x[0], *x1 = x[1], *x2 = x[2], *g0 = g[0], *g1 = g[1], *g2 = g[2];
  float *d0 = d[0], *d1 = d[1], *d2 = d[2];
#pragma omp simd
  for (int k = 0; k < count; ++k) {
    const Stain<float>::Vjp v = s.vjp({x0[k], x1[k], x2[k]}, {g0[k] * s0, g1[k] * s1, g2[k] * s2});
    d0[k] = v.d.r;
    d1[k] = v.d.g;
    d2[k] = v.d.b;
    if constexpr (!kSums) continue;
    l.c[0][k] = v.l.r;
    l.c[1][k] = v.l.g;
    l.c[2][k] = v.l.b;
    h.c[0][k] = v.h.r;
    h.c[1][k] = v.h.g;
    h.c[2][k] = v.h.b;
  }
}

// Adds the gradient of [A|b] over one chunk.
void add_stain_sums(const Rows& l, const Rows& h, int count, double* sums) {
  for (int i = 0; i < 3; ++i) {
    const float* hi = h.c[i];
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int k = 0; k < count; ++k) {
      s0 += hi[k] * l.c[0][k];
      s1 += hi[k] * l.c[1][k];
      s2 += hi[k] * l.c[2][k];
      s3 += hi[k];
    }
    sums[4 * i] += kLn2 * s0;
    sums[4 * i + 1] += kLn2 * s1;
    sums[4 * i + 2] += kLn2 * s2;
    sums[4 * i + 3] -= s3;
  }
}

void scale_shift(const float* const x[3], float* const y[3], const float* scale, const float* shift, int count) {
  for (int c = 0; c < 3; ++c) {
    const float *from = x[c], s = scale[c], t = shift[c];
    float* to = y[c];
#pragma omp simd
    for (int k = 0; k < count; ++k) to[k] = from[k] * s + t;
  }
}

// f(first pixel, number of pixels, row, column) for chunks of the rows [begin, end). Without a warp rows run into each
// other. With one they go in tiles, whose footprint in the image fits the first-level cache, and while one tile is
// worked on the next one's footprint is asked for.
template <typename F>
void for_chunks(const StainJob& job, int64_t begin, int64_t end, F& f) {
  const auto part = [](int64_t left, int64_t most) { return left < most ? left : most; };
  if (!job.warp) {
    for (int64_t p = begin * job.w; p < end * job.w; p += kChunk) f(p, part(end * job.w - p, kChunk), 0, 0);
    return;
  }
  for (int64_t i0 = begin; i0 < end; i0 += kTileRows) {
    const int64_t rows = part(end - i0, kTileRows);
    for (int64_t j = 0; j < job.w; j += kTile) {
      Box next;
      if (j + kTile < job.w) {
        next = Box(*f.warp, i0, j + kTile, rows, part(job.w - j - kTile, kTile), job.h, job.w);
      } else if (i0 + rows < end) {
        next = Box(*f.warp, i0 + rows, 0, part(end - i0 - rows, kTileRows), part(job.w, kTile), job.h, job.w);
      }
      const int64_t height = next.bottom - next.top;
      for (int64_t r = 0; r < rows; ++r) {
        prefetch(f.image, job, next, next.top + height * r / rows, next.top + height * (r + 1) / rows);
        f((i0 + r) * job.w + j, part(job.w - j, kTile), i0 + r, j);
      }
    }
  }
}

template <typename In, typename Out>
struct Forward {
  const StainJob& job;
  const In* image;
  Out* out;
  const Stain<float>* stain;  // null: skipped
  const Warp* warp;
  const ByteTable* table;  // null: not used
  Rows in_rows, out_rows;
  Footprint footprint;
  Pairs<In> pairs;

  void operator()(int64_t first, int64_t size, int64_t i, int64_t j) {
    const int64_t plane = job.h * job.w;
    const int count = static_cast<int>(size);
    float* y[3];
    const bool direct = place(out, job.out_last, plane, first, out_rows, y);
    if constexpr (sizeof(In) == 1) {
      if (table) {
        stain_bytes(*table, image, job.image_last, plane, first, count, y, job);
        if (!direct) store(out_rows, out, job.out_last, plane, first, count);
        return;
      }
    }
    const float* x[3];
    if (warp) {
      const int height = static_cast<int>(job.h), width = static_cast<int>(job.w);
      find_footprint(*warp, i, j, count, height, width, footprint);
      gather(image, job.image_last, plane, width, footprint, count, pairs, in_rows);
      for (int c = 0; c < 3; ++c) x[c] = in_rows.c[c];
    } else {
      load(image, job.image_last, plane, first, count, in_rows, x);
    }
    if (stain) {
      stain_forward(*stain, x, y, job, count);
    } else {
      scale_shift(x, y, job.scale, job.shift, count);
    }
    if (!direct) store(out_rows, out, job.out_last, plane, first, count);
  }
};

template <typename In, typename Out>
struct Backward {
  const StainJob& job;
  const In* image;
  const Out* grad;
  In* grad_image;  // null: not wanted, or a warp's scratch takes it
  const Stain<float>* stain;
  const Warp* warp;
  float* scratch;
  double* sums;
  Rows in_rows, grad_rows, d, l, h;
  Footprint footprint;
  Pairs<In> pairs;

  void operator()(int64_t first, int64_t size, int64_t i, int64_t j) {
    const int64_t plane = job.h * job.w;
    const int height = static_cast<int>(job.h), width = static_cast<int>(job.w), count = static_cast<int>(size);
    const float *x[3], *g[3];
    if (warp) find_footprint(*warp, i, j, count, height, width, footprint);
    load(grad, job.out_last, plane, first, count, grad_rows, g);
    float* to[3] = {d.c[0], d.c[1], d.c[2]};
    const bool direct = grad_image && place(grad_image, job.image_last, plane, first, d, to);
    if (stain) {
      if (warp) {
        gather(image, job.image_last, plane, width, footprint, count, pairs, in_rows);
        for (int c = 0; c < 3; ++c) x[c] = in_rows.c[c];
      } else {
        load(image, job.image_last, plane, first, count, in_rows, x);
      }
      if (sums) {
        stain_backward<true>(*stain, x, g, job, count, to, l, h);
        add_stain_sums(l, h, count, sums);
      } else {
        stain_backward<false>(*stain, x, g, job, count, to, l, h);
      }
    } else {
      const float zero[3] = {0, 0, 0};
      scale_shift(g, to, job.scale, zero, count);
    }
    if (scratch) {
      scatter(d, footprint, count, width, scratch);
    } else if (grad_image && !direct) {
      store(d, grad_image, job.image_last, plane, first, count);
    }
  }
};

template <typename T>
T* image_at(const void* data, const StainJob& job, int64_t n) {
  return static_cast<T*>(const_cast<void*>(data)) + n * 3 * job.h * job.w;
}

const Stain<float>* stain_of(const StainJob& job, int64_t n) {
  return job.stain && !job.stain[n].skip ? job.stain + n : nullptr;
}

template <typename In, typename Out>
void forward(const StainJob& job, int64_t n, int64_t begin, int64_t end) {
  const Stain<float>* stain = stain_of(job, n);
  const ByteTable* use = nullptr;
  ByteTable table;
  if (sizeof(In) == 1 && stain && !job.warp && job.h * job.w >= kWorthATable) {
    if (table.fill(*stain)) use = &table;
  }
  Forward<In, Out> f{job,   image_at<const In>(job.image, job, n), image_at<Out>(job.out, job, n),
                     stain, job.warp ? job.warp + n : nullptr,     use};
  for_chunks(job, begin, end, f);
}

template <typename In, typename Out>
void backward(const StainJob& job, int64_t n, int64_t begin, int64_t end, float* scratch, double* sums) {
  Backward<In, Out> f{job,
                      image_at<const In>(job.image, job, n),
                      image_at<const Out>(job.out, job, n),
                      job.grad_image && !job.warp ? image_at<In>(job.grad_image, job, n) : nullptr,
                      stain_of(job, n),
                      job.warp ? job.warp + n : nullptr,
                      job.grad_image && job.warp ? scratch : nullptr,
                      sums};
  for_chunks(job, begin, end, f);
}

template <typename T>
void unpack(const StainJob& job, int64_t n, float* scratch) {
  const int64_t plane = job.h * job.w;
  T* image = image_at<T>(job.grad_image, job, n);
  Rows rows;
  for (int64_t first = 0; first < plane; first += kChunk) {
    const int64_t count = plane - first < kChunk ? plane - first : kChunk;
    float *from = scratch + 4 * first, *to[3];
    const bool direct = place(image, job.image_last, plane, first, rows, to);
    float *r = to[0], *g = to[1], *b = to[2];
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) {
      r[k] = from[4 * k];
      g[k] = from[4 * k + 1];
      b[k] = from[4 * k + 2];
    }
    __builtin_memset(from, 0, 4 * sizeof(float) * count);
    if (!direct) store(rows, image, job.image_last, plane, first, static_cast<int>(count));
  }
}

#define HISTODD_WITH_PIXEL(pixel, T, ...) \
  switch (pixel) {                        \
    case Pixel::kByte: {                  \
      using T = uint8_t;                  \
      __VA_ARGS__;                        \
      break;                              \
    }                                     \
    case Pixel::kFloat: {                 \
      using T = float;                    \
      __VA_ARGS__;                        \
      break;                              \
    }                                     \
    case Pixel::kHalf: {                  \
      using T = c10::Half;                \
      __VA_ARGS__;                        \
      break;                              \
    }                                     \
    case Pixel::kBFloat16: {              \
      using T = c10::BFloat16;            \
      __VA_ARGS__;                        \
      break;                              \
    }                                     \
  }

template <typename In>
void forward_to(const StainJob& job, int64_t n, int64_t begin, int64_t end) {
  HISTODD_WITH_PIXEL(job.out_type, Out, forward<In, Out>(job, n, begin, end))
}

template <typename In>
void backward_from(const StainJob& job, int64_t n, int64_t begin, int64_t end, float* scratch, double* sums) {
  HISTODD_WITH_PIXEL(job.out_type, Out, backward<In, Out>(job, n, begin, end, scratch, sums))
}

void forward_any(const StainJob& job, int64_t n, int64_t begin, int64_t end) {
  HISTODD_WITH_PIXEL(job.image_type, In, forward_to<In>(job, n, begin, end))
}

void backward_any(const StainJob& job, int64_t n, int64_t begin, int64_t end, float* scratch, double* sums) {
  HISTODD_WITH_PIXEL(job.image_type, In, backward_from<In>(job, n, begin, end, scratch, sums))
}

void unpack_any(const StainJob& job, int64_t n, float* scratch) {
  HISTODD_WITH_PIXEL(job.image_type, T, unpack<T>(job, n, scratch))
}

}  // namespace HISTODD_ISA
}  // namespace

#define HISTODD_PASTE(a, b) a##b
#define HISTODD_TABLE(isa) HISTODD_PASTE(stain_kernels_, isa)
const StainKernels HISTODD_TABLE(HISTODD_ISA) = {HISTODD_ISA::forward_any, HISTODD_ISA::backward_any,
                                                 HISTODD_ISA::unpack_any};

}  // namespace histodd
