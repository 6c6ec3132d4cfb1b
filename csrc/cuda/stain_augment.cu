// stain_augment on CUDA. Without a warp a thread takes four pixels in a row, read and written at once; with one, a
// block takes a tile of the output, so that what it reads stays in cache. The gradient of [A|b] is summed per block and
// then over the blocks, in order. The gradient of a warped image is gathered: every pixel of the image adds up what the
// pixels of the output that sampled it have for it, so that nothing depends on the order of threads. No host
// synchronisation.
#include "stain_augment_kernels.cuh"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "../checks.h"

namespace histodd {
namespace {

using Optional = std::optional<at::Tensor>;

constexpr int64_t kLargePlane = 16384;  // pixels of an image from which a block does more of them

Element element_of(at::ScalarType type) {
  switch (type) {
    case at::kByte:
      return Element::kByte;
    case at::kDouble:
      return Element::kDouble;
    case at::kHalf:
      return Element::kHalf;
    case at::kBFloat16:
      return Element::kBFloat16;
    default:
      return Element::kFloat;
  }
}

Image image_of(const at::Tensor& t) {
  Image image;
  image.data = const_cast<void*>(t.const_data_ptr());
  image.type = element_of(t.scalar_type());
  image.last = is_channels_last(t);
  const uintptr_t alignment = std::min<uintptr_t>(16, 4 * t.element_size());
  image.packs = t.size(2) * t.size(3) % 4 == 0 && reinterpret_cast<uintptr_t>(image.data) % alignment == 0;
  return image;
}

unsigned grid_of(int64_t blocks) {
  TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "stain_augment: too many pixels for one launch");
  return static_cast<unsigned>(blocks);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The grid: tiles with a warp, runs of pixels without. It depends on the shape only, and with it the order of all sums.
Job make_job(const at::Tensor& image, const at::Tensor& out, bool stained, bool warped, int rounds) {
  Job job{};
  job.n = image.size(0);
  job.height = image.size(2);
  job.width = image.size(3);
  job.image = image_of(image);
  job.out = image_of(out);
  job.stained = stained;
  job.warped = warped;
  job.rounds = rounds;
  job.blocks = warped ? divide_up(job.height, kTileSide) * divide_up(job.width, kTileSide)
                      : divide_up(job.height * job.width, kThreads * kPixels * rounds);
  TORCH_CHECK_VALUE(job.blocks <= std::numeric_limits<int>::max() &&
                        (!warped || 3 * job.height * job.width <= std::numeric_limits<uint32_t>::max()),
                    "image is too large: ", image.sizes());
  return job;
}

dim3 grid_of(const Job& job) {
  const int64_t images = std::min(job.n, kImagesInGrid);
  return dim3(static_cast<unsigned>(job.blocks), static_cast<unsigned>(images),
              grid_of(divide_up(job.n, kImagesInGrid)));
}

// The per-image parameters, in a tensor of bytes.
template <typename S>
at::Tensor prepare(const Job& job, const at::Tensor& image, const Optional& stain, const Optional& warp,
                   const Optional& mean, const Optional& std, const Optional& valid, double io, cudaStream_t stream) {
  const at::Tensor prepared =
      at::empty({job.n * static_cast<int64_t>(sizeof(Prepared<S>))}, image.options().dtype(at::kByte));
  std::vector<at::Tensor> alive;
  const auto small = [&](const Optional& t) {
    if (!t) return Small{};
    alive.push_back(t->contiguous());
    return Small{alive.back().const_data_ptr(), element_of(t->scalar_type())};
  };
  const at::Tensor ok = valid ? valid->contiguous() : at::Tensor();
  prepare_kernel<S><<<grid_of(divide_up(job.n, 64)), 64, 0, stream>>>(
      small(stain), small(warp), small(mean), small(std), ok.defined() ? ok.const_data_ptr<bool>() : nullptr, io, job.n,
      job.height, job.width, job.image.type == Element::kByte && !job.warped,
      reinterpret_cast<Prepared<S>*>(prepared.mutable_data_ptr()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return prepared;
}

template <typename S>
const Prepared<S>* prepared_of(const at::Tensor& bytes) {
  return reinterpret_cast<const Prepared<S>*>(bytes.const_data_ptr());
}

at::Tensor stain_augment(const at::Tensor& image_in, const Optional& stain, const Optional& warp, const Optional& mean,
                         const Optional& std, const Optional& valid, double io, at::ScalarType dtype,
                         bool channels_last) {
  check_stain_augment(image_in, stain, warp, mean, std, valid, io, dtype);
  const c10::cuda::CUDAGuard guard(image_in.device());
  const at::Tensor image = either_format(image_in);
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const at::Tensor out = at::empty(image.sizes(), image.options().dtype(dtype).memory_format(format));
  if (image.numel() == 0) return out;
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const int rounds = image.size(2) * image.size(3) >= kLargePlane ? 2 : 1;
  const Job job = make_job(image, out, stain.has_value(), warp.has_value(), rounds);
  const auto run = [&](auto zero) {
    using S = decltype(zero);
    const at::Tensor prepared = prepare<S>(job, image, stain, warp, mean, std, valid, io, stream);
    const dim3 grid = grid_of(job);
    if (job.warped) {
      warped_forward_kernel<S><<<grid, kThreads, 0, stream>>>(job, prepared_of<S>(prepared));
    } else if (rounds == 2) {
      forward_kernel<S, 2><<<grid, kThreads, 0, stream>>>(job, prepared_of<S>(prepared));
    } else {
      forward_kernel<S, 1><<<grid, kThreads, 0, stream>>>(job, prepared_of<S>(prepared));
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (image.scalar_type() == at::kDouble || dtype == at::kDouble) {
    run(0.0);
  } else {
    run(0.0f);
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
  const c10::cuda::CUDAGuard guard(image_in.device());
  const at::Tensor image = either_format(image_in), grad = either_format(grad_in);
  const auto format = is_channels_last(image) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const at::Tensor nothing = at::empty({0}, image.options());
  const at::Tensor grad_image = need_image ? at::empty_like(image, format) : nothing;
  const at::Tensor grad_stain =
      need_stain ? at::empty_like(*stain, at::MemoryFormat::Contiguous) : at::empty_like(nothing);
  if (image.numel() == 0) return {grad_image, need_stain ? grad_stain.zero_() : grad_stain};
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  Job job =
      make_job(image, grad, stain.has_value(), warp.has_value(), image.size(2) * image.size(3) >= kLargePlane ? 4 : 1);
  if (need_image) job.grad_image = image_of(grad_image);
  at::Tensor partial;
  if (need_stain) {
    partial = at::empty({12 * job.n * job.blocks}, image.options().dtype(at::kDouble));
    job.partial = partial.mutable_data_ptr<double>();
  }
  const auto run = [&](auto zero) {
    using S = decltype(zero);
    const at::Tensor prepared = prepare<S>(job, image, stain, warp, mean, std, valid, io, stream);
    const dim3 grid = grid_of(job);
    const Prepared<S>* p = prepared_of<S>(prepared);
    if (!job.warped && need_stain) {
      backward_kernel<S, true><<<grid, kThreads, 0, stream>>>(job, p);
    } else if (!job.warped) {
      backward_kernel<S, false><<<grid, kThreads, 0, stream>>>(job, p);
    } else {
      if (need_stain) warped_sums_kernel<S><<<grid, kThreads, 0, stream>>>(job, p);
      if (need_image) warped_backward_kernel<S><<<grid, kThreads, 0, stream>>>(job, p);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (need_image || need_stain) {
    if (image.scalar_type() == at::kDouble || grad.scalar_type() == at::kDouble) {
      run(0.0);
    } else {
      run(0.0f);
    }
  }
  if (need_stain) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, stain->scalar_type(), "stain_augment_backward", [&] {
      sum_kernel<scalar_t>
          <<<grid_of(12 * job.n), 32, 0, stream>>>(job.partial, job.blocks, grad_stain.mutable_data_ptr<scalar_t>());
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {grad_image, grad_stain};
}

}  // namespace
}  // namespace histodd

TORCH_LIBRARY_IMPL(histodd, CUDA, m) {
  m.impl("stain_augment", histodd::stain_augment);
  m.impl("stain_augment_backward", histodd::stain_augment_backward);
}
