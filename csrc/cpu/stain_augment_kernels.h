// What the CPU file of stain_augment asks of its vectorised kernels, which are compiled once per instruction set.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "../stain_augment.h"
#include "instruction_sets.h"

namespace histodd {

enum class Pixel : int { kByte, kFloat, kHalf, kBFloat16 };

// One call of the operator, forward or backward, in float32. `last` means channels_last, otherwise contiguous.
struct StainJob {
  int64_t n, h, w;
  const void* image;
  Pixel image_type;
  bool image_last;
  const Stain<float>* stain;  // [n] or null
  const Warp* warp;           // [n] or null
  float scale[3], shift[3];   // of the channel statistics: out = scale y + shift
  void* out;                  // the result; in the backward pass the gradient of it, which is only read
  Pixel out_type;
  bool out_last;
  void* grad_image;  // like image, or null
};

// Rows [begin, end) of one image.
using StainForward = void (*)(const StainJob&, int64_t image, int64_t begin, int64_t end);
// The same, backward: the gradient of the image, and the twelve sums of the gradient of [A|b] (null: not wanted).
// With a warp the gradient is added up in `scratch`, h * w * 4 floats, zero before the first call; see StainUnpack.
using StainBackward = void (*)(const StainJob&, int64_t image, int64_t begin, int64_t end, float* scratch,
                               double* sums);
// Writes the scratch of one image to grad_image and leaves it zero.
using StainUnpack = void (*)(const StainJob&, int64_t image, float* scratch);

struct StainKernels {
  StainForward forward;
  StainBackward backward;
  StainUnpack unpack;
};

extern const StainKernels stain_kernels_baseline;
#ifdef HISTODD_X86_DISPATCH
extern const StainKernels stain_kernels_avx2;
extern const StainKernels stain_kernels_avx512;
extern const StainKernels stain_kernels_avx512vbmi;
#endif

}  // namespace histodd
