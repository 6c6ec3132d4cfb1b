// How the kernels on rows stain bytes without a warp: by a table instead of logarithms and exponentials. A part of
// stain_augment_rows.h, which includes it within its namespaces.

// For bytes, the stained intensity 2^(A l + c) is a product over the channels of the input, of factors that only 256
// values each can have. An entry holds the factors of the three channels of the output.
struct ByteTable {
  alignas(64) float factor[3][256][4];
  float white = 1.0f;  // a variable: of a constant the compiler makes cases instead of a minimum

  // With l = log2((v + 1) / io) the entry of an even v + 1 = 2 w is that of w times 2^A, so that exponentials are taken
  // for odd v + 1 only. False where the factors would leave the range of float.
  bool fill(const Stain<float>& s) {
    if (!moderate(s)) return false;
    alignas(64) float l[128];
#pragma omp simd
    for (int k = 0; k < 128; ++k) l[k] = log2_of(s.p * (static_cast<float>(2 * k) / 255.0f) + s.q);
    Exponents<float> wide = s.range;
    wide.high = -wide.low;
    for (int j = 0; j < 3; ++j) {
      const float a0 = s.a[j], a1 = s.a[3 + j], a2 = s.a[6 + j];
      const float c0 = j ? 0.0f : s.c[0], c1 = j ? 0.0f : s.c[1], c2 = j ? 0.0f : s.c[2];
      alignas(64) float e0[128], e1[128], e2[128];
#pragma omp simd
      for (int64_t k = 0; k < 128; ++k) {
        e0[k] = exp2_of(a0 * l[k] + c0, wide);
        e1[k] = exp2_of(a1 * l[k] + c1, wide);
        e2[k] = exp2_of(a2 * l[k] + c2, wide);
      }
      Four* to = reinterpret_cast<Four*>(factor[j][0]);
      for (int64_t k = 0; k < 128; ++k) to[2 * k] = Four{e0[k], e1[k], e2[k], 0.0f};
      const Four twice = {exp2_of(a0, wide), exp2_of(a1, wide), exp2_of(a2, wide), 0.0f};
      for (int64_t w = 1; w <= 128; ++w) to[2 * w - 1] = to[w - 1] * twice;
    }
    return true;
  }
};

// Where in a table the entries of a chunk's bytes are, as offsets of 16 bits: four of them are one load.
struct Offsets {
  alignas(64) uint16_t of[3][kChunk];
};

template <int64_t kStep>
HISTODD_INLINE void find_offsets(const uint8_t* r, const uint8_t* g, const uint8_t* b, int count, Offsets& to) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    to.of[0][k] = static_cast<uint16_t>(r[kStep * k] << 4);
    to.of[1][k] = static_cast<uint16_t>(g[kStep * k] << 4);
    to.of[2][k] = static_cast<uint16_t>(b[kStep * k] << 4);
  }
  for (int64_t k = count; k % 4; ++k) to.of[0][k] = to.of[1][k] = to.of[2][k] = 0;
}

HISTODD_INLINE const Four& entry(const float* table, uint64_t offset) {
  return *reinterpret_cast<const Four*>(reinterpret_cast<const char*>(table) + static_cast<uint16_t>(offset));
}

void stain_bytes(const ByteTable& table, const uint8_t* image, bool last, int64_t plane, int64_t first, int count,
                 float* const y[3], const StainJob& job) {
  alignas(64) float packed[4 * kChunk];
  Offsets offsets;
  if (last) {
    const uint8_t* at = image + 3 * first;
    find_offsets<3>(at, at + 1, at + 2, count, offsets);
  } else {
    const uint8_t* at = image + first;
    find_offsets<1>(at, at + plane, at + 2 * plane, count, offsets);
  }
  const float *f0 = table.factor[0][0], *f1 = table.factor[1][0], *f2 = table.factor[2][0];
  Four* to = reinterpret_cast<Four*>(packed);
  for (int64_t k = 0; k < count; k += 4) {
    uint64_t r, g, b;
    __builtin_memcpy(&r, offsets.of[0] + k, sizeof r);
    __builtin_memcpy(&g, offsets.of[1] + k, sizeof g);
    __builtin_memcpy(&b, offsets.of[2] + k, sizeof b);
    to[k] = entry(f0, r) * entry(f1, g) * entry(f2, b);
    to[k + 1] = entry(f0, r >> 16) * entry(f1, g >> 16) * entry(f2, b >> 16);
    to[k + 2] = entry(f0, r >> 32) * entry(f1, g >> 32) * entry(f2, b >> 32);
    to[k + 3] = entry(f0, r >> 48) * entry(f1, g >> 48) * entry(f2, b >> 48);
  }
  const float s0 = job.scale[0], s1 = job.scale[1], s2 = job.scale[2];
  const float t0 = job.shift[0], t1 = job.shift[1], t2 = job.shift[2];
  const float white = table.white;
  float *y0 = y[0], *y1 = y[1], *y2 = y[2];
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    const float v0 = packed[4 * k], v1 = packed[4 * k + 1], v2 = packed[4 * k + 2];
    y0[k] = (v0 < white ? v0 : white) * s0 + t0;
    y1[k] = (v1 < white ? v1 : white) * s1 + t1;
    y2[k] = (v2 < white ? v2 : white) * s2 + t2;
  }
}
