// Every argument check of the operators, written once for CPU and CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <c10/util/string_view.h>

#include <optional>

#include "gradient_distance.h"
#include "macenko_fit.h"

namespace histodd {

inline bool is_real_floating(at::ScalarType t) {
  return t == at::kDouble || t == at::kFloat || t == at::kHalf || t == at::kBFloat16;
}

// So that densities are finite in float.
inline void check_io(double io) {
  TORCH_CHECK_VALUE(io > 1e-6 && io < 1e9, "io must be positive and of the order of grey levels, got ", io);
}

inline void check_image(const at::Tensor& image) {
  TORCH_CHECK_VALUE(image.dim() == 4 && image.size(1) == 3, "image must be [N,3,H,W], got ", image.sizes());
  TORCH_CHECK_VALUE(image.scalar_type() == at::kByte || is_real_floating(image.scalar_type()),
                    "image must be uint8, float64, float32, float16 or bfloat16, got ", image.scalar_type());
}

// ---- macenko_fit ----

inline FitOptions fit_options(const at::Tensor& image, double io, double beta, double alpha, double min_tissue,
                              double min_concentration, c10::string_view interpolation, bool plus_one,
                              c10::string_view sign) {
  check_image(image);
  check_io(io);
  TORCH_CHECK_VALUE(std::isfinite(beta), "beta must be finite, got ", beta);
  TORCH_CHECK_VALUE(alpha >= 0 && alpha <= 50, "alpha must be a percentage from 0 to 50, got ", alpha);
  TORCH_CHECK_VALUE(min_tissue >= 0 && min_tissue <= 1, "min_tissue must be a fraction from 0 to 1, got ", min_tissue);
  TORCH_CHECK_VALUE(std::isfinite(min_concentration), "min_concentration must be finite, got ", min_concentration);
  TORCH_CHECK_VALUE(interpolation == "nearest" || interpolation == "linear",
                    "interpolation must be one of ('nearest', 'linear'), got '", interpolation, "'");
  TORCH_CHECK_VALUE(sign == "mean" || sign == "first", "sign must be one of ('mean', 'first'), got '", sign, "'");
  return {io, beta, alpha, min_tissue, min_concentration, plus_one, interpolation == "linear", sign == "first"};
}

struct FitOutputs {
  at::Tensor stain_matrix, max_concentration, status;
};

// Of images without pixels: too little tissue.
inline FitOutputs fit_outputs(const at::Tensor& image) {
  const int64_t n = image.size(0);
  const auto options = image.options().dtype(image.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  if (image.numel() > 0) {
    return {at::empty({n, 3, 2}, options), at::empty({n, 2}, options), at::empty({n}, options.dtype(at::kByte))};
  }
  return {at::zeros({n, 3, 2}, options), at::zeros({n, 2}, options),
          at::full({n}, static_cast<int64_t>(kFitLittleTissue), options.dtype(at::kByte))};
}

inline void check_macenko_affine(const at::Tensor& stain_matrix, const at::Tensor& top, const at::Tensor& target,
                                 const at::Tensor& target_top) {
  const int64_t n = stain_matrix.dim() > 0 ? stain_matrix.size(0) : -1;
  const at::ScalarType type = stain_matrix.scalar_type();
  TORCH_CHECK_VALUE(type == at::kFloat || type == at::kDouble, "stain_matrix must be float32 or float64, got ", type);
  const auto check = [&](const char* name, const at::Tensor& t, at::IntArrayRef shape, at::ScalarType expected) {
    TORCH_CHECK_VALUE(t.sizes() == shape, name, " must be ", shape, ", got ", t.sizes());
    TORCH_CHECK_VALUE(t.device() == stain_matrix.device(), name, " lies on ", t.device(), ", stain_matrix on ",
                      stain_matrix.device());
    TORCH_CHECK_VALUE(t.scalar_type() == expected, name, " must be ", expected, ", got ", t.scalar_type());
  };
  check("stain_matrix", stain_matrix, {n, 3, 2}, type);
  check("max_concentration", top, {n, 2}, type);
  check("target", target, {3, 2}, at::kDouble);
  check("target_top", target_top, {2}, at::kDouble);
}

// ---- gradient_distance ----

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
    TORCH_CHECK_VALUE(r.sizes() == s.sizes(), "layer ", i, ": synthetic must be ", r.sizes(), ", got ", s.sizes());
    TORCH_CHECK_VALUE(r.scalar_type() == s.scalar_type(), "layer ", i, ": pairs share their dtype, got ",
                      r.scalar_type(), " and ", s.scalar_type());
    TORCH_CHECK_VALUE(is_real_floating(r.scalar_type()), "layer ", i,
                      ": gradients are float64, float32, float16 or bfloat16, got ", r.scalar_type());
    TORCH_CHECK_VALUE(r.device() == real[0].device() && s.device() == real[0].device(), "layer ", i,
                      ": all gradients lie on one device, got ", r.device(), " and ", s.device(), " after layer 0 on ",
                      real[0].device());
  }
}

// ---- stain_augment ----

// The two layouts in which images are read; a tensor of any other is copied first.
inline bool is_channels_last(const at::Tensor& t) {
  return !t.is_contiguous() && t.is_contiguous(at::MemoryFormat::ChannelsLast);
}

inline at::Tensor either_format(const at::Tensor& t) { return is_channels_last(t) ? t : t.contiguous(); }

// Shapes, dtypes and devices of everything that goes into it. `out` is the dtype of the result.
inline void check_stain_augment(const at::Tensor& image, const std::optional<at::Tensor>& stain,
                                const std::optional<at::Tensor>& warp, const std::optional<at::Tensor>& mean,
                                const std::optional<at::Tensor>& std, const std::optional<at::Tensor>& valid, double io,
                                at::ScalarType out) {
  check_image(image);
  TORCH_CHECK_VALUE(is_real_floating(out), "dtype must be float64, float32, float16 or bfloat16, got ", out);
  TORCH_CHECK_VALUE(image.size(2) < (1 << 23) && image.size(3) < (1 << 23), "image is too large: ", image.sizes());
  check_io(io);
  TORCH_CHECK_VALUE(mean.has_value() == std.has_value(), "mean and std go together");
  const auto check = [&](const char* name, const std::optional<at::Tensor>& t, at::IntArrayRef shape) {
    if (!t) return;
    TORCH_CHECK_VALUE(t->sizes() == shape, name, " must be ", shape, ", got ", t->sizes());
    TORCH_CHECK_VALUE(t->device() == image.device(), name, " lies on ", t->device(), ", image on ", image.device());
  };
  const auto check_floating = [&](const char* name, const std::optional<at::Tensor>& t, at::IntArrayRef shape) {
    check(name, t, shape);
    TORCH_CHECK_VALUE(!t || is_real_floating(t->scalar_type()), name,
                      " must be float64, float32, float16 or bfloat16, got ", t->scalar_type());
  };
  const int64_t n = image.size(0);
  check_floating("stain", stain, {n, 3, 4});
  check_floating("warp", warp, {n, 2, 3});
  check_floating("mean", mean, {3});
  check_floating("std", std, {3});
  check("valid", valid, {n});
  TORCH_CHECK_VALUE(!valid || valid->scalar_type() == at::kBool, "valid must be bool, got ", valid->scalar_type());
}

inline void check_stain_augment_backward(const at::Tensor& grad, const at::Tensor& image,
                                         const std::optional<at::Tensor>& stain, bool need_image, bool need_stain) {
  TORCH_CHECK_VALUE(grad.sizes() == image.sizes(), "grad must be like image, ", image.sizes(), ", got ", grad.sizes());
  TORCH_CHECK_VALUE(grad.device() == image.device(), "grad lies on ", grad.device(), ", image on ", image.device());
  TORCH_CHECK_VALUE(!need_image || is_real_floating(image.scalar_type()), "an image of ", image.scalar_type(),
                    " has no gradient");
  TORCH_CHECK_VALUE(!need_stain || stain, "there is no stain to differentiate");
}

}  // namespace histodd
