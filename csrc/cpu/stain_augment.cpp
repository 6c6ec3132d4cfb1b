// stain_augment on the CPU: float32 through the vectorised kernels of the best instruction set, float64 (and shapes
// that the kernels do not take) pixel by pixel.
#include "../stain_augment.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "../checks.h"
#include "stain_augment_kernels.h"

namespace histodd {
namespace {

using Optional = std::optional<at::Tensor>;

constexpr int64_t kUnit = 8192;  // pixels per unit of work, about; whole rows. Never depends on the number of threads.

const StainKernels& kernels() {
#ifdef HISTODD_X86_DISPATCH
  if (instruction_set() == InstructionSet::kAvx512) {
    static const bool vbmi = __builtin_cpu_supports("avx512vbmi");
    return vbmi ? stain_kernels_avx512vbmi : stain_kernels_avx512;
  }
  if (instruction_set() == InstructionSet::kAvx2) return stain_kernels_avx2;
#endif
  return stain_kernels_baseline;
}

// The small tensors, prepared per image in the type S that is computed in.
template <typename S>
struct Parameters {
  std::vector<Stain<S>> stain;
  std::vector<Warp> warp;
  S scale[3] = {1, 1, 1}, shift[3] = {0, 0, 0};

  Parameters(const at::Tensor& image, const Optional& stain_tensor, const Optional& warp_tensor, const Optional& mean,
             const Optional& std, const Optional& valid, double io) {
    const int64_t n = image.size(0);
    if (stain_tensor) {
      const at::Tensor ab = stain_tensor->to(at::kDouble).contiguous();
      const at::Tensor ok = valid ? valid->contiguous() : at::Tensor();
      for (int64_t i = 0; i < n; ++i) {
        const Stain<double> s = Stain<double>::make(ab.const_data_ptr<double>() + 12 * i, io,
                                                    ok.defined() && !ok.const_data_ptr<bool>()[i]);
        Stain<S> t;
        for (int k = 0; k < 9; ++k) t.a[k] = static_cast<S>(s.a[k]);
        for (int k = 0; k < 3; ++k) t.c[k] = static_cast<S>(s.c[k]);
        t.p = static_cast<S>(s.p);
        t.q = static_cast<S>(s.q);
        t.skip = s.skip;
        stain.push_back(t);
      }
    }
    if (warp_tensor) {
      const at::Tensor m = warp_tensor->to(at::kDouble).contiguous();
      for (int64_t i = 0; i < n; ++i) {
        warp.push_back(Warp::make(m.const_data_ptr<double>() + 6 * i, image.size(2), image.size(3)));
      }
    }
    if (mean && std) {
      const at::Tensor m = mean->to(at::kDouble).contiguous(), d = std->to(at::kDouble).contiguous();
      for (int c = 0; c < 3; ++c) {
        scale[c] = static_cast<S>(1 / d.const_data_ptr<double>()[c]);
        shift[c] = static_cast<S>(-m.const_data_ptr<double>()[c] / d.const_data_ptr<double>()[c]);
      }
    }
  }
};

// Pixels of either format. Reads and writes are on the scale [0, 1].
template <typename T>
struct Planes {
  T* data;
  int64_t plane;
  bool last;

  template <typename S>
  S get(int64_t pixel, int c) const {
    const S v = static_cast<S>(data[last ? 3 * pixel + c : c * plane + pixel]);
    return std::is_same_v<std::remove_const_t<T>, uint8_t> ? v / S(255) : v;
  }
  template <typename S>
  void set(int64_t pixel, int c, S v) const {
    data[last ? 3 * pixel + c : c * plane + pixel] = static_cast<T>(v);
  }
};

template <typename T>
Planes<T> planes(const at::Tensor& t, int64_t n) {
  const int64_t plane = t.size(2) * t.size(3);
  return {static_cast<T*>(const_cast<void*>(t.const_data_ptr())) + n * 3 * plane, plane, is_channels_last(t)};
}

// The four neighbours of a sampled pixel.
struct Corners {
  int64_t pixel[4];
  double weight[4];

  Corners(const Warp& warp, int64_t i, int64_t j, int64_t height, int64_t width) {
    const double row = static_cast<double>(i), column = static_cast<double>(j);
    const Split<double> x = Split<double>::of(warp.x0 + warp.xi * row + warp.xj * column);
    const Split<double> y = Split<double>::of(warp.y0 + warp.yi * row + warp.yj * column);
    const auto across = Neighbours<double>::at(x.rest, x.origin, static_cast<int>(width));
    const auto down = Neighbours<double>::at(y.rest, y.origin, static_cast<int>(height));
    const int64_t right = width > 1, below = height > 1 ? width : 0, first = down.first * width + across.first;
    for (int k = 0; k < 4; ++k) {
      pixel[k] = first + (k % 2 ? right : 0) + (k / 2 ? below : 0);
      weight[k] = (k / 2 ? down.b : down.a) * (k % 2 ? across.b : across.a);
    }
  }
};

template <typename T>
void sample(const Planes<const T>& image, const Corners& corners, double x[3]) {
  for (int c = 0; c < 3; ++c) {
    double sum = 0, share = 0;
    for (int k = 0; k < 4; ++k) {
      if (corners.weight[k] == 0) continue;
      sum += corners.weight[k] * image.template get<double>(corners.pixel[k], c);
      share += corners.weight[k];
    }
    x[c] = sum + (1 - share);
  }
}

template <typename In, typename Out>
void forward_rows(const at::Tensor& image, const at::Tensor& out, const Parameters<double>& p, int64_t n, int64_t begin,
                  int64_t end) {
  const auto from = planes<const In>(image, n);
  const auto to = planes<Out>(out, n);
  const int64_t h = image.size(2), w = image.size(3);
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t j = 0; j < w; ++j) {
      double x[3];
      if (p.warp.empty()) {
        for (int c = 0; c < 3; ++c) x[c] = from.template get<double>(i * w + j, c);
      } else {
        sample(from, Corners(p.warp[n], i, j, h, w), x);
      }
      if (!p.stain.empty() && !p.stain[n].skip) {
        const Rgb<double> y = p.stain[n].value({x[0], x[1], x[2]});
        x[0] = y.r, x[1] = y.g, x[2] = y.b;
      }
      for (int c = 0; c < 3; ++c) to.set(i * w + j, c, x[c] * p.scale[c] + p.shift[c]);
    }
  }
}

// With a warp, grad_image is added up in `scratch` ([h,w,3]).
template <typename In, typename Out>
void backward_rows(const at::Tensor& image, const at::Tensor& grad, const at::Tensor& grad_image,
                   const Parameters<double>& p, int64_t n, int64_t begin, int64_t end, double* scratch, double* sums) {
  const auto from = planes<const In>(image, n);
  const auto upstream = planes<const Out>(grad, n);
  const int64_t h = image.size(2), w = image.size(3);
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t j = 0; j < w; ++j) {
      double x[3], dx[3];
      for (int c = 0; c < 3; ++c) dx[c] = upstream.template get<double>(i * w + j, c) * p.scale[c];
      if (p.warp.empty()) {
        for (int c = 0; c < 3; ++c) x[c] = from.template get<double>(i * w + j, c);
      } else {
        sample(from, Corners(p.warp[n], i, j, h, w), x);
      }
      if (!p.stain.empty() && !p.stain[n].skip) {
        const Stain<double>::Vjp v = p.stain[n].vjp({x[0], x[1], x[2]}, {dx[0], dx[1], dx[2]});
        dx[0] = v.d.r, dx[1] = v.d.g, dx[2] = v.d.b;
        const double rows[3] = {v.h.r, v.h.g, v.h.b}, columns[4] = {kLn2 * v.l.r, kLn2 * v.l.g, kLn2 * v.l.b, -1};
        for (int k = 0; sums && k < 12; ++k) sums[k] += rows[k / 4] * columns[k % 4];
      }
      if (!grad_image.defined()) continue;
      if (scratch) {
        const Corners corners(p.warp[n], i, j, h, w);
        for (int k = 0; k < 12; ++k) {
          if (corners.weight[k / 3] != 0)
            scratch[3 * corners.pixel[k / 3] + k % 3] += corners.weight[k / 3] * dx[k % 3];
        }
      } else {
        for (int c = 0; c < 3; ++c) planes<In>(grad_image, n).set(i * w + j, c, dx[c]);
      }
    }
  }
}

#define HISTODD_DISPATCH_IMAGE(type, ...)                     \
  AT_DISPATCH_SWITCH(type, "stain_augment",                   \
                     AT_DISPATCH_CASE(at::kByte, __VA_ARGS__) \
                         AT_DISPATCH_CASE_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, __VA_ARGS__))

Pixel pixel_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kByte:
      return Pixel::kByte;
    case at::kHalf:
      return Pixel::kHalf;
    case at::kBFloat16:
      return Pixel::kBFloat16;
    default:
      return Pixel::kFloat;
  }
}

// Whether the vectorised kernels take it: float32, at least 2 x 2, and offsets within an image that fit 32 bits.
bool vectorised(const at::Tensor& image, at::ScalarType other) {
  const int64_t h = image.size(2), w = image.size(3);
  return image.scalar_type() != at::kDouble && other != at::kDouble && h > 1 && w > 1 &&
         h * w <= std::numeric_limits<int32_t>::max();
}

StainJob make_job(const at::Tensor& image, const at::Tensor& out, const Parameters<float>& p,
                  const at::Tensor& grad_image) {
  StainJob job;
  job.n = image.size(0);
  job.h = image.size(2);
  job.w = image.size(3);
  job.image = image.const_data_ptr();
  job.image_type = pixel_of(image);
  job.image_last = is_channels_last(image);
  job.stain = p.stain.empty() ? nullptr : p.stain.data();
  job.warp = p.warp.empty() ? nullptr : p.warp.data();
  std::copy_n(p.scale, 3, job.scale);
  std::copy_n(p.shift, 3, job.shift);
  job.out = const_cast<void*>(out.const_data_ptr());
  job.out_type = pixel_of(out);
  job.out_last = is_channels_last(out);
  job.grad_image = grad_image.defined() ? grad_image.mutable_data_ptr() : nullptr;
  return job;
}

// Images cut into units of whole rows.
struct Units {
  int64_t rows, per_image, count;

  Units(const at::Tensor& image, bool whole) {
    const int64_t h = image.size(2), w = image.size(3);
    rows = whole ? h : std::clamp<int64_t>(kUnit / std::max<int64_t>(w, 1), std::min<int64_t>(h, 8), h);
    per_image = image.numel() ? (h + rows - 1) / rows : 0;
    count = image.size(0) * per_image;
  }
};

at::Tensor stain_augment(const at::Tensor& image_in, const Optional& stain, const Optional& warp, const Optional& mean,
                         const Optional& std, const Optional& valid, double io, at::ScalarType dtype,
                         bool channels_last) {
  check_stain_augment(image_in, stain, warp, mean, std, valid, io, dtype);
  const at::Tensor image = either_format(image_in);
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const at::Tensor out = at::empty(image.sizes(), image.options().dtype(dtype).memory_format(format));
  const Units units(image, false);
  const int64_t h = image.size(2);
  const auto for_units = [&](auto&& f) {
    at::parallel_for(0, units.count, 1, [&](int64_t begin, int64_t end) {
      while (begin < end) {  // what one task has of one image, together
        const int64_t n = begin / units.per_image, first = begin % units.per_image;
        const int64_t last = std::min(end - n * units.per_image, units.per_image);
        f(n, first * units.rows, std::min(last * units.rows, h));
        begin += last - first;
      }
    });
  };
  if (vectorised(image, dtype)) {
    const Parameters<float> p(image, stain, warp, mean, std, valid, io);
    const StainJob job = make_job(image, out, p, {});
    for_units([&](int64_t n, int64_t begin, int64_t end) { kernels().forward(job, n, begin, end); });
  } else {
    const Parameters<double> p(image, stain, warp, mean, std, valid, io);
    HISTODD_DISPATCH_IMAGE(image.scalar_type(), [&] {
      using In = scalar_t;
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "stain_augment", [&] {
        for_units(
            [&](int64_t n, int64_t begin, int64_t end) { forward_rows<In, scalar_t>(image, out, p, n, begin, end); });
      });
    });
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor> stain_augment_backward(const at::Tensor& grad_in, const at::Tensor& image_in,
                                                          const Optional& stain, const Optional& warp,
                                                          const Optional& mean, const Optional& std,
                                                          const Optional& valid, double io, bool need_image,
                                                          bool need_stain) {
  check_stain_augment(image_in, stain, warp, mean, std, valid, io, grad_in.scalar_type());
  check_stain_augment_backward(grad_in, image_in, stain, need_image, need_stain);
  const at::Tensor image = either_format(image_in), grad = either_format(grad_in);
  const int64_t n = image.size(0), h = image.size(2), plane = h * image.size(3);
  at::Tensor grad_image;
  if (need_image) {
    grad_image =
        at::empty(image.sizes(), image.options().memory_format(is_channels_last(image) ? at::MemoryFormat::ChannelsLast
                                                                                       : at::MemoryFormat::Contiguous));
  }
  // Through a warp, one worker owns an image and its scratch; otherwise blocks of rows are independent.
  const bool through_warp = need_image && warp;
  const Units units(image, through_warp);
  std::vector<double> sums(need_stain ? 12 * units.count : 0);
  const auto run = [&](auto zero, auto&& rows, auto&& unpack) {
    using S = decltype(zero);
    const int64_t lanes = std::is_same_v<S, float> ? 4 : 3;
    at::parallel_for(0, units.count, 1, [&](int64_t begin, int64_t end) {
      std::unique_ptr<S[]> scratch(through_warp ? new S[lanes * plane]() : nullptr);
      for (int64_t u = begin; u < end; ++u) {
        const int64_t image_index = u / units.per_image, row = u % units.per_image * units.rows;
        rows(image_index, row, std::min(row + units.rows, h), scratch.get(), need_stain ? &sums[12 * u] : nullptr);
        if (through_warp) unpack(image_index, scratch.get());
      }
    });
  };
  if (vectorised(image, grad.scalar_type())) {
    const Parameters<float> p(image, stain, warp, mean, std, valid, io);
    const StainJob job = make_job(image, grad, p, grad_image);
    run(
        0.0f,
        [&](int64_t i, int64_t begin, int64_t end, float* scratch, double* sum) {
          kernels().backward(job, i, begin, end, scratch, sum);
        },
        [&](int64_t i, float* scratch) { kernels().unpack(job, i, scratch); });
  } else {
    const Parameters<double> p(image, stain, warp, mean, std, valid, io);
    HISTODD_DISPATCH_IMAGE(image.scalar_type(), [&] {
      using In = scalar_t;
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "stain_augment_backward", [&] {
        run(
            0.0,
            [&](int64_t i, int64_t begin, int64_t end, double* scratch, double* sum) {
              backward_rows<In, scalar_t>(image, grad, grad_image, p, i, begin, end, scratch, sum);
            },
            [&](int64_t i, double* scratch) {
              const auto to = planes<In>(grad_image, i);
              for (int64_t k = 0; k < 3 * plane; ++k) to.set(k / 3, static_cast<int>(k % 3), scratch[k]);
              std::fill_n(scratch, 3 * plane, 0.0);
            });
      });
    });
  }
  at::Tensor grad_stain;
  if (need_stain) {
    grad_stain = at::empty({n, 12}, stain->options().dtype(at::kDouble));
    double* to = grad_stain.mutable_data_ptr<double>();
    for (int64_t i = 0; i < 12 * n; ++i) {
      to[i] = 0;
      for (int64_t b = 0; b < units.per_image; ++b) to[i] += sums[12 * (i / 12 * units.per_image + b) + i % 12];
    }
    grad_stain = grad_stain.view({n, 3, 4}).to(stain->scalar_type());
  }
  return {need_image ? grad_image : at::empty({0}, image.options()),
          need_stain ? grad_stain : at::empty({0}, image.options())};
}

}  // namespace
}  // namespace histodd

TORCH_LIBRARY_IMPL(histodd, CPU, m) {
  m.impl("stain_augment", histodd::stain_augment);
  m.impl("stain_augment_backward", histodd::stain_augment_backward);
}
