"""The pool of networks: trained once, cached safely, continued after a kill to the same result, shared between recipes."""

import fcntl
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from histodd_bench.data.patchset import PatchSet
from histodd_bench.errors import HistoddError, UsageError
from histodd_bench.models import ModelPool, PoolRecipe
from histodd_bench.models.pool import ForgettingCounts
from histodd_bench.progress import Progress
from histodd_bench.training import predict

RECIPE = PoolRecipe(arch="convnet-d3", width=8, networks=2, epochs=3, batch_size=16)
BATCHES = 5  # per epoch


def patches(n: int = 80, size: int = 16) -> PatchSet:
    """Noise; patches of class 1 are darker on the left, so a network can learn them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(60, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(n) % 2
    images[labels == 1, :, :, : size // 2] -= 60
    return PatchSet(images, labels, torch.arange(n) % 5, tuple("abcde"), ("light", "dark"))


def make(cache: Path, recipe: PoolRecipe = RECIPE, train: PatchSet | None = None) -> ModelPool:
    return ModelPool(train or patches(), recipe, cache=cache)


def assert_same(one: torch.nn.Module, two: torch.nn.Module) -> None:
    a, b = one.state_dict(), two.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> ModelPool:
    """A pool with all its networks; tests must not write to its cache."""
    made = make(tmp_path_factory.mktemp("pool"))
    made.prepare()
    return made


def test_networks_learn_are_cached_and_copied(trained):
    network = trained.load(0)
    assert not network.training
    logits = predict(network, trained.train, trained.preprocessing)
    assert (logits.argmax(1) == trained.train.labels).float().mean() > 0.9
    again = make(trained.cache)
    assert_same(network, again.load(0))
    assert again.spent.here == 0
    network.classifier.weight.data.zero_()
    assert trained.load(0).classifier.weight.abs().sum() > 0, "a change to one copy reached another"


def test_seconds_are_counted_once_per_network(trained):
    fresh = make(trained.cache)
    fresh.load(0)
    once = fresh.spent.total
    (path,) = trained.cache.rglob("network-0.pt")
    assert once == sum(torch.load(path, weights_only=True)["epoch_seconds"]) > 0
    fresh.load(0)
    fresh.forgetting(0)
    fresh.with_recipe(networks=7).load(0)
    assert fresh.spent.total == once


def test_a_network_depends_on_its_seed_and_not_on_the_pool_size(trained):
    assert not torch.equal(trained.load(0).classifier.weight, trained.load(1).classifier.weight)
    assert make(trained.cache, replace(RECIPE, networks=9)).key == trained.key


@pytest.mark.parametrize(
    "change", [{"lr": 0.02}, {"augment": ()}, {"width": 9}, {"balanced": True}, {"stain_train": 0.5}]
)
def test_another_recipe_has_another_key(trained, change):
    assert trained.with_recipe(**change).key != trained.key


def test_other_patches_have_another_key(trained, tmp_path):
    other = trained.train.subset(range(79))
    assert make(tmp_path, train=other).key != trained.key


def test_with_recipe_replaces_epochs_by_steps_and_forgets_the_width_of_another_network(trained):
    other = trained.with_recipe(arch="resnet18", steps=7)
    assert (other.recipe.width, other.recipe.epochs, other.recipe.steps) == (None, None, 7)
    assert trained.with_recipe(lr=0.1).recipe.width == 8
    assert other.with_recipe(epochs=2).recipe.steps is None
    assert other.spent is trained.spent and other.train is trained.train


def test_bad_requests(tmp_path, trained):
    with pytest.raises(IndexError, match="network 2 of a pool of 2"):
        trained.load(2)
    with pytest.raises(UsageError, match="patches of 32 px, the training set has 16 px"):
        make(tmp_path, replace(RECIPE, image_size=32))
    with pytest.raises(UsageError, match=r"pool\.networks must be at least 1, got 0"):
        replace(RECIPE, networks=0)
    with pytest.raises(UsageError, match="too small for resnet18"):
        make(tmp_path, replace(RECIPE, arch="resnet18"), patches(size=8)).load(0)


def test_divergence_is_reported_and_leaves_no_network(tmp_path):
    with pytest.raises(HistoddError, match=r"diverged in epoch 1: lower its learning rate \(1e\+30\)"):
        make(tmp_path, replace(RECIPE, lr=1e30)).load(0)
    assert not list(tmp_path.rglob("*.pt"))


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(HistoddError, match="cannot write"):
        make(tmp_path / "file" / "cache").load(0)


def test_damaged_network_is_named(tmp_path):
    made = make(tmp_path)
    made.load(0)
    (path,) = tmp_path.rglob("network-0.pt")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(HistoddError, match=r"network-0\.pt is damaged .*: delete it"):
        make(tmp_path).load(0)


def test_nothing_is_unpickled(tmp_path):
    made = make(tmp_path)
    path = tmp_path / made.key[:32] / "network-0.pt"
    path.parent.mkdir()

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for write in (lambda b: pickle.dump(Harmful(), b, protocol=2), lambda b: torch.save({"model": Harmful()}, b)):
        buffer = io.BytesIO()
        write(buffer)
        path.write_bytes(buffer.getvalue())
        with pytest.raises(HistoddError, match="damaged"):
            made.load(0)
    assert not (tmp_path / "ran").exists()


def child(cache: Path, stop: str, at: int) -> subprocess.CompletedProcess[bytes]:
    """Train network 0 in a process of its own, which kills itself at the given moment."""
    here = Path(__file__).resolve()
    return subprocess.run(
        [sys.executable, str(here), str(cache), stop, str(at)],
        env={**os.environ, "PYTHONPATH": str(here.parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=120,
        check=False,
    )


def test_killed_at_any_moment_it_continues_to_the_same_network(tmp_path, trained):
    moments = [("batch", 2), ("batch", BATCHES + 3), ("rename", 1)]
    for stop, at in moments:  # every child goes on where the one before it was killed
        killed = child(tmp_path, stop, at)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        assert not list(tmp_path.rglob("network-0.pt"))
    checkpoint = torch.load(next(tmp_path.rglob("*.checkpoint.pt")), weights_only=True)
    assert checkpoint["trainer"]["epoch"] == 1

    resumed = make(tmp_path)
    assert_same(resumed.load(0), trained.load(0))
    expected, found = trained.forgetting(0), resumed.forgetting(0)
    assert all(torch.equal(a, b) for a, b in zip(vars(expected).values(), vars(found).values(), strict=True))
    assert resumed.spent.total > resumed.spent.here > 0, "the killed runs' epochs must be counted too"
    assert not list(tmp_path.rglob("*.checkpoint.pt"))


def test_a_second_run_waits_and_uses_what_the_first_trained(tmp_path, trained):
    log = io.StringIO()
    waiting = ModelPool(patches(), RECIPE, cache=tmp_path, progress=Progress(log))
    folder = tmp_path / waiting.key[:32]
    folder.mkdir()
    with open(folder / "network-0.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another process would
        networks: list[torch.nn.Module] = []
        thread = threading.Thread(target=lambda: networks.append(waiting.load(0)))
        thread.start()
        while "waiting for another run" not in log.getvalue() and thread.is_alive():
            thread.join(0.01)
        (folder / "network-0.pt").write_bytes((trained.cache / trained.key[:32] / "network-0.pt").read_bytes())
    thread.join(30)
    assert_same(networks[0], trained.load(0))
    assert waiting.spent.here == 0


def logits(correct: list[int], labels: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(torch.where(torch.tensor(correct) == 1, labels, 1 - labels), 2).float()


def test_forgetting_events_of_a_hand_made_sequence():
    #        patch:    0  1  2  3
    presentations = [[1, 0, 0, 1], [0, 0, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]]
    labels = torch.tensor([0, 1, 1, 0])
    counts = ForgettingCounts.zeros(4)
    for correct in presentations:
        for indices in (torch.tensor([3, 0]), torch.tensor([2, 1])):  # two minibatches, shuffled
            part = [correct[i] for i in indices]
            counts.update(indices, logits(part, labels[indices]), labels[indices])
    assert counts.forgotten.tolist() == [2, 0, 1, 0]
    assert counts.learned.tolist() == [True, False, True, True]
    assert counts.correct.tolist() == [False, False, True, True]


def _main(cache: str, stop: str, at: str) -> None:
    torch.set_num_threads(1)
    calls = 0

    def kill_at_call(function):
        def wrapped(*args):
            nonlocal calls
            calls += 1
            if calls == int(at):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return wrapped

    if stop == "batch":
        ForgettingCounts.update = kill_at_call(ForgettingCounts.update)
    else:
        os.replace = kill_at_call(os.replace)
    make(Path(cache)).load(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
