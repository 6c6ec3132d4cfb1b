// How the kernels on rows go through a warp: which pixels a chunk samples, reading them, and the way back. A part of
// stain_augment_rows.h, which includes it within its namespaces.

// Of a chunk of one output row: which pixels of the image it samples, and the weights.
struct Footprint {
  alignas(64) int32_t pixel[kChunk + 1];
  alignas(64) float ax[kChunk], bx[kChunk], ay[kChunk], by[kChunk];
};

void find_footprint(const Warp& warp, int64_t row, int64_t first, int count, int height, int width, Footprint& f) {
  const float dx = static_cast<float>(warp.xj), dy = static_cast<float>(warp.yj);
  const float steepest = abs_of(dx) > abs_of(dy) ? abs_of(dx) : abs_of(dy);
  const int step = steepest < 2 ? kBlock : steepest < 8 ? kBlock / 4 : 1;  // positions stay small, and so exact
  for (int block = 0; block < count; block += step) {
    const double i = static_cast<double>(row), j = static_cast<double>(first + block);
    const Split<float> x = Split<float>::of(warp.x0 + warp.xi * i + warp.xj * j);
    const Split<float> y = Split<float>::of(warp.y0 + warp.yi * i + warp.yj * j);
    const int size = count - block < step ? count - block : step;
    int32_t* pixel = f.pixel + block;
    float *ax = f.ax + block, *bx = f.bx + block, *ay = f.ay + block, *by = f.by + block;
#pragma omp simd
    for (int k = 0; k < size; ++k) {
      const float ahead = static_cast<float>(k);
      const Neighbours<float> across = Neighbours<float>::at(x.rest + dx * ahead, x.origin, width);
      const Neighbours<float> down = Neighbours<float>::at(y.rest + dy * ahead, y.origin, height);
      pixel[k] = down.first * width + across.first;
      ax[k] = across.a;
      bx[k] = across.b;
      ay[k] = down.a;
      by[k] = down.b;
    }
  }
  if (count % 2) f.pixel[count] = 0;  // pairs of pixels are copied
}

// Pairs of neighbours along the row, of the pixels of a chunk: upper and lower row, three channels.
template <typename T>
struct Pairs {
  alignas(64) T upper[3][2 * kChunk], lower[3][2 * kChunk];
};

// Two pairs of floats; the compiler makes one store of it.
typedef int64_t TwoPairs __attribute__((vector_size(16)));

template <typename T>
HISTODD_INLINE void copy_two(const T* row, int64_t first, int64_t second, T* to) {
  if constexpr (sizeof(T) == sizeof(float)) {
    int64_t a, b;
    __builtin_memcpy(&a, row + first, sizeof a);
    __builtin_memcpy(&b, row + second, sizeof b);
    const TwoPairs both = {a, b};
    __builtin_memcpy(to, &both, sizeof both);
  } else {
    __builtin_memcpy(to, row + first, 2 * sizeof(T));
    __builtin_memcpy(to + 2, row + second, 2 * sizeof(T));
  }
}

// Not for the compiler to vectorise: wider registers take longer to put together. Pixels of a chunk beyond `count`
// exist.
template <typename T>
HISTODD_SCALAR void copy_planes(const T* image, int64_t plane, int64_t width, const int32_t* pixel, int64_t count,
                                Pairs<T>& pairs) {
  const T *r = image, *g = image + plane, *b = image + 2 * plane;
  for (int64_t k = 0; k < count; k += 2) {
    const int64_t at = pixel[k], next = pixel[k + 1];
    copy_two(r, at, next, pairs.upper[0] + 2 * k);
    copy_two(r + width, at, next, pairs.lower[0] + 2 * k);
    copy_two(g, at, next, pairs.upper[1] + 2 * k);
    copy_two(g + width, at, next, pairs.lower[1] + 2 * k);
    copy_two(b, at, next, pairs.upper[2] + 2 * k);
    copy_two(b + width, at, next, pairs.lower[2] + 2 * k);
  }
}

template <typename T>
HISTODD_SCALAR void copy_interleaved(const T* image, int64_t width, const int32_t* pixel, int64_t count,
                                     Pairs<T>& pairs) {
  for (int64_t k = 0; k < count; ++k) {
    const T* at = image + 3 * static_cast<int64_t>(pixel[k]);
    const T* below = at + 3 * width;
    for (int c = 0; c < 3; ++c) {
      pairs.upper[c][2 * k] = at[c];
      pairs.upper[c][2 * k + 1] = at[c + 3];
      pairs.lower[c][2 * k] = below[c];
      pairs.lower[c][2 * k + 1] = below[c + 3];
    }
  }
}

template <typename T>
void gather(const T* image, bool last, int64_t plane, int width, const Footprint& f, int count, Pairs<T>& pairs,
            Rows& rows) {
  if (last) {
    copy_interleaved(image, width, f.pixel, count, pairs);
  } else {
    copy_planes(image, plane, width, f.pixel, count, pairs);
  }
  constexpr float unit = sizeof(T) == 1 ? 1.0f / 255.0f : 1.0f;
  for (int c = 0; c < 3; ++c) {
    const T *upper = pairs.upper[c], *lower = pairs.lower[c];
    float* to = rows.c[c];
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) {
      const float ax = f.ax[k], bx = f.bx[k], ay = f.ay[k], by = f.by[k];
      const float share = (ax + bx) * (ay + by);
      const float above = ax * to_float(upper[2 * k]) + bx * to_float(upper[2 * k + 1]);
      const float below = ax * to_float(lower[2 * k]) + bx * to_float(lower[2 * k + 1]);
      const float v = (ay * above + by * below) * unit + (1.0f - share);
      to[k] = share > 0.0f ? v : 1.0f;  // not the NaN of a pixel that has no share in it
    }
  }
}

// The gradient d of the sampled pixels, added to the four neighbours in the scratch: [h,w,4], so that two neighbours in
// a row are one vector. Every fourth pixel at a time: pixels side by side share neighbours, and what was only just
// stored is slow to load again.
typedef float Four __attribute__((vector_size(16)));
typedef float Eight __attribute__((vector_size(32), aligned(16)));

void scatter(const Rows& d, const Footprint& f, int count, int width, float* scratch) {
  alignas(64) float packed[4 * kTile];
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    packed[4 * k] = d.c[0][k];
    packed[4 * k + 1] = d.c[1][k];
    packed[4 * k + 2] = d.c[2][k];
    packed[4 * k + 3] = 0.0f;
  }
  for (int64_t start = 0; start < 4; ++start) {
    for (int64_t k = start; k < count; k += 4) {
      const float *g = packed + 4 * k, a = f.ax[k], b = f.bx[k];
      const Eight both = Eight{g[0], g[1], g[2], g[3], g[0], g[1], g[2], g[3]} * Eight{a, a, a, a, b, b, b, b};
      Eight* upper = reinterpret_cast<Eight*>(scratch + 4 * static_cast<int64_t>(f.pixel[k]));
      Eight* lower = reinterpret_cast<Eight*>(scratch + 4 * (static_cast<int64_t>(f.pixel[k]) + width));
      *upper += f.ay[k] * both;
      *lower += f.by[k] * both;
    }
  }
}

// The rows and columns of the image that a tile of the output, [i, i + rows) x [j, j + columns), samples.
struct Box {
  int64_t top = 0, bottom = 0, left = 0, right = 0;

  Box() = default;
  Box(const Warp& w, int64_t i, int64_t j, int64_t rows, int64_t columns, int64_t height, int64_t width) {
    const double x = w.x0 + w.xi * i + w.xj * j, y = w.y0 + w.yi * i + w.yj * j;
    left = inside(x + low(w.xi * rows) + low(w.xj * columns), width);
    right = inside(x + 2 - low(-w.xi * rows) - low(-w.xj * columns), width);
    top = inside(y + low(w.yi * rows) + low(w.yj * columns), height);
    bottom = inside(y + 2 - low(-w.yi * rows) - low(-w.yj * columns), height);
  }
  static double low(double v) { return v < 0 ? v : 0; }
  static int64_t inside(double v, int64_t size) {  // NaN is 0
    v = v > 0 ? v : 0;
    return static_cast<int64_t>(v < static_cast<double>(size) ? v : static_cast<double>(size));
  }
};

// Asks for the rows [top, bottom) of a box; neither their order nor their places are what hardware would guess. Inlined
// by force: the compiler takes a function that only prefetches for one without effect and drops its calls.
template <typename T>
HISTODD_INLINE void prefetch(const T* image, const StainJob& job, const Box& box, int64_t top, int64_t bottom) {
  const int64_t step = job.image_last ? 3 : 1, plane = job.h * job.w;
  for (int64_t y = top; y < bottom; ++y) {
    for (int c = 0; c < (job.image_last ? 1 : 3); ++c) {
      const char* row = reinterpret_cast<const char*>(image + c * plane + y * job.w * step);
      const int64_t size = sizeof(T) * step;
      for (int64_t at = box.left * size; at < box.right * size; at += 64) __builtin_prefetch(row + at, 0, 2);
    }
  }
}
