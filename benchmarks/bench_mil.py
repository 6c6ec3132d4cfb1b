"""Slide-level models beside torchmil's counterparts: one training step (loss and gradients) on one bag, published widths.

    python -m pytest benchmarks/bench_mil.py --benchmark-columns=median,ops

Bags per second is the column ``ops``. torchmil's models get the same first layer and the same sizes; they are binary, and CLAM-MB has
no counterpart. HISTODD_BENCH_THREADS sets the number of threads (default 1), HISTODD_BENCH_DEVICE the device (default cpu).
"""

import os

import pytest
import torch
from torch import nn

from histodd_bench.mil import MIL_MODELS, build_mil
from histodd_bench.mil.clam import smooth_svm

DEVICE = torch.device(os.environ.get("HISTODD_BENCH_DEVICE", "cpu"))
FEATURES, WIDTH = 1024, 512
SIZES = [10, 100, 1000, 10_000]


def embed() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU())


class InstanceLoss(nn.Module):
    """Our smooth SVM with the shapes that torchmil's CLAM calls its own with."""

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return smooth_svm(logits, targets[:, 0].long())


def torchmil_model(name: str) -> nn.Module:
    models = pytest.importorskip("torchmil.models", reason="torchmil is not installed")
    shape = (FEATURES,)
    if name == "abmil":
        return models.ABMIL(shape, att_dim=WIDTH // 4, gated=True, feat_ext=embed())
    if name == "clam-sb":  # both of its instance losses fail on the shapes that it gives them: it gets ours
        found = models.CLAM_SB(shape, att_dim=WIDTH // 2, gated=True, k_sample=8, feat_ext=embed())
        found.inst_loss_fn = InstanceLoss()
        return found
    if name == "dsmil":
        return models.DSMIL(shape, att_dim=128, nonlinear_q=True, nonlinear_v=True)
    if name == "transmil":
        return models.TransMIL(shape, att_dim=WIDTH, n_heads=8, n_landmarks=WIDTH // 2)
    pytest.skip(f"torchmil has no counterpart of {name}")


def measure(benchmark, step, n: int) -> None:
    def synchronised() -> None:
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    torch.set_num_threads(int(os.environ.get("HISTODD_BENCH_THREADS", "1")))
    synchronised()
    benchmark.pedantic(synchronised, rounds=20 if n <= 1000 else 5, warmup_rounds=2)


@pytest.mark.parametrize("peer", ["ours", "torchmil"])
@pytest.mark.parametrize("name", MIL_MODELS)
@pytest.mark.parametrize("n", SIZES)
def test_training_step(benchmark, n: int, name: str, peer: str) -> None:
    benchmark.group = f"{name}, {n} instances"
    torch.manual_seed(0)
    bag = torch.randn(1, n, FEATURES, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    if peer == "ours":
        net, label = (
            build_mil(name, in_features=FEATURES, num_classes=2, seed=0).to(DEVICE).train(),
            torch.tensor([1]).to(DEVICE),
        )

        def step() -> None:
            net.zero_grad(set_to_none=True)
            net.loss(bag, label).backward()  # type: ignore[operator]

    else:
        other, target = torchmil_model(name).to(DEVICE).train(), torch.ones(1, device=DEVICE)
        if name == "clam-sb" and n < 16:
            pytest.skip("torchmil's CLAM needs more instances than it clusters")

        def step() -> None:
            other.zero_grad(set_to_none=True)
            _, losses = other.compute_loss(target, bag)
            sum(losses.values()).backward()

    measure(benchmark, step, n)
