// Maths of stain_augment, shared by the CPU and CUDA files: every f with its vjp directly below it. Intensities are on
// the scale [0, 1]; S is the type that is computed in. The affine in optical density od' = A od + b is kept in base 2:
// with l = log2((255 x + 1) / io) = -od / ln 2 the stained intensity is 2^e, e = A l + c, c = log2(io / 255) - b / ln
// 2, and the clamp at 255 is min(e, 0).
#pragma once

#include "optical_density.h"

namespace histodd {

template <typename S>
struct Rgb {
  S r, g, b;
};

template <typename S>
struct Stain {
  S a[9], c[3];
  S p, q;  // (255 x + 1) / io = p x + q
  Exponents<S> range;
  int skip;  // nothing is done to this image

  // ab is one row-major [3,4], A and b side by side.
  template <typename T>
  HISTODD_INLINE static Stain make(const T* ab, S io, bool skip) {
    Stain s;
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) s.a[3 * i + j] = static_cast<S>(ab[4 * i + j]);
      s.c[i] = static_cast<S>(log2_of(io / S(255)) - static_cast<S>(ab[4 * i + 3]) * S(1 / kLn2));
    }
    s.p = S(255) / io;
    s.q = S(1) / io;
    s.skip = skip;
    return s;
  }

  HISTODD_INLINE Rgb<S> densities(const Rgb<S>& x) const {
    return {log2_of(p * x.r + q), log2_of(p * x.g + q), log2_of(p * x.b + q)};
  }

  HISTODD_INLINE Rgb<S> exponents(const Rgb<S>& l) const {
    return {a[0] * l.r + a[1] * l.g + a[2] * l.b + c[0], a[3] * l.r + a[4] * l.g + a[5] * l.b + c[1],
            a[6] * l.r + a[7] * l.g + a[8] * l.b + c[2]};
  }

  HISTODD_INLINE Rgb<S> value(const Rgb<S>& x) const {
    const Rgb<S> e = exponents(densities(x));
    return {exp2_of(e.r, range), exp2_of(e.g, range), exp2_of(e.b, range)};
  }

  // For the gradient g of the value: the gradient d of x, and l and h = g y where the clamp lets it pass, which make up
  // the gradient of [A|b]: dA_ij = ln 2 h_i l_j, db_i = -h_i.
  struct Vjp {
    Rgb<S> d, l, h;
  };
  HISTODD_INLINE Vjp vjp(const Rgb<S>& x, const Rgb<S>& g) const {
    const Rgb<S> l = densities(x), e = exponents(l);
    const S r = e.r > S(0) ? S(0) : g.r * exp2_of(e.r, range);
    const S v = e.g > S(0) ? S(0) : g.g * exp2_of(e.g, range);
    const S b = e.b > S(0) ? S(0) : g.b * exp2_of(e.b, range);
    // One division for three: 1 / u_r = u_g u_b / (u_r u_g u_b).
    const S ur = p * x.r + q, ug = p * x.g + q, ub = p * x.b + q, gb = ug * ub, f = divide(p, ur * gb);
    const Rgb<S> d = {(a[0] * r + a[3] * v + a[6] * b) * (f * gb), (a[1] * r + a[4] * v + a[7] * b) * (f * ur * ub),
                      (a[2] * r + a[5] * v + a[8] * b) * (f * ur * ug)};
    return {d, l, {r, v, b}};
  }
};

// Where output pixel (i, j) samples the input, in input pixels: x = x0 + xi i + xj j, y likewise (affine_grid and
// grid_sample with align_corners=False).
struct Warp {
  double x0, xi, xj, y0, yi, yj;

  template <typename T>
  HISTODD_INLINE static Warp make(const T* m, int64_t height, int64_t width) {
    const double h = static_cast<double>(height), w = static_cast<double>(width);
    const double u = 1 / w - 1, v = 1 / h - 1;  // the first pixel's centre, in normalised coordinates
    Warp t;
    t.xj = m[0];
    t.xi = m[1] * w / h;
    t.x0 = 0.5 * w * (m[0] * u + m[1] * v + m[2] + 1) - 0.5;
    t.yj = m[3] * h / w;
    t.yi = m[4];
    t.y0 = 0.5 * h * (m[3] * u + m[4] * v + m[5] + 1) - 0.5;
    return t;
  }
};

constexpr int kFar = 1 << 23;  // no image is as large

// The two neighbours along one axis of a sampling position: pixels `first` and `first + 1`, always inside 0..size-1 (an
// axis of one pixel has no second: its weight is 0), with their weights. What the weights lack of 1 is the share of the
// white surroundings.
template <typename S>
struct Neighbours {
  int first;
  S a, b;

  // position = origin + x, with an integral origin, so that x stays small and exact. Origins beyond 2^23, farther than
  // any image reaches, count as that: they and what is added to them are exact in float.
  HISTODD_INLINE static Neighbours at(S x, int origin, int size) {
    origin = origin < -kFar ? -kFar : origin > kFar ? kFar : origin;
    const S low = static_cast<S>(-origin), high = static_cast<S>((size > 1 ? size - 2 : 0) - origin);
    const S floor = clamped(floor_of(x), low, high);
    return {origin + static_cast<int>(floor), hat(x - floor), size > 1 ? hat(x - floor - S(1)) : S(0)};
  }
  HISTODD_INLINE static S clamped(S x, S low, S high) {
    x = x > low ? x : low;  // NaN goes low
    return x < high ? x : high;
  }
  HISTODD_INLINE static S hat(S t) {  // 0 for NaN
    const S w = S(1) - abs_of(t);
    return w > S(0) ? w : S(0);
  }
};

// An integral origin near a position, and what is left.
template <typename S>
struct Split {
  int origin;
  S rest;

  HISTODD_INLINE static Split of(double position) {
    double whole = floor_of(position);
    whole = whole > -kFar ? whole : -kFar;  // NaN goes low
    whole = whole < kFar ? whole : kFar;
    return {static_cast<int>(whole), static_cast<S>(position - whole)};
  }
};

}  // namespace histodd
