// macenko_fit on CUDA, without host synchronisation, the bits independent of scheduling.
// An image that fits into shared memory is fitted by one block, which reads it from device memory once. A larger one is
// read three times: moments (and a sample of pixels), angles, concentrations; each of the latter two passes writes the
// few keys beyond a threshold guessed from the sample, among which one block selects. Only when a guess was too tight
// or too loose, which four standard deviations of the sample's noise make rare, that block selects among all pixels
// instead, with four more reads of that image (seven for float64, twice that for interpolated percentiles).
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

constexpr int64_t kTile = 16384;        // pixels per block of a large image
constexpr int64_t kLargeSample = 4096;  // sampled pixels of a large image, at most

// ---- One block per image --------------------------------------------------------------------------------------------

template <typename In, typename T>
__global__ void __launch_bounds__(kFitThreads, 1) resident_kernel(const __grid_constant__ Batch<In, T> batch) {
  extern __shared__ __align__(16) unsigned char resident[];
  __shared__ FitShared s;
  __shared__ T table[256];
  const int64_t index = blockIdx.x, pixels = batch.pixels, values = 3 * pixels;
  const FitOptions& o = batch.options;
  const In* image = batch.images + index * values;
  In* copy = reinterpret_cast<In*>(resident);
  int64_t done = 0;
  if (aligned16(image)) {
    constexpr int kPack = Pack<In>::kSize;
    for (int64_t p = threadIdx.x; p < values / kPack; p += kFitThreads) {
      reinterpret_cast<Pack<In>*>(copy)[p] = reinterpret_cast<const Pack<In>*>(image)[p];
    }
    done = values / kPack * kPack;
  }
  for (int64_t i = done + threadIdx.x; i < values; i += kFitThreads) copy[i] = image[i];
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
  const Tails angles = select_keys(source, AngleKeys<T>(s.plane, beta), pixels, angle_ranks(tissue, o), o.linear,
                                   batch.largest_density, s.select);
  if (threadIdx.x == 0) s.stains = stain_vectors(s.plane, angles, tissue, o);
  __syncthreads();
  if (s.stains.degenerate) {
    if (threadIdx.x == 0) batch.out.write(index, failed_fit(kFitDegenerate));
    return;
  }
  const Tails tops = select_keys(source, ConcentrationKeys<T>(s.stains), pixels, concentration_ranks(pixels, o),
                                 o.linear, batch.largest_density, s.select);
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
__global__ void __launch_bounds__(kFitThreads, 1)
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

// Thresholds for the next pass, from the sample. Whole block.
template <typename T, typename Keys>
__device__ void guess_thresholds(const Scratch<T>& scratch, int64_t image, const Keys& keys, const TailRanks& ranks,
                                 int64_t count, T largest_density, SelectShared& s) {
  const Sample<T> sample = scratch.sampled(image);
  __shared__ int counted;
  if (threadIdx.x == 0) counted = 0;
  __syncthreads();
  int mine = 0;
  for (int64_t i = threadIdx.x; i < scratch.samples; i += kFitThreads) {
    T r, g, b, first, second;
    sample.get(i, r, g, b);
    keys(r, g, b, first, second);
    mine += second == second;
  }
  atomicAdd(&counted, mine);
  __syncthreads();
  const int64_t n = counted;
  TailRanks wanted;
  bool guess[2];
  for (int k = 0; k < 2; ++k) {
    const int64_t rank = sample_rank(ranks.from_top[k], count, n);
    guess[k] = rank >= 0;
    wanted.from_top[k] = guess[k] ? rank : 0;
  }
  Tails tails{};
  if (guess[0] || guess[1]) {
    tails = select_keys(sample, keys, scratch.samples, wanted, false, largest_density, s);
  }
  if (threadIdx.x < 2) {
    ImageState<T>& state = scratch.state[image];
    const int k = threadIdx.x;
    state.from[k] = guess[k] ? static_cast<T>(tails.value[k]) : -std::numeric_limits<T>::infinity();
    state.kept[k] = 0;
  }
}

// Between the first two reads, one block per image: the plane, thresholds of the angles.
template <typename In, typename T>
__global__ void __launch_bounds__(kFitThreads, 1)
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
  guess_thresholds(scratch, image, AngleKeys<T>(s.plane, static_cast<T>(batch.options.beta)),
                   angle_ranks(tissue, batch.options), tissue, batch.largest_density, s.select);
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
__global__ void __launch_bounds__(kFitThreads, 1)
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
  const T from[2] = {state.from[0], state.from[1]};
  for (int64_t i = begin + threadIdx.x; i < end; i += kFitThreads) {
    T r, g, b, key[2];
    source.get(i, r, g, b);
    keys(r, g, b, key[0], key[1]);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (!(key[k] >= from[k])) continue;
      const int64_t place = static_cast<int64_t>(atomicAdd(&state.kept[k], 1ull));
      if (place < scratch.capacity) scratch.kept(image, k)[place] = key[k];
    }
  }
}

// After the second and third read, one block per image: selects among the kept keys; then the stains and the thresholds
// of the concentrations, or the result.
template <typename In, typename T, bool kConcentrations>
__global__ void __launch_bounds__(kFitThreads, 1)
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
  bool complete = true;
  int64_t kept[2];
  for (int k = 0; k < 2; ++k) {
    kept[k] = static_cast<int64_t>(state.kept[k]);
    complete = complete && kept[k] > ranks.from_top[k] && kept[k] <= scratch.capacity;
  }
  Tails tails;
  if (complete) {
    tails = select_tails(KeptKeys<T>{scratch.kept(image, 0), scratch.kept(image, 1), kept[0], kept[1]},
                         max(kept[0], kept[1]), key_bound(keys, 0, batch.largest_density),
                         key_bound(keys, 1, batch.largest_density), ranks, o.linear, s.select);
  } else {
    tails = select_keys(batch.source(batch.images + image * 3 * pixels, table), keys, pixels, ranks, o.linear,
                        batch.largest_density, s.select);
  }
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
    guess_thresholds(scratch, image, ConcentrationKeys<T>(s.stains), concentration_ranks(pixels, o), pixels,
                     batch.largest_density, s.select);
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
  scratch.sample_step = std::max<int64_t>(batch.pixels / kLargeSample, 16) | 1;
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
  moments_kernel<In, T><<<grid, kFitThreads, 0, stream>>>(batch, scratch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  plane_kernel<In, T><<<per_image, kFitThreads, 0, stream>>>(batch, scratch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  tail_kernel<In, T, false><<<grid, kFitThreads, 0, stream>>>(batch, scratch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  select_kernel<In, T, false><<<per_image, kFitThreads, 0, stream>>>(batch, scratch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  tail_kernel<In, T, true><<<grid, kFitThreads, 0, stream>>>(batch, scratch);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  select_kernel<In, T, true><<<per_image, kFitThreads, 0, stream>>>(batch, scratch);
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
  const int64_t bytes = 3 * pixels * static_cast<int64_t>(sizeof(In));
  if (bytes + static_cast<int64_t>(attributes.sharedSizeBytes) > limit) {
    return launch_tiled(batch, images, image.options(), stream);
  }
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  kernel<<<static_cast<int>(images), kFitThreads, static_cast<size_t>(bytes), stream>>>(batch);
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

}  // namespace
}  // namespace histodd

TORCH_LIBRARY_IMPL(histodd, CUDA, m) { m.impl("macenko_fit", histodd::macenko_fit); }
