// Device side of stain_augment that does not depend on the kernel: images of any type and layout, per-image parameters,
// sampling through the warp. Types and layouts are uniform run-time branches, so that there are few kernels to compile.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "../stain_augment.h"
#include "launch.cuh"

namespace histodd {

enum class Element : int { kByte, kDouble, kFloat, kHalf, kBFloat16 };

constexpr int kPixels = 4;     // per thread
constexpr int kTileSide = 32;  // pixels; of a block with a warp, whose 16 x 16 threads have four pixels each

struct Image {
  void* data = nullptr;
  Element type = Element::kFloat;
  bool last = false;   // channels_last, otherwise contiguous
  bool packs = false;  // four pixels can be read or written at once: aligned, and planes of a multiple of four
};

// Calls f with a null pointer to the element type; with S = float there are no doubles.
template <typename S, typename F>
__device__ __forceinline__ void with_type(Element type, F f) {
  switch (type) {
    case Element::kByte:
      return f(static_cast<uint8_t*>(nullptr));
    case Element::kHalf:
      return f(static_cast<c10::Half*>(nullptr));
    case Element::kBFloat16:
      return f(static_cast<c10::BFloat16*>(nullptr));
    case Element::kDouble:
      if constexpr (std::is_same_v<S, double>) return f(static_cast<double*>(nullptr));
      return;
    default:
      return f(static_cast<float*>(nullptr));
  }
}

template <typename S>
__device__ __forceinline__ S grey_to_unit(S x) {  // x / 255, correctly rounded
  const S r = S(1) / S(255), y = x * r;
  return fma(fma(S(-255), y, x), r, y);
}

template <typename T>
struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) Quad {
  T item[4];
};

// Pixels [pixel, pixel + count) of an image whose first element is `first`; x[channel][k], bytes as grey levels.
template <typename S>
__device__ __forceinline__ void load(const Image& image, int64_t first, int64_t plane, int64_t pixel, int count,
                                     S x[3][kPixels]) {
  with_type<S>(image.type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const T* data = static_cast<const T*>(image.data) + first;
    if (image.packs) {
      if (image.last) {
        Quad<T> q[3];
#pragma unroll
        for (int m = 0; m < 3; ++m) q[m] = reinterpret_cast<const Quad<T>*>(data + 3 * pixel)[m];
#pragma unroll
        for (int m = 0; m < 12; ++m) x[m % 3][m / 3] = static_cast<S>(q[m / 4].item[m % 4]);
      } else {
#pragma unroll
        for (int c = 0; c < 3; ++c) {
          const Quad<T> q = *reinterpret_cast<const Quad<T>*>(data + c * plane + pixel);
#pragma unroll
          for (int k = 0; k < 4; ++k) x[c][k] = static_cast<S>(q.item[k]);
        }
      }
      return;
    }
#pragma unroll
    for (int m = 0; m < 12; ++m) {
      const int c = m % 3, k = m / 3;
      x[c][k] = k < count ? static_cast<S>(data[image.last ? 3 * (pixel + k) + c : c * plane + pixel + k]) : S(0);
    }
  });
}

template <typename S>
__device__ __forceinline__ void store(const Image& image, int64_t first, int64_t plane, int64_t pixel, int count,
                                      const S x[3][kPixels]) {
  with_type<S>(image.type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    T* data = static_cast<T*>(image.data) + first;
    if (image.packs) {
      if (image.last) {
        Quad<T> q[3];
#pragma unroll
        for (int m = 0; m < 12; ++m) q[m / 4].item[m % 4] = static_cast<T>(x[m % 3][m / 3]);
#pragma unroll
        for (int m = 0; m < 3; ++m) reinterpret_cast<Quad<T>*>(data + 3 * pixel)[m] = q[m];
      } else {
#pragma unroll
        for (int c = 0; c < 3; ++c) {
          Quad<T> q;
#pragma unroll
          for (int k = 0; k < 4; ++k) q.item[k] = static_cast<T>(x[c][k]);
          *reinterpret_cast<Quad<T>*>(data + c * plane + pixel) = q;
        }
      }
      return;
    }
#pragma unroll
    for (int m = 0; m < 12; ++m) {
      const int c = m % 3, k = m / 3;
      if (k < count) data[image.last ? 3 * (pixel + k) + c : c * plane + pixel + k] = static_cast<T>(x[c][k]);
    }
  });
}

// One pixel; neighbouring threads have neighbouring pixels.
template <typename S>
__device__ __forceinline__ void store_one(const Image& image, int64_t first, int64_t plane, int64_t pixel,
                                          const Rgb<S>& v) {
  with_type<S>(image.type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    T* data = static_cast<T*>(image.data) + first + (image.last ? 3 * pixel : pixel);
    const int64_t step = image.last ? 1 : plane;
    data[0] = static_cast<T>(v.r);
    data[step] = static_cast<T>(v.g);
    data[2 * step] = static_cast<T>(v.b);
  });
}

template <typename S>
__device__ __forceinline__ Rgb<S> load_one(const Image& image, int64_t first, int64_t plane, int64_t pixel) {
  Rgb<S> v{};
  with_type<S>(image.type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const T* data = static_cast<const T*>(image.data) + first + (image.last ? 3 * pixel : pixel);
    const int64_t step = image.last ? 1 : plane;
    v = {static_cast<S>(data[0]), static_cast<S>(data[step]), static_cast<S>(data[2 * step])};
  });
  return v;
}

// The four neighbours of a sampled pixel: first, first + right, first + below, first + right + below. An image has
// fewer than 2^31 elements per channel here.
template <typename S>
struct Corners {
  unsigned first, right, below;
  S ax, bx, ay, by;

  __device__ __forceinline__ Corners(S x, int x_origin, S y, int y_origin, int height, int width) {
    const Neighbours<S> across = Neighbours<S>::at(x, x_origin, width), down = Neighbours<S>::at(y, y_origin, height);
    first = static_cast<unsigned>(down.first * width + across.first);
    right = width > 1;
    below = height > 1 ? width : 0;
    ax = across.a, bx = across.b, ay = down.a, by = down.b;
  }
};

template <typename S>
__device__ __forceinline__ Rgb<S> sample(const Image& image, int64_t first, int64_t plane, const Corners<S>& at) {
  const S share = (at.ax + at.bx) * (at.ay + at.by), white = S(1) - share;
  const S a = at.ay * at.ax, b = at.ay * at.bx, c = at.by * at.ax, d = at.by * at.bx;
  Rgb<S> v{};
  with_type<S>(image.type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const T* data = static_cast<const T*>(image.data) + first;
    const unsigned step = image.last ? 3 : 1;
    const unsigned p = at.first * step, q = p + at.right * step, r = p + at.below * step, s = r + at.right * step;
    const auto blend = [&](const T* channel) {
      return a * static_cast<S>(channel[p]) + b * static_cast<S>(channel[q]) + c * static_cast<S>(channel[r]) +
             d * static_cast<S>(channel[s]);
    };
    const int64_t apart = image.last ? 1 : plane;
    const S unit = std::is_same_v<T, uint8_t> ? S(1) / S(255) : S(1);
    v = {unit * blend(data) + white, unit * blend(data + apart) + white, unit * blend(data + 2 * apart) + white};
    if (!(share > S(0))) v = {S(1), S(1), S(1)};  // not the NaN of a pixel that has no share in it
  });
  return v;
}

// Everything small, per image.
template <typename S>
struct Prepared {
  Stain<S> stain;
  Warp warp;
  S scale[3], shift[3];

  __device__ __forceinline__ Rgb<S> finish(const Rgb<S>& v) const {
    return {v.r * scale[0] + shift[0], v.g * scale[1] + shift[1], v.b * scale[2] + shift[2]};
  }
  __device__ __forceinline__ Rgb<S> finish_vjp(const Rgb<S>& g) const {
    return {g.r * scale[0], g.g * scale[1], g.b * scale[2]};
  }
};

struct Small {  // one of the small tensors, contiguous, of any floating type
  const void* data = nullptr;
  Element type = Element::kFloat;

  __device__ __forceinline__ double get(int64_t i) const {
    double v = 0;
    with_type<double>(type, [&](auto* null) {
      using T = std::remove_pointer_t<decltype(null)>;
      v = static_cast<double>(static_cast<const T*>(data)[i]);
    });
    return v;
  }
};

}  // namespace histodd
