// The kernels of stain_augment for any machine the compiler was told to build for.
#define HISTODD_ISA baseline
#include "stain_augment_rows.h"
