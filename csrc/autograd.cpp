// First-order derivatives of the operators. In C++, not registered from Python, because they are called for every batch
// and small ones take microseconds (benchmarks/bench_calls.py times a call). The *_backward operators have no
// derivative of their own, see ops.cpp.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace histodd {
namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Optional = std::optional<Tensor>;
using Lists = std::tuple<std::vector<Tensor>, std::vector<Tensor>>;

template <typename Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

bool needs_gradient(const Tensor& t) { return t.requires_grad(); }
bool needs_gradient(const Optional& t) { return t && t->requires_grad(); }
bool needs_gradient(TensorList list) {
  return std::any_of(list.begin(), list.end(), [](const Tensor& t) { return t.requires_grad(); });
}

// Of forward-mode differentiation there is none: without this its result would silently be zero.
bool has_tangent(const Tensor& t) { return t._fw_grad(/*level=*/0).defined(); }
bool has_tangent(const Optional& t) { return t && has_tangent(*t); }
bool has_tangent(TensorList list) {
  return std::any_of(list.begin(), list.end(), [](const Tensor& t) { return has_tangent(t); });
}

void refuse_tangents(const char* name, bool any) {
  TORCH_CHECK_NOT_IMPLEMENTED(!any, name, " has no forward-mode derivative; ", name,
                              "_reference, in plain torch, has one");
}

Optional given(const Tensor& saved) { return saved.defined() ? Optional(saved) : std::nullopt; }

// Where a derivative may be asked of the backward pass, it must come by the key that refuses it; else straight on.
template <typename F>
auto run_backward(const F& f) {
  if (at::GradMode::is_enabled()) return f();
  at::AutoDispatchBelowADInplaceOrView below;
  return f();
}

// ---- stain_augment ----

Tensor stain_augment_below(const Tensor& image, const Optional& stain, const Optional& warp, const Optional& mean,
                           const Optional& std, const Optional& valid, double io, at::ScalarType dtype,
                           bool channels_last) {
  static const auto op = find<decltype(stain_augment_below)>("histodd::stain_augment");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(image, stain, warp, mean, std, valid, io, dtype, channels_last);
}

std::tuple<Tensor, Tensor> stain_augment_backward(const Tensor& grad, const Tensor& image, const Optional& stain,
                                                  const Optional& warp, const Optional& mean, const Optional& std,
                                                  const Optional& valid, double io, bool need_image, bool need_stain) {
  static const auto op = find<decltype(stain_augment_backward)>("histodd::stain_augment_backward");
  return run_backward([&] { return op.call(grad, image, stain, warp, mean, std, valid, io, need_image, need_stain); });
}

struct StainAugment : Function<StainAugment> {
  static Tensor forward(AutogradContext* ctx, const Tensor& image, const Optional& stain, const Optional& warp,
                        const Optional& mean, const Optional& std, const Optional& valid, double io,
                        at::ScalarType dtype, bool channels_last) {
    const auto saved = [](const Optional& t) { return t.value_or(Tensor()); };
    ctx->save_for_backward({image, saved(stain), saved(warp), saved(mean), saved(std), saved(valid)});
    ctx->saved_data["io"] = io;
    return stain_augment_below(image, stain, warp, mean, std, valid, io, dtype, channels_last);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const bool need_image = ctx->needs_input_grad(0);
    const bool need_stain = saved[1].defined() && ctx->needs_input_grad(1);
    const auto [image, stain] =
        stain_augment_backward(grads[0], saved[0], given(saved[1]), given(saved[2]), given(saved[3]), given(saved[4]),
                               given(saved[5]), ctx->saved_data["io"].toDouble(), need_image, need_stain);
    variable_list result(9);  // one for each argument of forward
    if (need_image) result[0] = image;
    if (need_stain) result[1] = stain;
    return result;
  }
};

Tensor stain_augment(const Tensor& image, const Optional& stain, const Optional& warp, const Optional& mean,
                     const Optional& std, const Optional& valid, double io, at::ScalarType dtype, bool channels_last) {
  refuse_tangents("stain_augment", has_tangent(image) || has_tangent(stain) || has_tangent(warp) || has_tangent(mean) ||
                                       has_tangent(std));
  if (at::GradMode::is_enabled() && (needs_gradient(image) || needs_gradient(stain))) {
    return StainAugment::apply(image, stain, warp, mean, std, valid, io, dtype, channels_last);
  }
  return stain_augment_below(image, stain, warp, mean, std, valid, io, dtype, channels_last);
}

// ---- gradient_distance ----

Tensor gradient_distance_below(TensorList real, TensorList synthetic, c10::string_view kind, bool per_layer) {
  static const auto op = find<decltype(gradient_distance_below)>("histodd::gradient_distance");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(real, synthetic, kind, per_layer);
}

std::tuple<Tensor, std::vector<Tensor>> gradient_distance_signs(TensorList real, TensorList synthetic, bool per_layer) {
  static const auto op = find<decltype(gradient_distance_signs)>("histodd::gradient_distance_signs");
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(real, synthetic, per_layer);
}

Lists gradient_distance_backward(const Tensor& grad, TensorList real, TensorList synthetic, c10::string_view kind,
                                 bool per_layer, bool need_real, bool need_synthetic) {
  static const auto op = find<decltype(gradient_distance_backward)>("histodd::gradient_distance_backward");
  return run_backward([&] { return op.call(grad, real, synthetic, kind, per_layer, need_real, need_synthetic); });
}

Lists gradient_distance_signs_backward(const Tensor& grad, TensorList real, TensorList synthetic, TensorList signs,
                                       bool per_layer, bool need_real, bool need_synthetic) {
  static const auto op = find<decltype(gradient_distance_signs_backward)>("histodd::gradient_distance_signs_backward");
  return run_backward([&] { return op.call(grad, real, synthetic, signs, per_layer, need_real, need_synthetic); });
}

struct GradientDistance : Function<GradientDistance> {
  static Tensor forward(AutogradContext* ctx, TensorList real, TensorList synthetic, const std::string& kind,
                        bool per_layer) {
    variable_list saved = real.vec();
    saved.insert(saved.end(), synthetic.begin(), synthetic.end());
    Tensor value;
    if (kind == "l1" && real[0].is_cpu()) {
      std::vector<Tensor> signs;
      std::tie(value, signs) = gradient_distance_signs(real, synthetic, per_layer);
      saved.insert(saved.end(), signs.begin(), signs.end());
    } else {
      value = gradient_distance_below(real, synthetic, kind, per_layer);
    }
    ctx->saved_data["layers"] = static_cast<int64_t>(real.size());
    ctx->saved_data["kind"] = kind;
    ctx->saved_data["per_layer"] = per_layer;
    ctx->save_for_backward(std::move(saved));
    return value;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const size_t layers = static_cast<size_t>(ctx->saved_data["layers"].toInt());
    const bool per_layer = ctx->saved_data["per_layer"].toBool();
    const TensorList all(saved), real = all.slice(0, layers), synthetic = all.slice(layers, layers);
    const auto needed = [&](size_t begin) {
      for (size_t i = begin; i < begin + layers; ++i) {
        if (ctx->needs_input_grad(i)) return true;
      }
      return false;
    };
    const bool need_real = needed(0), need_synthetic = needed(layers);
    const auto [grad_real, grad_synthetic] =
        saved.size() > 2 * layers
            ? gradient_distance_signs_backward(grads[0], real, synthetic, all.slice(2 * layers), per_layer, need_real,
                                               need_synthetic)
            : gradient_distance_backward(grads[0], real, synthetic, ctx->saved_data["kind"].toStringRef(), per_layer,
                                         need_real, need_synthetic);
    variable_list result(2 * layers + 2);  // one for each tensor and argument of forward
    for (size_t i = 0; i < layers; ++i) {
      if (ctx->needs_input_grad(i)) result[i] = grad_real[i];
      if (ctx->needs_input_grad(layers + i)) result[layers + i] = grad_synthetic[i];
    }
    return result;
  }
};

Tensor gradient_distance(TensorList real, TensorList synthetic, c10::string_view kind, bool per_layer) {
  refuse_tangents("gradient_distance", has_tangent(real) || has_tangent(synthetic));
  if (at::GradMode::is_enabled() && (needs_gradient(real) || needs_gradient(synthetic))) {
    return GradientDistance::apply(real, synthetic, std::string(kind), per_layer);
  }
  return gradient_distance_below(real, synthetic, kind, per_layer);
}

}  // namespace
}  // namespace histodd

TORCH_LIBRARY_IMPL(histodd, Autograd, m) {
  m.impl("stain_augment", histodd::stain_augment);
  m.impl("gradient_distance", histodd::gradient_distance);
}
