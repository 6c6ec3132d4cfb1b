"""The operators: each has a public wrapper and a same-signature ``*_reference`` in plain torch (its oracle and fallback)."""

from histodd_bench.ops.gradient_distance import gradient_distance, gradient_distance_reference
from histodd_bench.ops.macenko_fit import (
    macenko_affine,
    macenko_affine_reference,
    macenko_fit,
    macenko_fit_reference,
)
from histodd_bench.ops.stain_augment import stain_augment, stain_augment_reference

__all__ = [
    "gradient_distance",
    "gradient_distance_reference",
    "macenko_affine",
    "macenko_affine_reference",
    "macenko_fit",
    "macenko_fit_reference",
    "stain_augment",
    "stain_augment_reference",
]
