"""The distillation step taken apart gives the distiller's gradient."""

from pathlib import Path

import pytest
import torch
from small_sets import two_classes

from histodd_bench.distill import histodd
from histodd_bench.distill.histodd import HistoDD, matched_parameters
from histodd_bench.models import ModelPool, PoolRecipe
from histodd_bench.profile import report
from histodd_bench.profile.step import AUGMENTATION, COMPILED, REFERENCE, Clock, Matching, measure_step

CPU = torch.device("cpu")


@pytest.mark.parametrize("operators", [COMPILED, REFERENCE], ids=lambda o: o.name)
@pytest.mark.parametrize("label", [0, 1])
def test_gradient_is_that_of_the_distiller(operators, label: int, tmp_path: Path) -> None:
    recipe = PoolRecipe(arch="convnet-d3", width=4, networks=1, epochs=1, batch_size=16)
    pool = ModelPool(two_classes(), recipe, cache=tmp_path / "pool")
    run = histodd._Run(HistoDD(real_batch=8, initial="real"), pool.train, 3, pool, 0, CPU, tmp_path)
    network = pool.load(0).train()
    state = run.generator.get_state()
    distance, gradient, rows = run.matching_loss(network, label)

    run.generator.set_state(state)
    real = run.by_class[label][torch.randint(len(run.by_class[label]), (8,), generator=run.generator)]
    draw = run.augmentation.draw(run.generator)
    matching = Matching(operators, network, matched_parameters(network, "weights"), pool.preprocessing, CPU)
    clock = Clock(CPU)
    fits = run.fits[0][real], run.fits[1][real]
    found, mine = matching.gradient(pool.train.images[real], fits, run.images[rows], label, draw, clock)
    torch.testing.assert_close(found, distance, rtol=1e-4, atol=1e-6)
    assert ((mine - gradient).norm() / gradient.norm()) < 1e-3
    assert set(AUGMENTATION) < set(clock.seconds) and len(clock.seconds) == 11


def test_clock_adds_up_what_has_the_same_name() -> None:
    clock = Clock(CPU)
    for _ in range(2):
        with clock("a"):
            torch.zeros(10)
    with clock("b"):
        pass
    assert list(clock.seconds) == ["a", "b"] and clock.seconds["a"] > 0


def test_step_is_measured_with_both_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histodd_bench.profile.step.REAL_BATCH", 4)
    record = measure_step(CPU, quick=True, seconds=0.001)
    assert set(record["parts"]) == {"compiled", "reference"} and record["settings"]["width"] == 32
    for name, parts in record["parts"].items():
        assert {"image step", "network step", *AUGMENTATION} <= set(parts)
        # Medians of sums and sums of medians differ, but not by much.
        total = sum(p["median"] for p in parts.values())
        assert record["total"][name]["median"] == pytest.approx(total, rel=0.5)
        assert 0 < record["augmentation_share"][name] < 1
    title, header, lines, notes = report.step_table(record)
    assert "convnet-d3 32 wide, 64 px" in title and all(len(line) == len(header) for line in lines)
    assert notes[0].startswith("share of the augmentation: ")
