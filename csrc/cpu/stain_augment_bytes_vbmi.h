// How the kernels on rows stain bytes without a warp where AVX-512 has VBMI: logarithms are looked up in registers, 64
// at a time. Takes the place of stain_augment_bytes.h, whose table needs a load for every byte and a fill for every
// image.

// The bytes of the float log2((v + 1) / io) of every byte v, lowest first.
struct ByteTable {
  alignas(64) uint8_t bytes[4][256];
  const Stain<float>* stain;

  bool fill(const Stain<float>& s) {
    if (!moderate(s)) return false;
    stain = &s;
    alignas(64) float l[256];
#pragma omp simd
    for (int v = 0; v < 256; ++v) l[v] = log2_of(s.p * (static_cast<float>(v) / 255.0f) + s.q);
    for (int b = 0; b < 4; ++b) {
#pragma omp simd
      for (int v = 0; v < 256; ++v) bytes[b][v] = static_cast<uint8_t>(bits_of(l[v]) >> (8 * b));
    }
    return true;
  }
};

// Looks up 64 bytes; l[j] gets those of pixels 16 j and on.
HISTODD_INLINE void look_up(const ByteTable& table, __m512i v, __m512 l[4]) {
  // Unpacking joins bytes within lanes of 16: lane i is given pixels 4 i, 16 + 4 i, 32 + 4 i and 48 + 4 i, and on.
  const __m512i quads = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  v = _mm512_permutexvar_epi32(quads, v);
  const __mmask64 upper = _mm512_movepi8_mask(v);
  __m512i b[4];
  for (int k = 0; k < 4; ++k) {
    const __m512i* t = reinterpret_cast<const __m512i*>(table.bytes[k]);
    b[k] =
        _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(t[0], v, t[1]), _mm512_permutex2var_epi8(t[2], v, t[3]));
  }
  const __m512i low01 = _mm512_unpacklo_epi8(b[0], b[1]), high01 = _mm512_unpackhi_epi8(b[0], b[1]);
  const __m512i low23 = _mm512_unpacklo_epi8(b[2], b[3]), high23 = _mm512_unpackhi_epi8(b[2], b[3]);
  l[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low01, low23));
  l[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low01, low23));
  l[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high01, high23));
  l[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high01, high23));
}

// exp2_of with the rounding and scaling of AVX-512, for e of a moderate stain; above 0 it counts as 0.
HISTODD_INLINE __m512 exp2_below_0(__m512 e) {
  e = _mm512_min_ps(_mm512_setzero_ps(), e);  // NaN stays
  const __m512 whole = _mm512_roundscale_ps(e, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = e - whole;
  __m512 p = _mm512_set1_ps(kExp2[5]);
  for (int k = 4; k >= 0; --k) p = p * f + _mm512_set1_ps(kExp2[k]);
  return _mm512_scalef_ps(p, whole);
}

void stain_bytes(const ByteTable& table, const uint8_t* image, bool last, int64_t plane, int64_t first, int count,
                 float* const y[3], const StainJob& job) {
  alignas(64) uint8_t rows[3][kChunk];
  const uint8_t* x[3] = {image + first, image + plane + first, image + 2 * plane + first};
  if (last) {
    for (int c = 0; c < 3; ++c) {
      const uint8_t* from = image + 3 * first + c;
#pragma omp simd
      for (int k = 0; k < count; ++k) rows[c][k] = from[3 * k];
      x[c] = rows[c];
    }
  }
  const Stain<float> s = *table.stain;
  for (int k = 0; k < count; k += 64) {
    const __mmask64 there = count - k < 64 ? (uint64_t{1} << (count - k)) - 1 : ~uint64_t{0};
    __m512 l[3][4];
    for (int c = 0; c < 3; ++c) look_up(table, _mm512_maskz_loadu_epi8(there, x[c] + k), l[c]);
    for (int j = 0; j < 4; ++j) {
      for (int i = 0; i < 3; ++i) {
        const __m512 e = _mm512_set1_ps(s.a[3 * i]) * l[0][j] + _mm512_set1_ps(s.a[3 * i + 1]) * l[1][j] +
                         _mm512_set1_ps(s.a[3 * i + 2]) * l[2][j] + _mm512_set1_ps(s.c[i]);
        const __m512 to = exp2_below_0(e) * _mm512_set1_ps(job.scale[i]) + _mm512_set1_ps(job.shift[i]);
        _mm512_mask_storeu_ps(y[i] + k + 16 * j, static_cast<__mmask16>(there >> (16 * j)), to);
      }
    }
  }
}
