// Runs a loop in the widest instruction set of the machine it runs on: one binary for every x86-64 (and any other) CPU.
// A body is a struct with a static, always inlined run(...); it is compiled once per instruction set, by the compiler's
// own vectoriser. Bodies call nothing that is not inlined, so that no wide code leaks into functions shared by all.
#pragma once

#include <cstdlib>
#include <cstring>

namespace histodd {

#if defined(__x86_64__) && defined(__GNUC__)
#define HISTODD_X86_DISPATCH 1

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// PyTorch's own variable ATEN_CPU_CAPABILITY=default or avx2 holds it back, which the tests use.
inline InstructionSet instruction_set() {
  static const InstructionSet best = [] {
    __builtin_cpu_init();
    const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
    if (wish && std::strcmp(wish, "default") == 0) return InstructionSet::kBaseline;
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (wish && std::strcmp(wish, "avx2") == 0 && avx2) return InstructionSet::kAvx2;
    return avx2 && avx512 ? InstructionSet::kAvx512 : avx2 ? InstructionSet::kAvx2 : InstructionSet::kBaseline;
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
