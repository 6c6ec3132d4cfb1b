// gradient_distance on the CPU: one parallel loop over the units of all layers, forward and backward.
#include "../gradient_distance.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "instruction_sets.h"

namespace histodd {
namespace {

constexpr int64_t kRun = 32768;    // elements per unit of L1 and L2
constexpr int64_t kFlush = 1024;   // float32 partial sums go into a double after this many elements
constexpr int64_t kSerial = 8192;  // below this many elements threads cost more than they save

struct Unit {
  int64_t layer, begin, size;
};

struct Plan {
  std::vector<at::Tensor> real, synthetic;  // contiguous where they are read
  std::vector<Unit> units;
  int64_t grain = 1;  // units per task
  at::ScalarType result = at::kFloat;
};

Plan make_plan(at::TensorList real, at::TensorList synthetic, Kind kind, bool read = true) {
  check_gradient_lists(real, synthetic);
  Plan plan;
  int64_t total = 0;
  for (size_t i = 0; i < real.size(); ++i) {
    plan.real.push_back(read ? real[i].contiguous() : real[i]);
    plan.synthetic.push_back(read ? synthetic[i].contiguous() : synthetic[i]);
    if (real[i].scalar_type() == at::kDouble) plan.result = at::kDouble;
    const int64_t numel = real[i].numel();
    if (numel == 0) continue;
    const int64_t size = unit_size(kind, kRun, numel, real[i].dim(), real[i].dim() ? real[i].size(0) : 1);
    for (int64_t begin = 0; begin < numel; begin += size) {
      plan.units.push_back({static_cast<int64_t>(i), begin, std::min(size, numel - begin)});
    }
    total += numel;
  }
  const int64_t units = static_cast<int64_t>(plan.units.size());
  if (units) plan.grain = std::max<int64_t>(1, kSerial * units / total);
  return plan;
}

template <typename F, typename T>
struct SumPass {
  HISTODD_INLINE static void run(const T* r, const T* s, int64_t n, double* out) {
    using Acc = at::opmath_type<T>;
    double sum = 0;
    for (int64_t begin = 0; begin < n; begin += kFlush) {
      const int64_t end = std::min(n, begin + kFlush);
      Acc part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t i = begin; i < end; ++i) part += F::value(static_cast<Acc>(r[i]), static_cast<Acc>(s[i]));
      sum += part;
    }
    *out = sum;
  }
};

template <typename T>
struct SignPass {
  HISTODD_INLINE static void run(const T* r, const T* s, int64_t n, int8_t* signs) {
    using Acc = at::opmath_type<T>;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) signs[i] = L1::sign(static_cast<Acc>(r[i]), static_cast<Acc>(s[i]));
  }
};

template <typename F, typename T>
double sum_run(const T* r, const T* s, int64_t n) {
  double sum;
  run_best<SumPass<F, T>>(r, s, n, &sum);
  return sum;
}

template <typename T>
CosineSums sum_filter(const T* r, const T* s, int64_t n) {
  using Acc = at::opmath_type<T>;
  CosineSums sums;
  for (int64_t begin = 0; begin < n; begin += kFlush) {
    const int64_t end = std::min(n, begin + kFlush);
    Acc dot = 0, rr = 0, ss = 0;
#pragma omp simd reduction(+ : dot, rr, ss)
    for (int64_t i = begin; i < end; ++i) {
      const Acc a = static_cast<Acc>(r[i]), b = static_cast<Acc>(s[i]);
      dot += a * b;
      rr += a * a;
      ss += b * b;
    }
    sums.dot += dot;
    sums.rr += rr;
    sums.ss += ss;
  }
  return sums;
}

template <typename T>
double unit_value(Kind kind, const T* r, const T* s, int64_t n) {
  switch (kind) {
    case Kind::kL1:
      return sum_run<L1>(r, s, n);
    case Kind::kL2:
      return sum_run<L2>(r, s, n);
    default:
      return cosine(sum_filter(r, s, n));
  }
}

// Either gradient pointer may be null.
template <typename F, typename T>
struct VjpPass {
  HISTODD_INLINE static void run(const T* r, const T* s, double grad, T* grad_r, T* grad_s, int64_t n) {
    using Acc = at::opmath_type<T>;
    const Acc g = static_cast<Acc>(grad);
    if (grad_r) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) grad_r[i] = F::vjp(static_cast<Acc>(r[i]), static_cast<Acc>(s[i]), g);
    }
    if (grad_s) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) grad_s[i] = -F::vjp(static_cast<Acc>(r[i]), static_cast<Acc>(s[i]), g);
    }
  }
};

template <typename T>
struct SignVjpPass {
  HISTODD_INLINE static void run(const int8_t* signs, double grad, T* grad_r, T* grad_s, int64_t n) {
    using Acc = at::opmath_type<T>;
    const Acc g = static_cast<Acc>(grad);
    if (grad_r) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) grad_r[i] = L1::vjp_of_sign(signs[i], g);
    }
    if (grad_s) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) grad_s[i] = L1::vjp_of_sign(signs[i], -g);
    }
  }
};

template <typename T>
void vjp_filter(const T* r, const T* s, double grad, T* grad_r, T* grad_s, int64_t n) {
  using Acc = at::opmath_type<T>;
  const CosineVjp v = cosine_vjp(sum_filter(r, s, n), grad);
  const Acc cross = static_cast<Acc>(v.cross), self_r = static_cast<Acc>(v.self_r);
  const Acc self_s = static_cast<Acc>(v.self_s);
  for (int64_t i = 0; i < n; ++i) {
    const Acc a = static_cast<Acc>(r[i]), b = static_cast<Acc>(s[i]);
    if (grad_r) grad_r[i] = cross * b + self_r * a;
    if (grad_s) grad_s[i] = cross * a + self_s * b;
  }
}

template <typename T>
void unit_vjp(Kind kind, const T* r, const T* s, double grad, T* grad_r, T* grad_s, int64_t n) {
  switch (kind) {
    case Kind::kL1:
      return run_best<VjpPass<L1, T>>(r, s, grad, grad_r, grad_s, n);
    case Kind::kL2:
      return run_best<VjpPass<L2, T>>(r, s, grad, grad_r, grad_s, n);
    default:
      return vjp_filter(r, s, grad, grad_r, grad_s, n);
  }
}

// f(u, unit, r, s) for every unit, r and s of the unit's dtype, in parallel.
template <typename F>
void for_each_unit(const Plan& plan, const F& f) {
  at::parallel_for(0, static_cast<int64_t>(plan.units.size()), plan.grain, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const Unit& unit = plan.units[u];
      const at::Tensor &r = plan.real[unit.layer], &s = plan.synthetic[unit.layer];
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, r.scalar_type(), "gradient_distance", [&] {
        f(u, unit, r.const_data_ptr<scalar_t>() + unit.begin, s.const_data_ptr<scalar_t>() + unit.begin);
      });
    }
  });
}

at::Tensor add_up(const Plan& plan, const std::vector<double>& value, bool per_layer) {
  at::Tensor out = at::zeros({per_layer ? static_cast<int64_t>(plan.real.size()) : 1}, at::kDouble);
  double* sums = out.mutable_data_ptr<double>();
  for (size_t u = 0; u < value.size(); ++u) sums[per_layer ? plan.units[u].layer : 0] += value[u];
  out = out.to(plan.result);
  return per_layer ? out : out.squeeze(0);
}

at::Tensor gradient_distance(at::TensorList real, at::TensorList synthetic, c10::string_view kind_name,
                             bool per_layer) {
  const Kind kind = parse_kind(kind_name);
  const Plan plan = make_plan(real, synthetic, kind);
  std::vector<double> value(plan.units.size());
  for_each_unit(plan, [&](int64_t u, const Unit& unit, const auto* r, const auto* s) {
    value[u] = unit_value(kind, r, s, unit.size);
  });
  return add_up(plan, value, per_layer);
}

std::tuple<at::Tensor, std::vector<at::Tensor>> gradient_distance_signs(at::TensorList real, at::TensorList synthetic,
                                                                        bool per_layer) {
  const Plan plan = make_plan(real, synthetic, Kind::kL1);
  std::vector<double> value(plan.units.size());
  std::vector<at::Tensor> signs;
  for (const at::Tensor& r : plan.real) signs.push_back(at::empty(r.sizes(), at::kChar));
  for_each_unit(plan, [&](int64_t u, const Unit& unit, const auto* r, const auto* s) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(r)>>;
    int8_t* to = signs[unit.layer].mutable_data_ptr<int8_t>() + unit.begin;
    value[u] = sum_run<L1>(r, s, unit.size);     // apart from the signs, so that both ways give the same bits
    run_best<SignPass<T>>(r, s, unit.size, to);  // finds the unit in the cache
  });
  return {add_up(plan, value, per_layer), std::move(signs)};
}

// What the two backward passes share: the upstream gradient of every layer, and results to fill.
struct Backward {
  at::Tensor upstream;
  std::vector<at::Tensor> real, synthetic;
  bool per_layer;

  double grad(const Unit& unit) const { return upstream.const_data_ptr<double>()[per_layer ? unit.layer : 0]; }

  template <typename T>
  static T* at_unit(std::vector<at::Tensor>& side, const Unit& unit) {
    return side.empty() ? nullptr : side[unit.layer].mutable_data_ptr<T>() + unit.begin;
  }
};

Backward make_backward(const at::Tensor& grad, const Plan& plan, bool per_layer, bool need_real, bool need_synthetic) {
  Backward out{grad.to(at::kDouble).contiguous(), {}, {}, per_layer};
  TORCH_CHECK_VALUE(out.upstream.numel() == (per_layer ? static_cast<int64_t>(plan.real.size()) : 1),
                    "grad has the shape of the result, got ", grad.sizes());
  for (const at::Tensor& r : plan.real) {
    if (need_real) out.real.push_back(at::empty_like(r, at::MemoryFormat::Contiguous));
    if (need_synthetic) out.synthetic.push_back(at::empty_like(r, at::MemoryFormat::Contiguous));
  }
  return out;
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> gradient_distance_backward(
    const at::Tensor& grad, at::TensorList real, at::TensorList synthetic, c10::string_view kind_name, bool per_layer,
    bool need_real, bool need_synthetic) {
  const Kind kind = parse_kind(kind_name);
  const Plan plan = make_plan(real, synthetic, kind);
  Backward out = make_backward(grad, plan, per_layer, need_real, need_synthetic);
  for_each_unit(plan, [&](int64_t, const Unit& unit, const auto* r, const auto* s) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(r)>>;
    unit_vjp(kind, r, s, out.grad(unit), Backward::at_unit<T>(out.real, unit),
             Backward::at_unit<T>(out.synthetic, unit), unit.size);
  });
  return {std::move(out.real), std::move(out.synthetic)};
}

// The same from the signs alone: a quarter of the bytes to read. The lists give shapes and dtypes.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> gradient_distance_signs_backward(
    const at::Tensor& grad, at::TensorList real, at::TensorList synthetic, at::TensorList signs, bool per_layer,
    bool need_real, bool need_synthetic) {
  const Plan plan = make_plan(real, synthetic, Kind::kL1, /*read=*/false);
  TORCH_CHECK_VALUE(signs.size() == real.size(), "there must be signs for every layer, got ", signs.size(), " for ",
                    real.size());
  for (size_t i = 0; i < signs.size(); ++i) {
    TORCH_CHECK_VALUE(
        signs[i].scalar_type() == at::kChar && signs[i].sizes() == real[i].sizes() && signs[i].is_contiguous(),
        "layer ", i, ": signs are those of gradient_distance_signs");
  }
  Backward out = make_backward(grad, plan, per_layer, need_real, need_synthetic);
  for_each_unit(plan, [&](int64_t, const Unit& unit, const auto* r, const auto*) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(r)>>;
    const int8_t* from = signs[unit.layer].const_data_ptr<int8_t>() + unit.begin;
    run_best<SignVjpPass<T>>(from, out.grad(unit), Backward::at_unit<T>(out.real, unit),
                             Backward::at_unit<T>(out.synthetic, unit), unit.size);
  });
  return {std::move(out.real), std::move(out.synthetic)};
}

}  // namespace
}  // namespace histodd

TORCH_LIBRARY_IMPL(histodd, CPU, m) {
  m.impl("gradient_distance", histodd::gradient_distance);
  m.impl("gradient_distance_backward", histodd::gradient_distance_backward);
  m.impl("gradient_distance_signs", histodd::gradient_distance_signs);
  m.impl("gradient_distance_signs_backward", histodd::gradient_distance_signs_backward);
}
