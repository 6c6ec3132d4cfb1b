"""Runs every operator on tensors that touch memory nobody may read: one step outside them ends the process.

A new operator gets a ``check_<op>`` here, which is found by its name and returns how many cases it ran.
``test_ops_bounds.py`` runs this in a process of its own, on the CPU's kernels and, emulated, on CUDA's.
"""

import ctypes
import faulthandler
import itertools
import mmap
import os
from pathlib import Path

import torch

if os.environ.get("HISTODD_EMULATED"):
    import emulated

    emulated.extension(Path(os.environ["HISTODD_EMULATED"]))

from stain_inputs import MEAN, STD, images, stains, warps

from histodd_bench.ops import gradient_distance, macenko_affine, macenko_fit

PAGE = mmap.PAGESIZE
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((1, 1, 1), (2, 1, 9), (3, 5, 7), (1, 16, 16), (2, 33, 65), (1, 64, 64), (1, 130, 131), (1, 40, 1000))
PLACES = ("begin", "end", "odd")
kept = []  # the memory of tensors in use


def guarded(t: torch.Tensor, place: str) -> torch.Tensor:
    """A copy with the same strides whose memory begins or ends at a page that may not be touched ("begin", "end"), or
    begins one element later ("odd"), where nothing larger than an element is aligned.
    """
    size = t.numel() * t.element_size()
    if size == 0:
        return t
    pages = -(-(size + t.element_size()) // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + page * PAGE), PAGE, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    kept.append(memory)
    offset = PAGE + {"begin": 0, "end": pages * PAGE - size, "odd": t.element_size()}[place]
    flat = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset)
    return flat.as_strided(t.shape, t.stride()).copy_(t)


def check_stain_augment() -> int:
    count = 0
    for (n, h, w), dtype, last, warped in itertools.product(
        SHAPES, (torch.uint8, *FLOATS), (False, True), (False, True)
    ):
        x = images(n, h, w)
        x = (255 * x).to(dtype) if dtype == torch.uint8 else x.to(dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        up = images(n, h, w, seed=1).to(torch.float32 if dtype == torch.uint8 else dtype)
        up = up.contiguous(memory_format=torch.channels_last) if last else up
        small = [stains(n), warps(n) if warped else None, MEAN, STD, torch.arange(n) % 2 == 0]
        op, backward = torch.ops.histodd.stain_augment, torch.ops.histodd.stain_augment_backward
        expected = op(x, *small, 240.0, up.dtype, last)
        grads = backward(up, x, *small, 240.0, dtype != torch.uint8, True)
        for place in PLACES:
            image, upstream = guarded(x, place), guarded(up, place)
            tight = [t if t is None else guarded(t, place) for t in small]
            torch.testing.assert_close(op(image, *tight, 240.0, up.dtype, last), expected)
            got = backward(upstream, image, *tight, 240.0, dtype != torch.uint8, True)
            torch.testing.assert_close(got, grads)
            count += 1
        kept.clear()
    return count


def check_macenko() -> int:
    count = 0
    for (n, h, w), dtype, last in itertools.product((*SHAPES, (1, 300, 301)), (torch.uint8, *FLOATS), (False, True)):
        x = images(n, h, w)
        x = (255 * x).to(dtype) if dtype == torch.uint8 else x.to(dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        expected = macenko_fit(x)
        target = torch.tensor([[0.6, 0.2], [0.7, 0.9], [0.3, 0.1]], dtype=torch.float64), torch.ones(2).double()
        for place in PLACES:
            fit = macenko_fit(guarded(x, place))
            assert all(torch.equal(a, b) for a, b in zip(fit, expected, strict=True)), (n, h, w, dtype, last)
            macenko_affine(*(guarded(t, place) for t in (*fit[:2], *target)))
            count += 1
        kept.clear()
    return count


def check_gradient_distance() -> int:
    count = 0
    sizes = [1, 2, 3, 7, 8, 31, 33, 1000, 16384, 16385, 40001]
    for dtype, kind, per_layer in itertools.product(FLOATS, ("l1", "l2", "cosine"), (False, True)):
        generator = torch.Generator().manual_seed(0)
        lists = [[torch.randn(2, n, generator=generator).to(dtype) for n in sizes] for _ in range(2)]

        def value_and_gradients(real, synthetic, kind=kind, per_layer=per_layer):
            leaves = [t.requires_grad_() for t in real + synthetic]
            value = gradient_distance(real, synthetic, kind, per_layer)
            return value.detach(), torch.autograd.grad(value.sum(), leaves)

        for place in PLACES:
            value, grads = value_and_gradients(*([guarded(t, place) for t in side] for side in lists))
            expected, exact = value_and_gradients(*([t.clone() for t in side] for side in lists))
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(grads, exact)
            count += 1
        kept.clear()
    return count


if __name__ == "__main__":
    faulthandler.enable()
    torch.set_num_threads(2)
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            print(name, check(), flush=True)
    print("done")
