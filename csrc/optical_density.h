// Division, logarithm and exponential to base 2, for optical densities: float by polynomial (the compiler vectorises
// it; on CUDA the hardware's own), double by the C library. Absolute error of the logarithm and relative error of the
// exponential stay under 3e-7 in float.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace histodd {

constexpr double kLn2 = 0.693147180559945309417;

HISTODD_INLINE float floor_of(float x) { return floorf(x); }
HISTODD_INLINE double floor_of(double x) { return floor(x); }
HISTODD_INLINE float abs_of(float x) { return fabsf(x); }
HISTODD_INLINE double abs_of(double x) { return fabs(x); }

HISTODD_INLINE uint32_t bits_of(float x) {
  uint32_t i;
  __builtin_memcpy(&i, &x, sizeof i);
  return i;
}

HISTODD_INLINE float float_of(uint32_t i) {
  float x;
  __builtin_memcpy(&x, &i, sizeof x);
  return x;
}

// a / b; on CUDA within 2 units in the last place, for |b| below 2^126.
HISTODD_INLINE float divide(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
HISTODD_INLINE double divide(double a, double b) { return a / b; }

// log2(u) for u >= FLT_MIN; without meaning below, NaN for anything negative and for NaN.
HISTODD_INLINE float log2_of(float u) {
#ifdef __CUDA_ARCH__
  float l;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(l) : "f"(u));
  return l;
#else
  // u = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); log2(1 + f) = f P(f), minimax.
  const uint32_t i = bits_of(u);
  const int32_t k = static_cast<int32_t>(i - 0x3f3504f3u) >> 23;
  const float f = float_of(i - (static_cast<uint32_t>(k) << 23)) - 1.0f;
  float p = -0.1461019417f;
  p = p * f + 0.2366831859f;
  p = p * f - 0.249859425f;
  p = p * f + 0.2867360196f;
  p = p * f - 0.3601110899f;
  p = p * f + 0.4809380421f;
  p = p * f - 0.7213564314f;
  p = p * f + 1.4426948f;
  const float l = p * f + static_cast<float>(k);
  return u >= 1.17549435e-38f ? l : __builtin_nanf("");
#endif
}

// The range of exponents that exp2_of clamps to: variables, because the compiler takes constants as an invitation to
// split the code by cases instead of taking a minimum and a maximum.
template <typename S>
struct Exponents {
  S low = sizeof(S) == 4 ? -126 : -1022, high = 0;
};

// 2^f for f in [-1/2, 1/2], minimax; kExp2[0] is 1 so that 2^0 is and nothing exceeds it.
constexpr float kExp2[6] = {1.0f, 0.693146978f, 0.240222424f, 0.05550733464f, 0.009671497995f, 0.001326475415f};

// 2^e, with e clamped; NaN stays NaN.
HISTODD_INLINE float exp2_of(float e, const Exponents<float>& range) {
#ifdef __CUDA_ARCH__
#if __CUDA_ARCH__ >= 800
  asm("min.NaN.f32 %0, %0, 0f00000000;" : "+f"(e));
#else
  e = 0.0f < e ? 0.0f : e;
#endif
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(e));
  return y;
#else
  e = range.high < e ? range.high : e;
  e = range.low > e ? range.low : e;
  const float t = e + 12582912.0f;  // 1.5 * 2^23: the nearest integer lands in the lowest bits
  const float f = e - (t - 12582912.0f);
  float p = kExp2[5];
  p = p * f + kExp2[4];
  p = p * f + kExp2[3];
  p = p * f + kExp2[2];
  p = p * f + kExp2[1];
  p = p * f + kExp2[0];
  return p * float_of((bits_of(t) << 23) + 0x3f800000u);
#endif
}

HISTODD_INLINE double log2_of(double u) { return log2(u); }
HISTODD_INLINE double exp2_of(double e, const Exponents<double>& range) {
  return exp2(range.high < e ? range.high : e);
}

}  // namespace histodd
