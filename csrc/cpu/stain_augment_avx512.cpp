// The kernels of stain_augment for x86-64 with AVX-512 (F, BW, DQ, VL). Headers of others come before the target is
// changed.
#include "stain_augment_kernels.h"

#ifdef HISTODD_X86_DISPATCH
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define HISTODD_ISA avx512
#include "stain_augment_rows.h"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
