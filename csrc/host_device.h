// What functions shared by the CPU and CUDA files are declared with.
#pragma once

// HISTODD_HD: callable on both. HISTODD_INLINE: the same, inlined by force, for what is called in every iteration of a
// vectorised loop: a call that is not inlined would stop the vectoriser.
#if defined(__CUDACC__)
#define HISTODD_HD __host__ __device__ __forceinline__
#define HISTODD_INLINE __host__ __device__ __forceinline__
#else
#define HISTODD_HD inline
#define HISTODD_INLINE inline __attribute__((always_inline))
#endif
