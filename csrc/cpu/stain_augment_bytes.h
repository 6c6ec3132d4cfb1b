// How the kernels on rows stain bytes without a warp: by a table instead of logarithms and exponentials. A part of
// stain_augment_rows.h, which includes it within its namespaces.

// For bytes, the stained intensity 2^(A l + c) is a product over the channels of the input, of factors that only 256
// values each can have. An entry holds the factors of the three channels of the output.
struct ByteTable {
  alignas(64) float factor[3][256][4];

  // False where the factors would leave the range of float (a stain far from any real one).
  bool fill(const Stain<float>& s) {
    alignas(64) float l[256];
    float most = 0;
#pragma omp simd
    for (int v = 0; v < 256; ++v) l[v] = log2_of(s.p * (static_cast<float>(v) / 255.0f) + s.q);
    const float reach = abs_of(l[0]) > abs_of(l[255]) ? abs_of(l[0]) : abs_of(l[255]);
    for (int i = 0; i < 3; ++i) {
      const float sum = (abs_of(s.a[3 * i]) + abs_of(s.a[3 * i + 1]) + abs_of(s.a[3 * i + 2])) * reach + abs_of(s.c[i]);
      most = sum <= most ? most : sum;  // NaN stays
    }
    if (!(most < 120.0f)) return false;
    Exponents<float> wide = s.range;
    wide.high = -wide.low;
    for (int j = 0; j < 3; ++j) {
      const float a0 = s.a[j], a1 = s.a[3 + j], a2 = s.a[6 + j];
      const float c0 = j ? 0.0f : s.c[0], c1 = j ? 0.0f : s.c[1], c2 = j ? 0.0f : s.c[2];
      alignas(64) float e0[256], e1[256], e2[256];
#pragma omp simd
      for (int64_t v = 0; v < 256; ++v) {
        e0[v] = exp2_of(a0 * l[v] + c0, wide);
        e1[v] = exp2_of(a1 * l[v] + c1, wide);
        e2[v] = exp2_of(a2 * l[v] + c2, wide);
      }
      float* to = factor[j][0];
#pragma omp simd
      for (int64_t v = 0; v < 256; ++v) {
        to[4 * v] = e0[v];
        to[4 * v + 1] = e1[v];
        to[4 * v + 2] = e2[v];
        to[4 * v + 3] = 0.0f;
      }
    }
    return true;
  }
};

template <int64_t kStep>
void multiply_factors(const ByteTable& table, const uint8_t* r, const uint8_t* g, const uint8_t* b, int count,
                      Four* to) {
  const Four* f0 = reinterpret_cast<const Four*>(table.factor[0]);
  const Four* f1 = reinterpret_cast<const Four*>(table.factor[1]);
  const Four* f2 = reinterpret_cast<const Four*>(table.factor[2]);
  for (int64_t k = 0; k < count; ++k) to[k] = f0[r[kStep * k]] * f1[g[kStep * k]] * f2[b[kStep * k]];
}

void stain_bytes(const ByteTable& table, const uint8_t* image, bool last, int64_t plane, int64_t first, int count,
                 float* const y[3], const StainJob& job) {
  alignas(64) float packed[4 * kChunk];
  if (last) {
    const uint8_t* at = image + 3 * first;
    multiply_factors<3>(table, at, at + 1, at + 2, count, reinterpret_cast<Four*>(packed));
  } else {
    const uint8_t* at = image + first;
    multiply_factors<1>(table, at, at + plane, at + 2 * plane, count, reinterpret_cast<Four*>(packed));
  }
  const float s0 = job.scale[0], s1 = job.scale[1], s2 = job.scale[2];
  const float t0 = job.shift[0], t1 = job.shift[1], t2 = job.shift[2];
  float *y0 = y[0], *y1 = y[1], *y2 = y[2];
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    const float v0 = packed[4 * k], v1 = packed[4 * k + 1], v2 = packed[4 * k + 2];
    y0[k] = (v0 < 1.0f ? v0 : 1.0f) * s0 + t0;
    y1[k] = (v1 < 1.0f ? v1 : 1.0f) * s1 + t1;
    y2[k] = (v2 < 1.0f ? v2 : 1.0f) * s2 + t2;
  }
}
