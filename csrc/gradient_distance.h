// Maths of gradient_distance, shared by the CPU and CUDA files: every f with its vjp directly below it.
// A layer is cut into units, each reduced by one worker: a filter for the cosine, a fixed run of elements otherwise.
// Units never depend on the number of threads and are summed in order, so that the result is deterministic.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace histodd {

enum class Kind : int { kL1, kL2, kCosine };

constexpr double kCosineEps = 1e-6;

struct L1 {
  template <typename T>
  HISTODD_INLINE static T value(T r, T s) {
    const T d = r - s;
    return d < T(0) ? -d : d;
  }
  // With respect to r; with respect to s it is the negative. 0 at 0, NaN stays NaN.
  template <typename T>
  HISTODD_INLINE static T vjp(T r, T s, T g) {
    const T d = r - s;
    return g * (d > T(0) ? T(1) : (d < T(0) ? T(-1) : d));
  }
  // The derivative in a byte, so that a backward pass need not read r and s again: its sign, and 2 for NaN.
  template <typename T>
  HISTODD_INLINE static int8_t sign(T r, T s) {
    const T d = r - s;
    return static_cast<int8_t>((d > T(0) ? 1 : 0) - (d < T(0) ? 1 : 0) + (d != d ? 2 : 0));
  }
  template <typename T>
  HISTODD_INLINE static T vjp_of_sign(int8_t sign, T g) {
    return sign == 2 ? T(NAN) : g * static_cast<T>(sign);
  }
};

struct L2 {
  template <typename T>
  HISTODD_INLINE static T value(T r, T s) {
    const T d = r - s;
    return d * d;
  }
  template <typename T>
  HISTODD_INLINE static T vjp(T r, T s, T g) {
    return T(2) * g * (r - s);
  }
};

struct CosineSums {
  double dot = 0, rr = 0, ss = 0;
};

// 1 - <r,s> / (|r| |s| + eps) of one filter.
HISTODD_HD double cosine(const CosineSums& c) { return 1.0 - c.dot / (sqrt(c.rr) * sqrt(c.ss) + kCosineEps); }

// d/dr = cross s + self_r r, d/ds = cross r + self_s s; the norm of a zero filter has derivative 0.
struct CosineVjp {
  double cross, self_r, self_s;
};

HISTODD_HD CosineVjp cosine_vjp(const CosineSums& c, double g) {
  const double nr = sqrt(c.rr), ns = sqrt(c.ss), d = nr * ns + kCosineEps;
  const double slope = g * c.dot / (d * d);
  return {-g / d, nr > 0 ? slope * ns / nr : 0.0, ns > 0 ? slope * nr / ns : 0.0};
}

// Elements per unit of a layer with `numel` > 0 elements, `dim` dimensions and `filters` entries along the first.
inline int64_t unit_size(Kind kind, int64_t run, int64_t numel, int64_t dim, int64_t filters) {
  if (kind != Kind::kCosine) return run;
  return dim > 1 ? numel / filters : numel;
}

}  // namespace histodd
