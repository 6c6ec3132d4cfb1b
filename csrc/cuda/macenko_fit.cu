// macenko_fit on CUDA, without host synchronisation, the bits independent of scheduling.
// An image that fits into shared memory is fitted by one block, which reads it from device memory once. A larger one is
// read three times: moments (and a sample of pixels), angles, concentrations. Either way, each of the latter two passes
// keeps the few keys beyond a threshold guessed from a sample of the pixels, and one block selects among them. Only
// when a guess was too tight or too loose, which four standard deviations of the sample's noise make rare, that block
// selects among all pixels instead: of a large image with two more reads, or five (eight for float64) where very many
// keys are nearly equal, and twice that for interpolated percentiles.
#include "../macenko_fit.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "../checks.h"
#include "launch.cuh"
#include "macenko_fit_block.cuh"

namespace histodd {
namespace {

constexpr int64_t kTile = 16384;   // pixels per block of a large image
constexpr int64_t kSample = 4096;  // sampled pixels of an image, about, at most
constexpr int64_t kDirect = 8192;  // pixels up to which an image in shared memory is selected from without a guess
constexpr int64_t kKept = 2048;    // keys kept of each stream otherwise

// Every how many pixels one is sampled: odd, so that not always the same column is.
inline int64_t sample_step(int64_t pixels) { return std::max<int64_t>(pixels / kSample, 16) | 1; }

// ---- One block per image --------------------------------------------------------------------------------------------

// With `step` (0: without) a guess from every step-th pixel; the kept keys lie behind the image.
template <typename T, typename Source, typename Keys>
__device__ Tails resident_tails(const Source& source, const Keys& keys, int64_t pixels, int64_t count,
                                const TailRanks& ranks, bool linear, T largest_density, int64_t step, T* lists,
                                FitShared& s) {
  if (step == 0) return select_keys(source, keys, pixels, ranks, linear, largest_density, s.select);
  __shared__ T from[2];
  __shared__ unsigned long long kept[2];
  T* const list[2] = {lists, lists + kKept};
  guess_thresholds(Strided<Source>{source, step}, (pixels + step - 1) / step, keys, ranks, count, largest_density,
                   s.select, from, kept);
  __syncthreads();
  keep_tails(source, keys, 0, pixels, from, kept, list, kKept);
  __syncthreads();
  return select_kept(source, keys, pixels, ranks, linear, largest_density, s.select, kept, list, kKept);
}

template <typename In, typename T>
__global__ void __launch_bounds__(kFitThreads<T>, 1)
    resident_kernel(const __grid_constant__ Batch<In, T> batch, int64_t step, int64_t image_bytes) {
  extern __shared__ __align__(16) unsigned char resident[];
  __shared__ FitShared s;
  __shared__ T table[256];
  const int64_t index = blockIdx.x, pixels = batch.pixels, values = 3 * pixels;
  const FitOptions& o = batch.options;
  const In* image = batch.images + index * values;
  In* copy = reinterpret_cast<In*>(resident);
  T* lists = reinterpret_cast<T*>(resident + image_bytes);
  int64_t done = 0;
  if (aligned16(image)) {
    constexpr int kPack = Pack<In>::kSize;
#pragma unroll 4
    for (int64_t p = threadIdx.x; p < values / kPack; p += kFitThreads<T>) {
      reinterpret_cast<Pack<In>*>(copy)[p] = reinterpret_cast<const Pack<In>*>(image)[p];
    }
    done = values / kPack * kPack;
  }
  for (int64_t i = done + threadIdx.x; i < values; i += kFitThreads<T>) copy[i] = image[i];
  batch.fill_table(table);
  __syncthreads();

  const Pixels<In, T> source = batch.source(copy, table);
  const T beta = static_cast<T>(o.beta);
  const BlockMoments m = block_moments(source, 0, pixels, beta, s, [](int64_t, T, T, T) {});
  if (threadIdx.x == 0) decide_plane(m.moments, m.bad, pixels, o, s.plane, s.tissue, s.outcome);
  __syncthreads();
  if (s.outcome >= 0) {
    if (threadIdx.x == 0) batch.out.write(index, failed_fit(static_cast<FitStatus>(s.outcome)));
    return;
  }
  const int64_t tissue = static_cast<int64_t>(s.tissue);
  const Tails angles = resident_tails(source, AngleKeys<T>(s.plane, beta), pixels, tissue, angle_ranks(tissue, o),
                                      o.linear, batch.largest_density, step, lists, s);
  if (threadIdx.x == 0) s.stains = stain_vectors(s.plane, angles, tissue, o);
  __syncthreads();
  if (s.stains.degenerate) {
    if (threadIdx.x == 0) batch.out.write(index, failed_fit(kFitDegenerate));
    return;
  }
  const Tails tops = resident_tails(source, ConcentrationKeys<T>(s.stains), pixels, pixels,
                                    concentration_ranks(pixels, o), o.linear, batch.largest_density, step, lists, s);
  if (threadIdx.x == 0) batch.out.write(index, finished_fit(s.stains, tops, pixels, o));
}

// ---- Large images: tiles --------------------------------------------------------------------------------------------

template <typename T>
struct ImageState {
  Plane plane;
  Stains stains;
  double tissue;
  int outcome;
  T from[2];                   // thresholds
  unsigned long long kept[2];  // keys that reach them
};

struct TileMoments {
  Moments moments;
  int bad;
};

// Scratch of a batch of large images, in device memory.
template <typename T>
struct Scratch {
  ImageState<T>* state;  // [N]
  TileMoments* partial;  // [N, tiles]
  T* sample;             // [N, 3, samples]
  T* list;               // [N, 2, capacity]
  int64_t tiles, samples, sample_step, capacity;

  __device__ T* kept(int64_t image, int stream) const { return list + (2 * image + stream) * capacity; }
  __device__ Sample<T> sampled(int64_t image) const { return {sample + 3 * image * samples, samples}; }
};

// First read: moments, the sample.
template <typename In, typename T>
__global__ void __launch_bounds__(kFitThreads<T>, 1)
    moments_kernel(const __grid_constant__ Batch<In, T> batch, const __grid_constant__ Scratch<T> scratch) {
  __shared__ FitShared s;
  __shared__ T table[256];
  batch.fill_table(table);
  __syncthreads();
  const int64_t image = blockIdx.x / scratch.tiles, tile = blockIdx.x % scratch.tiles;
  const int64_t begin = tile * kTile, end = min(begin + kTile, batch.pixels);
  T* sample = scratch.sample + 3 * image * scratch.samples;
  const BlockMoments m = block_moments(batch.source(batch.images + image * 3 * batch.pixels, table), begin, end,
                                       static_cast<T>(batch.options.beta), s, [&](int64_t i, T r, T g, T b) {
                                         const unsigned j =
                                             static_cast<unsigned>(i) / static_cast<unsigned>(scratch.sample_step);
                                         if (j * static_cast<unsigned>(scratch.sample_step) != static_cast<unsigned>(i))
                                           return;
                                         sample[j] = r;
                                         sample[j + scratch.samples] = g;
                                         sample[j + 2 * scratch.samples] = b;
                                       });
  if (threadIdx.x == 0) scratch.partial[blockIdx.x] = {m.moments, m.bad};
}

// Between the first two reads, one block per image: the plane, thresholds of the angles.
template <typename In, typename T>
__global__ void __launch_bounds__(kFitThreads<T>, 1)
    plane_kernel(const __grid_constant__ Batch<In, T> batch, const __grid_constant__ Scratch<T> scratch) {
  __shared__ FitShared s;
  const int64_t image = blockIdx.x;
  ImageState<T>& state = scratch.state[image];
  if (threadIdx.x == 0) {
    Moments moments;
    bool bad = false;
    for (int64_t tile = 0; tile < scratch.tiles; ++tile) {
      const TileMoments& part = scratch.partial[image * scratch.tiles + tile];
      moments.add(part.moments);
      bad = bad || part.bad;
    }
    decide_plane(moments, bad, batch.pixels, batch.options, s.plane, s.tissue, s.outcome);
    state.plane = s.plane;
    state.tissue = s.tissue;
    state.outcome = s.outcome;
  }
  __syncthreads();
  if (s.outcome >= 0) {
    if (threadIdx.x == 0) batch.out.write(image, failed_fit(static_cast<FitStatus>(s.outcome)));
    return;
  }
  const int64_t tissue = static_cast<int64_t>(s.tissue);
  guess_thresholds(scratch.sampled(image), scratch.samples, AngleKeys<T>(s.plane, static_cast<T>(batch.options.beta)),
                   angle_ranks(tissue, batch.options), tissue, batch.largest_density, s.select, state.from, state.kept);
}

template <typename T>
__device__ AngleKeys<T> keys_for(std::false_type, const ImageState<T>& state, T beta) {
  return AngleKeys<T>(state.plane, beta);
}
template <typename T>
__device__ ConcentrationKeys<T> keys_for(std::true_type, const ImageState<T>& state, T) {
  return ConcentrationKeys<T>(state.stains);
}

// Second and third read: writes the keys that reach their thresholds, in any order.
template <typename In, typename T, bool kConcentrations>
__global__ void __launch_bounds__(kFitThreads<T>, 1)
    tail_kernel(const __grid_constant__ Batch<In, T> batch, const __grid_constant__ Scratch<T> scratch) {
  __shared__ T table[256];
  const int64_t image = blockIdx.x / scratch.tiles, tile = blockIdx.x % scratch.tiles;
  ImageState<T>& state = scratch.state[image];
  if (state.outcome >= 0) return;
  batch.fill_table(table);
  __syncthreads();
  const auto keys = keys_for(std::bool_constant<kConcentrations>{}, state, static_cast<T>(batch.options.beta));
  const Pixels<In, T> source = batch.source(batch.images + image * 3 * batch.pixels, table);
  const int64_t begin = tile * kTile, end = min(begin + kTile, batch.pixels);
  T* const list[2] = {scratch.kept(image, 0), scratch.kept(image, 1)};
  keep_tails(source, keys, begin, end, state.from, state.kept, list, scratch.capacity);
}

// After the second and third read, one block per image: selects among the kept keys; then the stains and the thresholds
// of the concentrations, or the result.
template <typename In, typename T, bool kConcentrations>
__global__ void __launch_bounds__(kFitThreads<T>, 1)
    select_kernel(const __grid_constant__ Batch<In, T> batch, const __grid_constant__ Scratch<T> scratch) {
  __shared__ FitShared s;
  __shared__ T table[256];
  const int64_t image = blockIdx.x, pixels = batch.pixels;
  const FitOptions& o = batch.options;
  ImageState<T>& state = scratch.state[image];
  if (state.outcome >= 0) return;
  batch.fill_table(table);
  __syncthreads();
  const int64_t tissue = static_cast<int64_t>(state.tissue);
  const auto keys = keys_for(std::bool_constant<kConcentrations>{}, state, static_cast<T>(o.beta));
  const TailRanks ranks = kConcentrations ? concentration_ranks(pixels, o) : angle_ranks(tissue, o);
  T* const list[2] = {scratch.kept(image, 0), scratch.kept(image, 1)};
  const Tails tails = select_kept(batch.source(batch.images + image * 3 * pixels, table), keys, pixels, ranks, o.linear,
                                  batch.largest_density, s.select, state.kept, list, scratch.capacity);
  if constexpr (kConcentrations) {
    if (threadIdx.x == 0) batch.out.write(image, finished_fit(state.stains, tails, pixels, o));
  } else {
    if (threadIdx.x == 0) {
      s.stains = stain_vectors(state.plane, tails, tissue, o);
      state.stains = s.stains;
      if (s.stains.degenerate) {
        state.outcome = kFitDegenerate;
        batch.out.write(image, failed_fit(kFitDegenerate));
      }
    }
    __syncthreads();
    if (s.stains.degenerate) return;
    guess_thresholds(scratch.sampled(image), scratch.samples, ConcentrationKeys<T>(s.stains),
                     concentration_ranks(pixels, o), pixels, batch.largest_density, s.select, state.from, state.kept);
  }
}

// ---- Launches -------------------------------------------------------------------------------------------------------

template <typename T>
T* carve(char*& memory, int64_t count) {
  T* out = reinterpret_cast<T*>(memory);
  memory += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
  return out;
}

template <typename In, typename T>
void launch_tiled(const Batch<In, T>& batch, int64_t images, const at::TensorOptions& options, cudaStream_t stream) {
  Scratch<T> scratch;
  scratch.tiles = (batch.pixels + kTile - 1) / kTile;
  scratch.sample_step = sample_step(batch.pixels);
  scratch.samples = (batch.pixels + scratch.sample_step - 1) / scratch.sample_step;
  scratch.capacity = std::max<int64_t>(batch.pixels / 16, 4096);
  const int64_t blocks = images * scratch.tiles;
  TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "macenko_fit: too many pixels for one launch");
  const int64_t bytes = images * (static_cast<int64_t>(sizeof(ImageState<T>)) +
                                  scratch.tiles * static_cast<int64_t>(sizeof(TileMoments)) +
                                  (3 * scratch.samples + 2 * scratch.capacity) * static_cast<int64_t>(sizeof(T)));
  const at::Tensor memory = at::empty({bytes + 64}, options.dtype(at::kByte));
  char* next = reinterpret_cast<char*>(memory.mutable_data_ptr<uint8_t>());
  scratch.state = carve<ImageState<T>>(next, images);
  scratch.partial = carve<TileMoments>(next, blocks);
  scratch.sample = carve<T>(next, 3 * images * scratch.samples);
  scratch.list = carve<T>(next, 2 * images * scratch.capacity);
  const int grid = static_cast<int>(blocks), per_image = static_cast<int>(images);
  moments_kernel<In, T><<<grid, kFitThreads<T>, 0, stream>>>(batch, scratch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  plane_kernel<In, T><<<per_image, kFitThreads<T>, 0, stream>>>(batch, scratch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  tail_kernel<In, T, false><<<grid, kFitThreads<T>, 0, stream>>>(batch, scratch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  select_kernel<In, T, false><<<per_image, kFitThreads<T>, 0, stream>>>(batch, scratch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  tail_kernel<In, T, true><<<grid, kFitThreads<T>, 0, stream>>>(batch, scratch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  select_kernel<In, T, true><<<per_image, kFitThreads<T>, 0, stream>>>(batch, scratch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename In, typename T>
void fit_batch(const at::Tensor& original, const FitOptions& o, const FitOutputs& out) {
  const bool last = !original.is_contiguous() && original.is_contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor image = last ? original : original.contiguous();
  const int64_t images = image.size(0), pixels = image.size(2) * image.size(3);
  TORCH_CHECK(images <= std::numeric_limits<int>::max() && pixels <= std::numeric_limits<int>::max(),
              "macenko_fit: too many images or pixels for one launch");
  const Batch<In, T> batch{image.const_data_ptr<In>(),
                           pixels,
                           last ? 1 : pixels,
                           last ? 3 : 1,
                           o,
                           make_density<T>(o),
                           static_cast<T>(std::max(std::fabs(grey_density(0, o)), std::fabs(grey_density(256, o)))),
                           {out.stain_matrix.mutable_data_ptr<T>(), out.max_concentration.mutable_data_ptr<T>(),
                            out.status.mutable_data_ptr<uint8_t>()}};
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto kernel = resident_kernel<In, T>;
  int limit = 0;
  cudaFuncAttributes attributes;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, image.get_device()));
  C10_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  const int64_t image_bytes = (3 * pixels * static_cast<int64_t>(sizeof(In)) + 15) / 16 * 16;
  const int64_t step = pixels > kDirect ? sample_step(pixels) : 0;
  const int64_t bytes = image_bytes + (step ? 2 * kKept * static_cast<int64_t>(sizeof(T)) : 0);
  if (bytes + static_cast<int64_t>(attributes.sharedSizeBytes) > limit) {
    return launch_tiled(batch, images, image.options(), stream);
  }
  // The most, whatever this call needs: another thread's launch may be between this line and the next.
  const int most = limit - static_cast<int>(attributes.sharedSizeBytes);
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  kernel<<<static_cast<int>(images), kFitThreads<T>, static_cast<size_t>(bytes), stream>>>(batch, step, image_bytes);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> macenko_fit(const at::Tensor& image, double io, double beta,
                                                           double alpha, double min_tissue, double min_concentration,
                                                           c10::string_view interpolation, bool plus_one,
                                                           c10::string_view sign) {
  const FitOptions o =
      fit_options(image, io, beta, alpha, min_tissue, min_concentration, interpolation, plus_one, sign);
  const c10::cuda::CUDAGuard guard(image.device());
  const FitOutputs out = fit_outputs(image);
  if (image.numel() > 0) {
    if (image.scalar_type() == at::kDouble) {
      fit_batch<double, double>(image, o, out);
    } else if (image.scalar_type() == at::kByte) {
      fit_batch<uint8_t, float>(image, o, out);
    } else if (image.scalar_type() == at::kFloat) {
      fit_batch<float, float>(image, o, out);
    } else {
      AT_DISPATCH_REDUCED_FLOATING_TYPES(image.scalar_type(), "macenko_fit",
                                         [&] { fit_batch<scalar_t, float>(image, o, out); });
    }
  }
  return {out.stain_matrix, out.max_concentration, out.status};
}

template <typename T>
__global__ void affine_kernel(const T* stain_matrix, const T* top, const double* target, const double* target_top,
                              int64_t n, T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) affine_onto(stain_matrix + 6 * i, top + 2 * i, target, target_top, out + 12 * i);
}

at::Tensor macenko_affine(const at::Tensor& stain_matrix_in, const at::Tensor& top_in, const at::Tensor& target_in,
                          const at::Tensor& target_top_in) {
  check_macenko_affine(stain_matrix_in, top_in, target_in, target_top_in);
  const c10::cuda::CUDAGuard guard(stain_matrix_in.device());
  const at::Tensor stain_matrix = stain_matrix_in.contiguous(), top = top_in.contiguous();
  const at::Tensor target = target_in.contiguous(), target_top = target_top_in.contiguous();
  const int64_t n = stain_matrix.size(0), blocks = (n + 63) / 64;
  const at::Tensor out = at::empty({n, 3, 4}, stain_matrix.options());
  if (n == 0) return out;
  TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "macenko_affine: too many images for one launch");
  AT_DISPATCH_FLOATING_TYPES(stain_matrix.scalar_type(), "macenko_affine", [&] {
    affine_kernel<<<static_cast<int>(blocks), 64, 0, c10::cuda::getCurrentCUDAStream()>>>(
        stain_matrix.const_data_ptr<scalar_t>(), top.const_data_ptr<scalar_t>(), target.const_data_ptr<double>(),
        target_top.const_data_ptr<double>(), n, out.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace
}  // namespace histodd

TORCH_LIBRARY_IMPL(histodd, CUDA, m) {
  m.impl("macenko_fit", histodd::macenko_fit);
  m.impl("macenko_affine", histodd::macenko_affine);
}
