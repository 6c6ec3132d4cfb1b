// Runs a loop in the widest instruction set of the machine it runs on: one binary for every x86-64 (and any other) CPU.
// A body is a struct with a static, always inlined run(...); it is compiled once per instruction set, by the compiler's
// own vectoriser. Bodies call nothing that is not inlined, so that no wide code leaks into functions shared by all.
#pragma once

#include <ATen/Version.h>

#include <string>

namespace histodd {

#if defined(__x86_64__) && defined(__GNUC__)
#define HISTODD_X86_DISPATCH 1

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// The best of this machine, or what ATEN_CPU_CAPABILITY (default, avx2) holds torch's own kernels down to.
inline InstructionSet instruction_set() {
  static const InstructionSet best = [] {
    const std::string most = at::get_cpu_capability();
    __builtin_cpu_init();
    const bool avx2 = most != "DEFAULT" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && most != "AVX2" && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl");
    return avx512 ? InstructionSet::kAvx512 : avx2 ? InstructionSet::kAvx2 : InstructionSet::kBaseline;
  }();
  return best;
}

template <typename Body, typename... Args>
__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"), noinline)) void run_avx512(Args... args) {
  Body::run(args...);
}

template <typename Body, typename... Args>
__attribute__((target("avx2,fma"), noinline)) void run_avx2(Args... args) {
  Body::run(args...);
}
#endif

template <typename Body, typename... Args>
void run_best(Args... args) {
#ifdef HISTODD_X86_DISPATCH
  if (instruction_set() == InstructionSet::kAvx512) return run_avx512<Body, Args...>(args...);
  if (instruction_set() == InstructionSet::kAvx2) return run_avx2<Body, Args...>(args...);
#endif
  Body::run(args...);
}

}  // namespace histodd
