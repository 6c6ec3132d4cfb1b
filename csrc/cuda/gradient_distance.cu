// gradient_distance on CUDA: the table of layers travels as a kernel argument, one block per unit, one launch forward
// (the last block to finish adds the units up, in order) and one launch backward. No host synchronisation.
#include "../gradient_distance.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../checks.h"
#include "launch.cuh"
#include "multi_tensor.cuh"

namespace histodd {
namespace {

constexpr int64_t kRun = 16384;  // elements per unit of L1 and L2; a multiple of every pack

// Calls f(r, s) for every element of the unit that belongs to this thread, reading 16 bytes at a time where it can,
// four packs of each list before the first is used; flush() comes often enough that float32 partial sums stay short.
template <typename T, typename F, typename Flush>
__device__ void for_each(const T* r, const T* s, int64_t n, F f, Flush flush) {
  constexpr int kPack = Pack<T>::kSize;
  int64_t done = 0;
  if (aligned16(r) && aligned16(s)) {
    constexpr int kAhead = 4;
    const Pack<T>*rs = reinterpret_cast<const Pack<T>*>(r), *ss = reinterpret_cast<const Pack<T>*>(s);
    const int64_t packs = n / kPack;
    int64_t p = threadIdx.x;
    for (; p + (kAhead - 1) * kThreads < packs; p += kAhead * kThreads) {
      Pack<T> a[kAhead], b[kAhead];
#pragma unroll
      for (int m = 0; m < kAhead; ++m) {
        a[m] = rs[p + m * kThreads];
        b[m] = ss[p + m * kThreads];
      }
#pragma unroll
      for (int m = 0; m < kAhead; ++m) {
#pragma unroll
        for (int k = 0; k < kPack; ++k) f(a[m].item[k], b[m].item[k]);
      }
      flush();
    }
    for (; p < packs; p += kThreads) {
      const Pack<T> a = rs[p], b = ss[p];
#pragma unroll
      for (int k = 0; k < kPack; ++k) f(a.item[k], b.item[k]);
    }
    flush();
    done = packs * kPack;
  }
  int count = 0;
  for (int64_t i = done + threadIdx.x; i < n; i += kThreads) {
    f(r[i], s[i]);
    if (++count % 64 == 0) flush();
  }
  flush();
}

template <typename F, typename T>
__device__ double sum_run(const T* r, const T* s, int64_t n) {
  using Acc = at::opmath_type<T>;
  double sum = 0;
  Acc part = 0;
  for_each(
      r, s, n, [&](T a, T b) { part += F::value(static_cast<Acc>(a), static_cast<Acc>(b)); },
      [&] {
        sum += part;
        part = 0;
      });
  return block_sum(sum);
}

template <typename T>
__device__ CosineSums sum_filter(const T* r, const T* s, int64_t n) {
  using Acc = at::opmath_type<T>;
  CosineSums sums;
  Acc dot = 0, rr = 0, ss = 0;
  for_each(
      r, s, n,
      [&](T x, T y) {
        const Acc a = static_cast<Acc>(x), b = static_cast<Acc>(y);
        dot += a * b;
        rr += a * a;
        ss += b * b;
      },
      [&] {
        sums.dot += dot;
        sums.rr += rr;
        sums.ss += ss;
        dot = rr = ss = 0;
      });
  sums.dot = block_sum(sums.dot);
  sums.rr = block_sum(sums.rr);
  sums.ss = block_sum(sums.ss);
  return sums;
}

// map(r, s, a, b) -> the two gradients of one element.
template <typename T, typename F>
__device__ void write_gradients(const T* r, const T* s, T* grad_r, T* grad_s, int64_t n, F map) {
  using Acc = at::opmath_type<T>;
  constexpr int kPack = Pack<T>::kSize;
  int64_t done = 0;
  if (aligned16(r) && aligned16(s) && aligned16(grad_r) && aligned16(grad_s)) {  // null counts as aligned
    const int64_t packs = n / kPack;
    for (int64_t p = threadIdx.x; p < packs; p += kThreads) {
      const Pack<T> a = reinterpret_cast<const Pack<T>*>(r)[p], b = reinterpret_cast<const Pack<T>*>(s)[p];
      Pack<T> da, db;
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        Acc x, y;
        map(static_cast<Acc>(a.item[k]), static_cast<Acc>(b.item[k]), x, y);
        da.item[k] = static_cast<T>(x);
        db.item[k] = static_cast<T>(y);
      }
      if (grad_r) reinterpret_cast<Pack<T>*>(grad_r)[p] = da;
      if (grad_s) reinterpret_cast<Pack<T>*>(grad_s)[p] = db;
    }
    done = packs * kPack;
  }
  for (int64_t i = done + threadIdx.x; i < n; i += kThreads) {
    Acc x, y;
    map(static_cast<Acc>(r[i]), static_cast<Acc>(s[i]), x, y);
    if (grad_r) grad_r[i] = static_cast<T>(x);
    if (grad_s) grad_s[i] = static_cast<T>(y);
  }
}

template <Kind K, typename T>
__device__ double unit_value(const Layer& layer, int64_t begin, int64_t n) {
  const T* r = static_cast<const T*>(layer.real) + begin;
  const T* s = static_cast<const T*>(layer.synthetic) + begin;
  if constexpr (K == Kind::kL1) return sum_run<L1>(r, s, n);
  if constexpr (K == Kind::kL2) return sum_run<L2>(r, s, n);
  if constexpr (K == Kind::kCosine) return cosine(sum_filter(r, s, n));
}

template <Kind K, typename T>
__device__ void unit_vjp(const Layer& layer, int64_t begin, int64_t n, double grad) {
  using Acc = at::opmath_type<T>;
  const T* r = static_cast<const T*>(layer.real) + begin;
  const T* s = static_cast<const T*>(layer.synthetic) + begin;
  T* grad_r = layer.grad_real ? static_cast<T*>(layer.grad_real) + begin : nullptr;
  T* grad_s = layer.grad_synthetic ? static_cast<T*>(layer.grad_synthetic) + begin : nullptr;
  if constexpr (K == Kind::kCosine) {
    const CosineVjp v = cosine_vjp(sum_filter(r, s, n), grad);
    const Acc cross = v.cross, self_r = v.self_r, self_s = v.self_s;
    write_gradients(r, s, grad_r, grad_s, n, [=](Acc a, Acc b, Acc& x, Acc& y) {
      x = cross * b + self_r * a;
      y = cross * a + self_s * b;
    });
  } else {
    const Acc g = static_cast<Acc>(grad);
    write_gradients(r, s, grad_r, grad_s, n, [=](Acc a, Acc b, Acc& x, Acc& y) {
      if constexpr (K == Kind::kL1) x = L1::vjp(a, b, g);
      if constexpr (K == Kind::kL2) x = L2::vjp(a, b, g);
      y = -x;
    });
  }
}

template <Kind K, int Capacity>
__global__ void __launch_bounds__(kThreads, 2)
    forward_kernel(const __grid_constant__ Table<Capacity> table, double* partial, unsigned* finished, Values out) {
  __shared__ int shared_layer;
  __shared__ bool last;
  const int unit = static_cast<int>(blockIdx.x);
  if (threadIdx.x == 0) shared_layer = find_layer(table, unit);
  __syncthreads();
  const Layer& layer = table.layer[shared_layer];
  const int64_t begin = (unit - layer.first_unit) * layer.unit;
  const int64_t n = min(layer.unit, layer.numel - begin);
  double value = 0;
  switch (layer.type) {
    case Type::kDouble:
      value = unit_value<K, double>(layer, begin, n);
      break;
    case Type::kFloat:
      value = unit_value<K, float>(layer, begin, n);
      break;
    case Type::kHalf:
      value = unit_value<K, c10::Half>(layer, begin, n);
      break;
    case Type::kBFloat16:
      value = unit_value<K, c10::BFloat16>(layer, begin, n);
      break;
  }
  if (threadIdx.x == 0) {
    partial[unit] = value;
    __threadfence();  // the value is visible before the count is
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  // One warp per layer, lanes strided over its units: the order is fixed, whichever block comes last.
  double total = 0;
  for (int i = threadIdx.x / 32; i < table.layers; i += kWarps) {
    const int end = i + 1 < table.layers ? table.layer[i + 1].first_unit : static_cast<int>(gridDim.x);
    double sum = 0;
    for (int u = table.layer[i].first_unit + threadIdx.x % 32; u < end; u += 32) sum += __ldcg(partial + u);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
      if (out.per_layer) out.set(i, sum);
      total += sum;
    }
  }
  total = block_sum(total);
  if (threadIdx.x == 0 && !out.per_layer) out.set(0, total);
}

template <Kind K, int Capacity>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ Table<Capacity> table, Values grad) {
  __shared__ int shared_layer;
  const int unit = static_cast<int>(blockIdx.x);
  if (threadIdx.x == 0) shared_layer = find_layer(table, unit);
  __syncthreads();
  const Layer& layer = table.layer[shared_layer];
  const int64_t begin = (unit - layer.first_unit) * layer.unit;
  const int64_t n = min(layer.unit, layer.numel - begin);
  const double g = grad.get(shared_layer);
  switch (layer.type) {
    case Type::kDouble:
      return unit_vjp<K, double>(layer, begin, n, g);
    case Type::kFloat:
      return unit_vjp<K, float>(layer, begin, n, g);
    case Type::kHalf:
      return unit_vjp<K, c10::Half>(layer, begin, n, g);
    case Type::kBFloat16:
      return unit_vjp<K, c10::BFloat16>(layer, begin, n, g);
  }
}

std::vector<at::Tensor> contiguous(at::TensorList list) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& t : list) out.push_back(t.contiguous());
  return out;
}

// Layers [begin, end) of the lists; returns the number of units.
template <int Capacity>
int fill(Table<Capacity>& table, Kind kind, const std::vector<at::Tensor>& real,
         const std::vector<at::Tensor>& synthetic, const std::vector<at::Tensor>& grad_real,
         const std::vector<at::Tensor>& grad_synthetic, size_t begin, size_t end) {
  int64_t units = 0;
  table.layers = static_cast<int>(end - begin);
  for (size_t i = begin; i < end; ++i) {
    const at::Tensor& r = real[i];
    Layer& layer = table.layer[i - begin];
    layer.real = r.const_data_ptr();
    layer.synthetic = synthetic[i].const_data_ptr();
    layer.grad_real = grad_real.empty() ? nullptr : grad_real[i].mutable_data_ptr();
    layer.grad_synthetic = grad_synthetic.empty() ? nullptr : grad_synthetic[i].mutable_data_ptr();
    layer.numel = r.numel();
    layer.unit = r.numel() ? unit_size(kind, kRun, r.numel(), r.dim(), r.dim() ? r.size(0) : 1) : 1;
    layer.first_unit = static_cast<int>(units);
    layer.type = type_of(r);
    units += (layer.numel + layer.unit - 1) / layer.unit;
    TORCH_CHECK(units <= std::numeric_limits<int>::max(), "gradient_distance: too many elements for one launch");
  }
  return static_cast<int>(units);
}

template <int Capacity, typename F>
void with_kind(Kind kind, F f) {
  switch (kind) {
    case Kind::kL1:
      return f(std::integral_constant<Kind, Kind::kL1>{});
    case Kind::kL2:
      return f(std::integral_constant<Kind, Kind::kL2>{});
    default:
      return f(std::integral_constant<Kind, Kind::kCosine>{});
  }
}

template <int Capacity>
void launch_forward(Kind kind, const std::vector<at::Tensor>& real, const std::vector<at::Tensor>& synthetic,
                    size_t begin, size_t end, Values out) {
  Table<Capacity> table;
  const int units = fill(table, kind, real, synthetic, {}, {}, begin, end);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  if (units == 0) {  // nothing but empty layers
    const size_t count = out.per_layer ? end - begin : 1, size = out.is_double ? sizeof(double) : sizeof(float);
    C10_CUDA_CHECK(cudaMemsetAsync(out.data, 0, count * size, stream));
    return;
  }
  // The counter lies behind the partial sums.
  const at::Tensor scratch = at::empty({units + 1}, real[begin].options().dtype(at::kDouble));
  double* partial = scratch.mutable_data_ptr<double>();
  unsigned* finished = reinterpret_cast<unsigned*>(partial + units);
  C10_CUDA_CHECK(cudaMemsetAsync(finished, 0, sizeof(unsigned), stream));
  with_kind<Capacity>(kind, [&](auto k) {
    forward_kernel<decltype(k)::value, Capacity><<<units, kThreads, 0, stream>>>(table, partial, finished, out);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <int Capacity>
void launch_backward(Kind kind, const std::vector<at::Tensor>& real, const std::vector<at::Tensor>& synthetic,
                     const std::vector<at::Tensor>& grad_real, const std::vector<at::Tensor>& grad_synthetic,
                     size_t begin, size_t end, Values grad) {
  Table<Capacity> table;
  const int units = fill(table, kind, real, synthetic, grad_real, grad_synthetic, begin, end);
  if (units == 0) return;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  with_kind<Capacity>(kind, [&](auto k) {
    backward_kernel<decltype(k)::value, Capacity><<<units, kThreads, 0, stream>>>(table, grad);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::ScalarType result_type(at::TensorList list) {
  for (const at::Tensor& t : list) {
    if (t.scalar_type() == at::kDouble) return at::kDouble;
  }
  return at::kFloat;
}

Values values(const at::Tensor& t, bool per_layer, size_t offset) {
  char* data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  return {data + (per_layer ? offset * t.element_size() : 0), t.scalar_type() == at::kDouble, per_layer};
}

at::Tensor gradient_distance(at::TensorList real_list, at::TensorList synthetic_list, c10::string_view kind_name,
                             bool per_layer) {
  const Kind kind = parse_kind(kind_name);
  check_gradient_lists(real_list, synthetic_list);
  const c10::cuda::CUDAGuard guard(real_list[0].device());
  const auto real = contiguous(real_list), synthetic = contiguous(synthetic_list);
  const size_t layers = real.size();
  const bool several = layers > kLarge;
  const auto options = real[0].options().dtype(result_type(real_list));
  const bool separate = per_layer || several;
  at::Tensor out = at::empty({separate ? static_cast<int64_t>(layers) : 1}, options);
  for (size_t begin = 0; begin < layers; begin += kLarge) {
    const size_t end = std::min(layers, begin + kLarge);
    if (end - begin <= kSmall) {
      launch_forward<kSmall>(kind, real, synthetic, begin, end, values(out, separate, begin));
    } else {
      launch_forward<kLarge>(kind, real, synthetic, begin, end, values(out, separate, begin));
    }
  }
  if (per_layer) return out;
  return several ? out.sum() : out.squeeze(0);
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> gradient_distance_backward(
    const at::Tensor& grad, at::TensorList real_list, at::TensorList synthetic_list, c10::string_view kind_name,
    bool per_layer, bool need_real, bool need_synthetic) {
  const Kind kind = parse_kind(kind_name);
  check_gradient_lists(real_list, synthetic_list);
  const c10::cuda::CUDAGuard guard(real_list[0].device());
  const auto real = contiguous(real_list), synthetic = contiguous(synthetic_list);
  const size_t layers = real.size();
  TORCH_CHECK_VALUE(grad.device() == real[0].device(), "grad lies on ", grad.device(), ", the gradients on ",
                    real[0].device());
  TORCH_CHECK_VALUE(grad.numel() == (per_layer ? static_cast<int64_t>(layers) : 1),
                    "grad has the shape of the result, got ", grad.sizes());
  const at::Tensor upstream = grad.to(result_type(real_list)).contiguous();
  std::vector<at::Tensor> grad_real, grad_synthetic;
  for (const at::Tensor& r : real) {
    if (need_real) grad_real.push_back(at::empty_like(r, at::MemoryFormat::Contiguous));
    if (need_synthetic) grad_synthetic.push_back(at::empty_like(r, at::MemoryFormat::Contiguous));
  }
  for (size_t begin = 0; begin < layers; begin += kLarge) {
    const size_t end = std::min(layers, begin + kLarge);
    const Values g = values(upstream, per_layer, begin);
    if (end - begin <= kSmall) {
      launch_backward<kSmall>(kind, real, synthetic, grad_real, grad_synthetic, begin, end, g);
    } else {
      launch_backward<kLarge>(kind, real, synthetic, grad_real, grad_synthetic, begin, end, g);
    }
  }
  return {std::move(grad_real), std::move(grad_synthetic)};
}

}  // namespace
}  // namespace histodd

TORCH_LIBRARY_IMPL(histodd, CUDA, m) {
  m.impl("gradient_distance", histodd::gradient_distance);
  m.impl("gradient_distance_backward", histodd::gradient_distance_backward);
}
