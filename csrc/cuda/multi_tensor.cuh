// The table of layers that a multi-tensor kernel takes as an argument, and how a block finds its layer in it.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace histodd {

enum class Type : int { kDouble, kFloat, kHalf, kBFloat16 };

struct Layer {
  const void *real, *synthetic;
  void *grad_real, *grad_synthetic;  // null where no gradient is wanted
  int64_t numel, unit;
  int first_unit;
  Type type;
};

template <int Capacity>
struct Table {
  Layer layer[Capacity];
  int layers;
};

// Kernel arguments: 4 KiB everywhere, 32 KiB from CUDA 12.1 on (sm_70 and later). Longer lists take several launches.
constexpr int kSmall = 64;
#if CUDART_VERSION >= 12010
constexpr int kLarge = 512;
#else
constexpr int kLarge = kSmall;
#endif

// Upstream gradient or result: one value, or one per layer; float or double.
struct Values {
  void* data;
  bool is_double, per_layer;
  __device__ double get(int i) const {
    i = per_layer ? i : 0;
    return is_double ? static_cast<const double*>(data)[i] : static_cast<const float*>(data)[i];
  }
  __device__ void set(int i, double v) const {
    if (is_double) {
      static_cast<double*>(data)[i] = v;
    } else {
      static_cast<float*>(data)[i] = static_cast<float>(v);
    }
  }
};

template <int Capacity>
__device__ int find_layer(const Table<Capacity>& table, int unit) {
  int low = 0, high = table.layers - 1;
  while (low < high) {  // the last layer that starts at or before the unit; empty layers share a start with the next
    const int middle = (low + high + 1) / 2;
    if (table.layer[middle].first_unit <= unit) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

inline Type type_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return Type::kDouble;
    case at::kFloat:
      return Type::kFloat;
    case at::kHalf:
      return Type::kHalf;
    default:
      return Type::kBFloat16;
  }
}

}  // namespace histodd
