// macenko_fit on the CPU. Each image takes three passes over chunks of pixels that stay in cache: optical densities and
// their moments; angle keys of the tissue; concentrations of all pixels. The percentiles lie in the tails, so a pass
// keeps only the keys beyond a threshold guessed from a sample, and bisection selects among those: exact whatever
// the guess, which only decides how much is kept (everything, in a second pass, when it was too tight).
// Batches run in parallel over images, or over the chunks of each image when there are few. Moments are summed chunk by
// chunk, in order, and selection does not depend on order: the bits are the same for any number of threads.
#include "../macenko_fit.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <vector>

#include "../checks.h"
#include "instruction_sets.h"

namespace histodd {
namespace {

constexpr int64_t kChunk = 4096;    // pixels per unit of work
constexpr int64_t kBlock = 512;     // pixels whose keys wait in the L1 cache for selection
constexpr int64_t kSerial = 8192;   // below this many pixels threads cost more than they save
constexpr int64_t kSampled = 1024;  // pixels of the sample that thresholds are guessed from, at most

// ---- Passes: bodies compiled for every instruction set --------------------------------------------------------------

// Optical densities of one channel; Stride is 3 for channels_last. Sets *bad where a value is out of range.
template <typename In, typename T, int Stride>
struct DensityPass {
  HISTODD_INLINE static void run(const In* x, int64_t n, Density<T> density, const T* table, T* od, int* bad) {
    if constexpr (std::is_same_v<In, uint8_t>) {
      for (int64_t i = 0; i < n; ++i) od[i] = table[x[i * Stride]];
    } else {
      int wrong = 0;
#pragma omp simd reduction(| : wrong)
      for (int64_t i = 0; i < n; ++i) {
        const T v = static_cast<T>(x[i * Stride]);
        wrong |= !((v >= T(0)) & (v <= T(kLargestImageValue)));
        od[i] = optical_density(v, density);
      }
      *bad |= wrong;
    }
  }
};

template <typename T>
struct MomentsPass {
  HISTODD_INLINE static void run(const T* r, const T* g, const T* b, int64_t n, T beta, Moments* out) {
    double count = 0, sr = 0, sg = 0, sb = 0, rr = 0, rg = 0, rb = 0, gg = 0, gb = 0, bb = 0;
    T w[kBlock], x[kBlock], y[kBlock], z[kBlock];  // two loops: compilers vectorise one with comparisons badly
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t size = n - begin < kBlock ? n - begin : kBlock;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const T p = r[begin + i], q = g[begin + i], s = b[begin + i];
        const T lowest = p < q ? p : q;
        const bool tissue = (lowest < s ? lowest : s) >= beta;
        w[i] = tissue ? T(1) : T(0);
        x[i] = tissue ? p : T(0);
        y[i] = tissue ? q : T(0);
        z[i] = tissue ? s : T(0);
      }
#pragma omp simd reduction(+ : count, sr, sg, sb, rr, rg, rb, gg, gb, bb)
      for (int64_t i = 0; i < size; ++i) {
        const double p = x[i], q = y[i], s = z[i];
        count += static_cast<double>(w[i]);
        sr += p;
        sg += q;
        sb += s;
        rr += p * p;
        rg += p * q;
        rb += p * s;
        gg += q * q;
        gb += q * s;
        bb += s * s;
      }
    }
    *out = {count, {sr, sg, sb}, {rr, rg, rb, gg, gb, bb}};
  }
};

// Appends to `first` and `second` the keys that reach their thresholds, and to the counts their numbers.
template <typename T, typename Keys>
struct TailPass {
  HISTODD_INLINE static void run(const T* r, const T* g, const T* b, int64_t n, Keys keys, T first_from, T second_from,
                                 T* first, int64_t* first_count, T* second, int64_t* second_count) {
    T p[kBlock], q[kBlock];
    int64_t np = 0, nq = 0;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t size = n - begin < kBlock ? n - begin : kBlock;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) keys(r[begin + i], g[begin + i], b[begin + i], p[i], q[i]);
      for (int64_t i = 0; i < size; ++i) {
        first[np] = p[i];
        np += p[i] >= first_from;
        second[nq] = q[i];
        nq += q[i] >= second_from;
      }
    }
    *first_count = np;
    *second_count = nq;
  }
};

// The `rank`-th largest of v[0, n), counted from 0, and the one above it (itself at rank 0): bisection over the ordered
// integers of the values, counting in every step those that are not smaller. 10 to 20 steps, and no branches to
// mispredict.
template <typename T>
struct SelectPass {
  HISTODD_INLINE static void run(const T* v, int64_t n, int64_t rank, std::array<double, 2>* out) {
    T smallest = v[0], greatest = v[0];
#pragma omp simd reduction(min : smallest) reduction(max : greatest)
    for (int64_t i = 0; i < n; ++i) {
      smallest = v[i] < smallest ? v[i] : smallest;
      greatest = v[i] > greatest ? v[i] : greatest;
    }
    auto low = ordered_bits(smallest), high = ordered_bits(greatest);  // the wanted value is at least `low`
    while (low < high) {
      const auto middle = low + (high - low) / 2 + 1;
      const int64_t count = count_from(v, n, from_ordered_bits(middle));
      if (count > rank) {
        low = middle;
      } else {
        high = middle - 1;
      }
      if (count == rank + 1) break;  // the smallest of these is the one
    }
    const T from = from_ordered_bits(low);
    T here = greatest, above = greatest;
#pragma omp simd reduction(min : here)
    for (int64_t i = 0; i < n; ++i) here = v[i] >= from && v[i] < here ? v[i] : here;
#pragma omp simd reduction(min : above)
    for (int64_t i = 0; i < n; ++i) above = v[i] > here && v[i] < above ? v[i] : above;
    const bool tied = here == greatest || count_from(v, n, from_ordered_bits(ordered_bits(here) + 1)) != rank;
    *out = {static_cast<double>(here), static_cast<double>(tied ? here : above)};
  }
  HISTODD_INLINE static int64_t count_from(const T* v, int64_t n, T from) {
    int64_t total = 0;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t end = n - begin < kBlock ? n : begin + kBlock;
      int32_t count = 0;
#pragma omp simd reduction(+ : count)
      for (int64_t i = begin; i < end; ++i) count += v[i] >= from;
      total += count;
    }
    return total;
  }
};

// ---- One image ------------------------------------------------------------------------------------------------------

// Memory of one worker, reused from image to image.
template <typename T>
struct Scratch {
  int64_t pixels, chunks, step, samples;
  std::unique_ptr<T[]> od, tail[2];  // [3, pixels], [pixels] each: every chunk writes to its own part
  std::vector<Moments> moments;
  std::vector<int64_t> count[2];
  std::vector<int> bad;
  std::vector<T> sample[3];  // optical densities of the sampled pixels

  explicit Scratch(int64_t p)
      : pixels(p),
        chunks((p + kChunk - 1) / kChunk),
        step(std::max<int64_t>(p / kSampled, 16) | 1),  // odd, so that no column of the image is left out
        samples((p + step - 1) / step),
        od(new T[3 * p]),
        tail{std::unique_ptr<T[]>(new T[p]), std::unique_ptr<T[]>(new T[p])},
        moments(chunks),
        count{std::vector<int64_t>(chunks), std::vector<int64_t>(chunks)},
        bad(chunks) {
    for (auto& channel : sample) channel.resize(samples);
  }

  const T* channel(int c) const { return od.get() + c * pixels; }

  template <typename F>
  void over_chunks(F f) const {
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) f(c, c * kChunk, std::min(kChunk, pixels - c * kChunk));
    });
  }
};

template <typename T>
std::array<double, 2> largest(const T* v, int64_t n, int64_t rank) {
  std::array<double, 2> out;
  run_best<SelectPass<T>>(v, n, rank, &out);
  return out;
}

// A threshold that a little more than `rank` + 1 of `count` keys should reach, from a sample of n of them.
template <typename T>
T guess_threshold(const T* sample, int64_t n, int64_t rank, int64_t count) {
  const int64_t wanted = sample_rank(rank, count, n);
  if (wanted < 0) return -std::numeric_limits<T>::infinity();
  return static_cast<T>(largest(sample, n, wanted)[0]);
}

// Of both streams of keys, with `count` that are not NaN: the ranks asked for.
template <typename T, typename Keys>
Tails tails_of(Scratch<T>& s, const Keys& keys, int64_t count, const TailRanks& ranks) {
  const int64_t* rank = ranks.from_top;
  const T everything = -std::numeric_limits<T>::infinity();  // which NaN does not reach
  std::array<T, 2> from;
  T* sampled[2] = {s.tail[0].get(), s.tail[1].get()};
  int64_t sizes[2];
  run_best<TailPass<T, Keys>>(s.sample[0].data(), s.sample[1].data(), s.sample[2].data(), s.samples, keys, everything,
                              everything, sampled[0], &sizes[0], sampled[1], &sizes[1]);
  for (int k : {0, 1}) from[k] = guess_threshold(sampled[k], sizes[k], rank[k], count);
  int64_t kept[2];
  while (true) {
    s.over_chunks([&](int64_t c, int64_t begin, int64_t n) {
      run_best<TailPass<T, Keys>>(s.channel(0) + begin, s.channel(1) + begin, s.channel(2) + begin, n, keys, from[0],
                                  from[1], s.tail[0].get() + begin, &s.count[0][c], s.tail[1].get() + begin,
                                  &s.count[1][c]);
    });
    bool enough = true;
    for (int k : {0, 1}) {
      kept[k] = 0;
      for (int64_t n : s.count[k]) kept[k] += n;
      if (kept[k] > rank[k]) continue;
      from[k] = everything;
      enough = false;
    }
    if (enough) break;
  }
  Tails out;
  for (int k : {0, 1}) {
    T *tail = s.tail[k].get(), *end = tail;
    for (int64_t c = 0; c < s.chunks; ++c) {
      const T* part = tail + c * kChunk;
      end = std::copy(part, part + s.count[k][c], end);  // never beyond the part itself
    }
    const auto value = largest(tail, kept[k], rank[k]);
    out.value[k] = value[0];
    out.above[k] = value[1];
  }
  return out;
}

template <typename In, typename T, int Stride>
Fit fit_image(const In* image, Scratch<T>& s, const T* table, const FitOptions& o) {
  const Density<T> density = make_density<T>(o);
  const T beta = static_cast<T>(o.beta);
  s.over_chunks([&](int64_t c, int64_t begin, int64_t n) {
    s.bad[c] = 0;
    T* od = s.od.get() + begin;
    const int64_t piece = Stride == 1 ? n : kBlock;  // interleaved channels are read while they are in the L1 cache
    for (int64_t i = 0; i < n; i += piece) {
      for (int k = 0; k < 3; ++k) {
        const In* x = Stride == 1 ? image + k * s.pixels + begin : image + k + 3 * (begin + i);
        run_best<DensityPass<In, T, Stride>>(x, std::min(piece, n - i), density, table, od + k * s.pixels + i,
                                             &s.bad[c]);
      }
    }
    run_best<MomentsPass<T>>(od, od + s.pixels, od + 2 * s.pixels, n, beta, &s.moments[c]);
    // The sample is taken here, by the thread that has these pixels in its cache.
    for (int64_t i = (begin + s.step - 1) / s.step; i * s.step < begin + n; ++i) {
      for (int k = 0; k < 3; ++k) s.sample[k][i] = s.channel(k)[i * s.step];
    }
  });
  Moments moments;
  for (const Moments& m : s.moments) moments.add(m);
  if (std::any_of(s.bad.begin(), s.bad.end(), [](int b) { return b != 0; })) return failed_fit(kFitOutOfRange);
  if (too_little_tissue(moments.count, s.pixels, o)) return failed_fit(kFitLittleTissue);
  const Plane plane = principal_plane(moments, o.sign_by_first);
  if (plane.flat) return failed_fit(kFitDegenerate);

  const int64_t count = static_cast<int64_t>(moments.count);
  const Tails angles = tails_of(s, AngleKeys<T>(plane, beta), count, angle_ranks(count, o));
  const Stains stains = stain_vectors(plane, angles, count, o);
  if (stains.degenerate) return failed_fit(kFitDegenerate);
  const Tails tops = tails_of(s, ConcentrationKeys<T>(stains), s.pixels, concentration_ranks(s.pixels, o));
  return finished_fit(stains, tops, s.pixels, o);
}

// ---- The batch ------------------------------------------------------------------------------------------------------

template <typename In, typename T, int Stride>
void fit_batch(const at::Tensor& image, const FitOptions& o, const FitOutputs& out) {
  const int64_t images = image.size(0), pixels = image.size(2) * image.size(3);
  const In* data = image.const_data_ptr<In>();
  std::array<T, 256> table;
  for (int i = 0; i < 256; ++i) table[i] = static_cast<T>(grey_density(i, o));
  T* matrix = out.stain_matrix.mutable_data_ptr<T>();
  T* top = out.max_concentration.mutable_data_ptr<T>();
  uint8_t* status = out.status.mutable_data_ptr<uint8_t>();
  // Few images: one after the other, each with all threads on its chunks.
  const int64_t threads = at::get_num_threads();
  const bool whole = images >= 4 * threads || images % threads == 0;
  const int64_t grain = whole ? std::max<int64_t>(kSerial / pixels, 1) : images;
  at::parallel_for(0, images, grain, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(pixels);
    for (int64_t i = begin; i < end; ++i) {
      const Fit fit = fit_image<In, T, Stride>(data + i * 3 * pixels, scratch, table.data(), o);
      for (int k = 0; k < 6; ++k) matrix[6 * i + k] = static_cast<T>(fit.matrix[k / 2][k % 2]);
      for (int k = 0; k < 2; ++k) top[2 * i + k] = static_cast<T>(fit.top[k]);
      status[i] = fit.status;
    }
  });
}

template <typename In, typename T>
void fit_layout(const at::Tensor& image, const FitOptions& o, const FitOutputs& out) {
  if (image.is_contiguous()) return fit_batch<In, T, 1>(image, o, out);
  if (image.is_contiguous(at::MemoryFormat::ChannelsLast)) return fit_batch<In, T, 3>(image, o, out);
  return fit_batch<In, T, 1>(image.contiguous(), o, out);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> macenko_fit(const at::Tensor& image, double io, double beta,
                                                           double alpha, double min_tissue, double min_concentration,
                                                           c10::string_view interpolation, bool plus_one,
                                                           c10::string_view sign) {
  const FitOptions o =
      fit_options(image, io, beta, alpha, min_tissue, min_concentration, interpolation, plus_one, sign);
  const FitOutputs out = fit_outputs(image);
  if (image.numel() > 0) {
    if (image.scalar_type() == at::kDouble) {
      fit_layout<double, double>(image, o, out);
    } else if (image.scalar_type() == at::kByte) {
      fit_layout<uint8_t, float>(image, o, out);
    } else if (image.scalar_type() == at::kFloat) {
      fit_layout<float, float>(image, o, out);
    } else {
      AT_DISPATCH_REDUCED_FLOATING_TYPES(image.scalar_type(), "macenko_fit",
                                         [&] { fit_layout<scalar_t, float>(image, o, out); });
    }
  }
  return {out.stain_matrix, out.max_concentration, out.status};
}

at::Tensor macenko_affine(const at::Tensor& stain_matrix_in, const at::Tensor& top_in, const at::Tensor& target_in,
                          const at::Tensor& target_top_in) {
  check_macenko_affine(stain_matrix_in, top_in, target_in, target_top_in);
  const at::Tensor stain_matrix = stain_matrix_in.contiguous(), top = top_in.contiguous();
  const at::Tensor target = target_in.contiguous(), target_top = target_top_in.contiguous();
  const int64_t n = stain_matrix.size(0);
  const at::Tensor out = at::empty({n, 3, 4}, stain_matrix.options());
  AT_DISPATCH_FLOATING_TYPES(stain_matrix.scalar_type(), "macenko_affine", [&] {
    for (int64_t i = 0; i < n; ++i) {
      affine_onto(stain_matrix.const_data_ptr<scalar_t>() + 6 * i, top.const_data_ptr<scalar_t>() + 2 * i,
                  target.const_data_ptr<double>(), target_top.const_data_ptr<double>(),
                  out.mutable_data_ptr<scalar_t>() + 12 * i);
    }
  });
  return out;
}

}  // namespace
}  // namespace histodd

TORCH_LIBRARY_IMPL(histodd, CPU, m) {
  m.impl("macenko_fit", histodd::macenko_fit);
  m.impl("macenko_affine", histodd::macenko_affine);
}
