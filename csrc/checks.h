// Every argument check of the operators, written once for CPU and CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/string_view.h>

#include "gradient_distance.h"

namespace histodd {

inline bool is_real_floating(at::ScalarType t) {
  return t == at::kDouble || t == at::kFloat || t == at::kHalf || t == at::kBFloat16;
}

inline Kind parse_kind(c10::string_view kind) {
  if (kind == "l1") return Kind::kL1;
  if (kind == "l2") return Kind::kL2;
  if (kind == "cosine") return Kind::kCosine;
  TORCH_CHECK_VALUE(false, "kind must be one of ('l1', 'l2', 'cosine'), got '", kind, "'");
}

// Pairs share shape, dtype and device; layers may differ in shape and dtype but lie on one device.
inline void check_gradient_lists(at::TensorList real, at::TensorList synthetic) {
  TORCH_CHECK_VALUE(real.size() == synthetic.size(), "lists must have equal lengths, got ", real.size(), " and ",
                    synthetic.size());
  for (size_t i = 0; i < real.size(); ++i) {
    const at::Tensor &r = real[i], &s = synthetic[i];
    TORCH_CHECK_VALUE(r.sizes() == s.sizes(), "layer ", i, ": pairs share their shape, got ", r.sizes(), " and ",
                      s.sizes());
    TORCH_CHECK_VALUE(r.scalar_type() == s.scalar_type(), "layer ", i, ": pairs share their dtype, got ",
                      r.scalar_type(), " and ", s.scalar_type());
    TORCH_CHECK_VALUE(is_real_floating(r.scalar_type()), "layer ", i,
                      ": gradients are float64, float32, float16 or bfloat16, got ", r.scalar_type());
    TORCH_CHECK_VALUE(r.layout() == at::kStrided && s.layout() == at::kStrided, "layer ", i,
                      ": gradients are dense, got ", r.layout(), " and ", s.layout());
    TORCH_CHECK_VALUE(r.device() == real[0].device() && s.device() == real[0].device(), "layer ", i,
                      ": all gradients lie on one device, got ", r.device(), " and ", s.device(), " after layer 0 on ",
                      real[0].device());
  }
}

}  // namespace histodd
