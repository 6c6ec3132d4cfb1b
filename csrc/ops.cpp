// Operator schemas, refusals of double backward, and the Python module (build information only).
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>
#include <torch/version.h>

#ifndef HISTODD_CUDA_ARCHS
#define HISTODD_CUDA_ARCHS ""
#endif
#ifndef HISTODD_CUDA_TOOLKIT
#define HISTODD_CUDA_TOOLKIT ""
#endif
#ifndef HISTODD_VERSION
#define HISTODD_VERSION ""
#endif

TORCH_LIBRARY(histodd, m) {
  // Schemas have no defaults: the Python wrappers own those.
  m.def(
      "macenko_fit(Tensor image, float io, float beta, float alpha, float min_tissue, float min_concentration, "
      "str interpolation, bool plus_one, str sign) -> (Tensor stain_matrix, Tensor max_concentration, Tensor status)",
      {at::Tag::pt2_compliant_tag});
  m.def("macenko_affine(Tensor stain_matrix, Tensor max_concentration, Tensor target, Tensor target_top) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("gradient_distance(Tensor[] real, Tensor[] synthetic, str kind, bool per_layer) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "gradient_distance_backward(Tensor grad, Tensor[] real, Tensor[] synthetic, str kind, bool per_layer, "
      "bool need_real, bool need_synthetic) -> (Tensor[], Tensor[])",
      {at::Tag::pt2_compliant_tag});
  // L1 on the CPU where a derivative will be asked for: both passes together read the lists once.
  m.def("gradient_distance_signs(Tensor[] real, Tensor[] synthetic, bool per_layer) -> (Tensor value, Tensor[] signs)",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "gradient_distance_signs_backward(Tensor grad, Tensor[] real, Tensor[] synthetic, Tensor[] signs, "
      "bool per_layer, bool need_real, bool need_synthetic) -> (Tensor[], Tensor[])",
      {at::Tag::pt2_compliant_tag});

  m.def(
      "stain_augment(Tensor image, Tensor? stain, Tensor? warp, Tensor? mean, Tensor? std, Tensor? valid, float io, "
      "ScalarType dtype, bool channels_last) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "stain_augment_backward(Tensor grad, Tensor image, Tensor? stain, Tensor? warp, Tensor? mean, Tensor? std, "
      "Tensor? valid, float io, bool need_image, bool need_stain) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

// First-order derivatives are in autograd.cpp. The *_backward ops have none of their own: without this registration a
// double backward would silently be zero, with it autograd raises.
TORCH_LIBRARY_IMPL(histodd, Autograd, m) {
  m.impl("macenko_fit", torch::autograd::autogradNotImplementedFallback());  // the fit is detached
  m.impl("macenko_affine", torch::autograd::autogradNotImplementedFallback());
  m.impl("gradient_distance_signs", torch::autograd::autogradNotImplementedFallback());
  m.impl("gradient_distance_signs_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("gradient_distance_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("stain_augment_backward", torch::autograd::autogradNotImplementedFallback());
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of histodd_bench; importing registers torch.ops.histodd.*";
  m.def("build_info", [] {
    pybind11::dict info;
    info["version"] = HISTODD_VERSION;
    info["torch"] = TORCH_VERSION;
#ifdef HISTODD_WITH_CUDA
    info["cuda"] = true;
#else
    info["cuda"] = false;
#endif
    info["cuda_toolkit"] = HISTODD_CUDA_TOOLKIT;
    info["cuda_archs"] = HISTODD_CUDA_ARCHS;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
    info["compiler"] = "gcc " __VERSION__;
#else
    info["compiler"] = "unknown";
#endif
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    return info;
  });
}
