// Maths of macenko_fit, shared by the CPU and CUDA files. The fit is detached, so nothing here has a vjp: its
// derivative would put nearly all of its mass on the one to four pixels at the percentiles. Percentiles are selected,
// never sorted, and the angle of a pixel is never computed: a cheap key that grows with the angle selects the same
// pixel, and only the selected keys are turned into angles.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "optical_density.h"

namespace histodd {

enum FitStatus : uint8_t { kFitOk, kFitLittleTissue, kFitDegenerate, kFitWeakStain, kFitOutOfRange };

constexpr double kMaxConcentrationPercentile = 99.0;
constexpr double kLargestImageValue = 1.0 + 1e-3;  // float rounding just above one is no reason to refuse an image

struct FitOptions {
  double io, beta, alpha, min_tissue, min_concentration;
  bool plus_one;       // od = -ln((I + 1) / io); otherwise -ln(clamp(I, 1, io) / io)
  bool linear;         // percentiles by linear interpolation instead of the nearest rank
  bool sign_by_first;  // eigenvectors point to a positive first component instead of towards the mean
};

// ---- Optical density ------------------------------------------------------------------------------------------------

// od = -ln(clamp(scale x + shift, low, high)) of an intensity x in [0, 1].
template <typename T>
struct Density {
  T scale, shift, low, high;
};

template <typename T>
HISTODD_HD Density<T> make_density(const FitOptions& o) {
  if (o.plus_one) return {T(255 / o.io), T(1 / o.io), T(1e-6), T(1e6)};
  return {T(255 / o.io), T(0), T(1 / o.io), T(1)};
}

template <typename T>
HISTODD_INLINE T optical_density(T x, const Density<T>& d) {
  T y = d.scale * x + d.shift;
  y = y < d.low ? d.low : y;
  y = y > d.high ? d.high : y;
  return log2_of(y) * T(-kLn2);
}

// Of a grey level, for the table that uint8 images use.
HISTODD_HD double grey_density(int level, const FitOptions& o) {
  return optical_density(level / 255.0, make_density<double>(o));
}

template <typename T>
HISTODD_INLINE bool in_range(T x) {
  return x >= T(0) && x <= T(kLargestImageValue);  // false for NaN
}

// ---- Angles ---------------------------------------------------------------------------------------------------------

// Grows with atan2(y, x), from -2 to 2, and is exact enough to give the angle back: y / (|x| + |y|), mirrored for
// negative x. Choices are between constants only, so that compilers see no branch and vectorise.
template <typename T>
HISTODD_INLINE T angle_key(T x, T y) {
  const T sum = std::fabs(x) + std::fabs(y);
  const T d = divide(y, sum > T(1e-30) ? sum : T(1e-30));
  return d * (x < T(0) ? T(-1) : T(1)) + std::copysign(x < T(0) ? T(2) : T(0), y);
}

HISTODD_HD double key_angle(double key) {
  if (key > 1) return atan2(2 - key, 1 - key);
  if (key < -1) return atan2(-2 - key, 1 + key);
  return atan2(key, 1 - fabs(key));
}

template <typename T>
HISTODD_INLINE bool is_tissue(T r, T g, T b, T beta) {
  const T lowest = r < g ? r : g;
  return (lowest < b ? lowest : b) >= beta;
}

// ---- Percentiles ----------------------------------------------------------------------------------------------------

// Between the elements of ascending ranks `low` and `high` (counted from 0), `fraction` of the way.
struct Rank {
  int64_t low, high;
  double fraction;
};

HISTODD_HD Rank percentile_rank(double percent, int64_t count, bool linear) {
  const double position = percent * static_cast<double>(count - 1) / 100.0;
  if (!linear) {
    const int64_t k = static_cast<int64_t>(rint(position));  // half to even
    return {k, k, 0.0};
  }
  const int64_t k = static_cast<int64_t>(floor(position));
  return {k, k + 1 < count ? k + 1 : k, position - static_cast<double>(k)};
}

// Integers that are ordered as the numbers are (which must not be NaN), and back.
HISTODD_INLINE uint32_t ordered_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

HISTODD_INLINE uint64_t ordered_bits(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
}

HISTODD_INLINE float from_ordered_bits(uint32_t k) {
  const uint32_t bits = k & 0x80000000u ? k & 0x7fffffffu : ~k;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

HISTODD_INLINE double from_ordered_bits(uint64_t k) {
  const uint64_t bits = k >> 63 ? k & ~(uint64_t{1} << 63) : ~k;
  double x;
  memcpy(&x, &bits, 8);
  return x;
}

HISTODD_HD double interpolate(double low, double high, double fraction) { return low + (high - low) * fraction; }

// Percentiles come in pairs, both in the upper tail of a stream of keys: of minus and plus the angle, of the two
// concentrations. Ranks are counted from the largest key; `above` is the next larger one, for linear interpolation.
struct TailRanks {
  int64_t from_top[2];
};

struct Tails {
  double value[2], above[2];
};

HISTODD_HD TailRanks angle_ranks(int64_t tissue, const FitOptions& o) {
  return {{percentile_rank(o.alpha, tissue, o.linear).high,
           tissue - 1 - percentile_rank(100 - o.alpha, tissue, o.linear).low}};
}

HISTODD_HD TailRanks concentration_ranks(int64_t pixels, const FitOptions& o) {
  const int64_t rank = pixels - 1 - percentile_rank(kMaxConcentrationPercentile, pixels, o.linear).low;
  return {{rank, rank}};
}

// Which rank of a sample of n keys is a threshold that a little more than `rank` + 1 of all `count` keys should reach:
// four standard deviations of the sample's own noise. Negative where the sample is too small to say.
HISTODD_HD int64_t sample_rank(int64_t rank, int64_t count, int64_t n) {
  const double expected = static_cast<double>(rank + 1) / static_cast<double>(count) * static_cast<double>(n);
  const int64_t wanted = static_cast<int64_t>(expected + 4 * sqrt(expected) + 2);
  return 2 * wanted < n ? wanted : -1;
}

// ---- Moments, plane, stain vectors ----------------------------------------------------------------------------------

struct Moments {
  double count = 0, sum[3] = {0, 0, 0}, product[6] = {0, 0, 0, 0, 0, 0};  // rr, rg, rb, gg, gb, bb

  HISTODD_HD void add(const Moments& m) {
    count += m.count;
    for (int i = 0; i < 3; ++i) sum[i] += m.sum[i];
    for (int i = 0; i < 6; ++i) product[i] += m.product[i];
  }
};

HISTODD_HD bool too_little_tissue(double count, int64_t pixels, const FitOptions& o) {
  return count < 3 || count < o.min_tissue * static_cast<double>(pixels);
}

// Eigenvectors (columns of v) and eigenvalues (the diagonal of a) of a symmetric matrix, by cyclic Jacobi rotations.
HISTODD_HD void jacobi(double a[3][3], double v[3][3]) {
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) v[i][j] = i == j;
  }
  for (int sweep = 0; sweep < 12; ++sweep) {
    const double off = fabs(a[0][1]) + fabs(a[0][2]) + fabs(a[1][2]);
    if (off <= 1e-18 * (fabs(a[0][0]) + fabs(a[1][1]) + fabs(a[2][2]))) return;
    for (int p = 0; p < 2; ++p) {
      for (int q = p + 1; q < 3; ++q) {
        if (a[p][q] == 0) continue;
        const double theta = (a[q][q] - a[p][p]) / (2 * a[p][q]);
        const double t = (theta < 0 ? -1.0 : 1.0) / (fabs(theta) + sqrt(theta * theta + 1));
        const double c = 1 / sqrt(t * t + 1), s = t * c;
        for (int k = 0; k < 3; ++k) {
          const double kp = a[k][p], kq = a[k][q];
          a[k][p] = c * kp - s * kq;
          a[k][q] = s * kp + c * kq;
        }
        for (int k = 0; k < 3; ++k) {
          const double pk = a[p][k], qk = a[q][k];
          a[p][k] = c * pk - s * qk;
          a[q][k] = s * pk + c * qk;
        }
        for (int k = 0; k < 3; ++k) {
          const double kp = v[k][p], kq = v[k][q];
          v[k][p] = c * kp - s * kq;
          v[k][q] = s * kp + c * kq;
        }
      }
    }
  }
}

// The two leading principal axes of the tissue's optical densities.
struct Plane {
  double first[3], second[3];
  bool flat;  // the densities lie on a line or a point: there is no plane
};

HISTODD_HD Plane principal_plane(const Moments& m, bool sign_by_first) {
  const double n = m.count > 1 ? m.count : 2, mean[3] = {m.sum[0] / n, m.sum[1] / n, m.sum[2] / n};
  double a[3][3], v[3][3];
  for (int i = 0, k = 0; i < 3; ++i) {
    for (int j = i; j < 3; ++j, ++k) a[i][j] = a[j][i] = (m.product[k] - m.sum[i] * mean[j]) / (n - 1);
  }
  jacobi(a, v);
  int top = 0;
  for (int i = 1; i < 3; ++i) top = a[i][i] > a[top][top] ? i : top;
  int middle = top == 0 ? 1 : 0;
  for (int i = middle + 1; i < 3; ++i) middle = i != top && a[i][i] > a[middle][middle] ? i : middle;
  Plane plane;
  // 1e-12: float32 densities that are equal up to rounding have variances near 1e-14.
  const double largest = a[top][top] * 1e-7;
  plane.flat = !(a[middle][middle] > (largest > 1e-12 ? largest : 1e-12));
  double along[2] = {0, 0};
  for (int i = 0; i < 3; ++i) {
    along[0] += v[i][top] * mean[i];
    along[1] += v[i][middle] * mean[i];
  }
  if (sign_by_first) {
    along[0] = v[0][top];
    along[1] = v[0][middle];
  }
  for (int i = 0; i < 3; ++i) {
    plane.first[i] = along[0] < 0 ? -v[i][top] : v[i][top];
    plane.second[i] = along[1] < 0 ? -v[i][middle] : v[i][middle];
  }
  return plane;
}

// The left inverse of a 3 x 2 matrix, times the determinant of its Gram matrix, which is returned.
template <typename T>
HISTODD_HD double left_inverse(const T* matrix, double (&rows)[2][3]) {
  double a = 0, b = 0, d = 0;
  for (int i = 0; i < 3; ++i) {
    const double h = matrix[2 * i], e = matrix[2 * i + 1];
    a += h * h;
    b += h * e;
    d += e * e;
  }
  for (int i = 0; i < 3; ++i) {
    const double h = matrix[2 * i], e = matrix[2 * i + 1];
    rows[0][i] = d * h - b * e;
    rows[1][i] = a * e - b * h;
  }
  return a * d - b * b;
}

// Unit stain vectors, their left inverse, and whether they are too close to each other to have one.
struct Stains {
  double matrix[3][2], inverse[2][3];
  bool degenerate;
};

HISTODD_HD Stains stain_vectors(const Plane& plane, double low_angle, double high_angle) {
  const double c0 = cos(low_angle), s0 = sin(low_angle), c1 = cos(high_angle), s1 = sin(high_angle);
  Stains out;
  for (int i = 0; i < 3; ++i) {
    out.matrix[i][0] = plane.first[i] * c0 + plane.second[i] * s0;
    out.matrix[i][1] = plane.first[i] * c1 + plane.second[i] * s1;
  }
  if (out.matrix[0][0] < out.matrix[0][1]) {  // haematoxylin absorbs more red
    for (int i = 0; i < 3; ++i) {
      const double swap = out.matrix[i][0];
      out.matrix[i][0] = out.matrix[i][1];
      out.matrix[i][1] = swap;
    }
  }
  const double determinant = left_inverse(&out.matrix[0][0], out.inverse);
  out.degenerate = !(determinant >= 1e-6);
  for (int i = 0; i < 3; ++i) {
    out.inverse[0][i] /= determinant;
    out.inverse[1][i] /= determinant;
  }
  return out;
}

HISTODD_HD Stains stain_vectors(const Plane& plane, const Tails& angles, int64_t tissue, const FitOptions& o) {
  const Rank low = percentile_rank(o.alpha, tissue, o.linear), high = percentile_rank(100 - o.alpha, tissue, o.linear);
  const double first = -(low.high > low.low ? angles.above[0] : angles.value[0]), second = -angles.value[0];
  const double third = angles.value[1], fourth = high.high > high.low ? angles.above[1] : angles.value[1];
  return stain_vectors(plane, interpolate(key_angle(first), key_angle(second), low.fraction),
                       interpolate(key_angle(third), key_angle(fourth), high.fraction));
}

// ---- Keys of a pixel: two streams, NaN where it does not count
// -------------------------------------------------------

template <typename T>
struct AngleKeys {  // minus and plus the angle key of tissue pixels
  T u[3], v[3], beta;
  HISTODD_HD AngleKeys(const Plane& plane, T b) : beta(b) {
    for (int i = 0; i < 3; ++i) {
      u[i] = static_cast<T>(plane.first[i]);
      v[i] = static_cast<T>(plane.second[i]);
    }
  }
  HISTODD_INLINE void operator()(T r, T g, T b, T& first, T& second) const {
    const T key = angle_key(u[0] * r + u[1] * g + u[2] * b, v[0] * r + v[1] * g + v[2] * b);
    second = key + (is_tissue(r, g, b, beta) ? T(0) : static_cast<T>(NAN));
    first = -second;
  }
};

template <typename T>
struct ConcentrationKeys {  // the two concentrations of every pixel
  T u[3], v[3];
  HISTODD_HD explicit ConcentrationKeys(const Stains& stains) {
    for (int i = 0; i < 3; ++i) {
      u[i] = static_cast<T>(stains.inverse[0][i]);
      v[i] = static_cast<T>(stains.inverse[1][i]);
    }
  }
  HISTODD_INLINE void operator()(T r, T g, T b, T& first, T& second) const {
    first = u[0] * r + u[1] * g + u[2] * b;
    second = v[0] * r + v[1] * g + v[2] * b;
  }
};

// ---- Result ---------------------------------------------------------------------------------------------------------

// What one image comes back as. Anything but ok holds numbers without meaning, finite all the same.
struct Fit {
  double matrix[3][2] = {{1, 0}, {0, 1}, {0, 0}}, top[2] = {0, 0};
  uint8_t status = kFitOk;
};

HISTODD_HD Fit failed_fit(FitStatus status) {
  Fit fit;
  fit.status = status;
  return fit;
}

HISTODD_HD Fit finished_fit(const Stains& stains, const Tails& tops, int64_t pixels, const FitOptions& o) {
  const Rank rank = percentile_rank(kMaxConcentrationPercentile, pixels, o.linear);
  Fit fit;
  for (int i = 0; i < 3; ++i) {
    fit.matrix[i][0] = stains.matrix[i][0];
    fit.matrix[i][1] = stains.matrix[i][1];
  }
  for (int k = 0; k < 2; ++k) {
    fit.top[k] = interpolate(tops.value[k], rank.high > rank.low ? tops.above[k] : tops.value[k], rank.fraction);
    if (fit.top[k] < o.min_concentration) fit.status = kFitWeakStain;
  }
  return fit;
}

// [A|b], 3 x 4, that moves densities with these stains onto the target's: target diag(target_top / top) pinv(stain).
// Stain matrices are 3 x 2. Stains without a left inverse give NaN or infinity.
template <typename T>
HISTODD_HD void affine_onto(const T* stain, const T* top, const double* target, const double* target_top, T* out) {
  double rows[2][3], ratio[2];
  const double determinant = left_inverse(stain, rows);
  for (int k = 0; k < 2; ++k) {
    ratio[k] = target_top[k] / (top[k] < 1e-6 ? 1e-6 : static_cast<double>(top[k])) / determinant;
  }
  for (int j = 0; j < 3; ++j) {
    const double first = ratio[0] * rows[0][j], second = ratio[1] * rows[1][j];
    for (int i = 0; i < 3; ++i) out[4 * i + j] = static_cast<T>(target[2 * i] * first + target[2 * i + 1] * second);
    out[4 * j + 3] = 0;
  }
}

}  // namespace histodd
