// The kernels of stain_augment for x86-64 with AVX-512 (F, BW, DQ, VL) and VBMI. Headers of others come before the
// target is changed.
#include "stain_augment_kernels.h"

#ifdef HISTODD_X86_DISPATCH
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi"))), \
                             apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own header
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")
#endif
#define HISTODD_ISA avx512vbmi
#define HISTODD_VBMI 1
#include "stain_augment_rows.h"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
