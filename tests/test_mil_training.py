"""Bags, features on disk, encoders and the training of slide-level models."""

import dataclasses
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch

from histodd_bench.data.patchset import PatchSet
from histodd_bench.errors import HistoddError, UsageError
from histodd_bench.files import save_state
from histodd_bench.mil import MIL_MODELS
from histodd_bench.mil.bags import Bags, make_bags, read_features, slide_label, slide_labels, write_features
from histodd_bench.mil.features import extract, make_encoder
from histodd_bench.mil.joint import JointTrainer, joint_bags
from histodd_bench.mil.simclr import SimCLRRecipe, nt_xent, random_views
from histodd_bench.mil.training import Lookahead, MILRecipe, predict_mil, score_mil, train_mil
from histodd_bench.models import ModelPool, PoolRecipe, build
from histodd_bench.progress import Progress
from histodd_bench.stain import describe
from histodd_bench.training import Trainer, TrainRecipe

pytest.importorskip("h5py", reason="features on disk need the group 'mil'")


def bags(counts=(12, 12), sizes=(1, 3, 10), seed: int = 0, shift: float = 2.0) -> Bags:
    """Slides of several sizes; a slide of class 1 has one instance that is shifted."""
    generator = torch.Generator().manual_seed(seed)
    features, labels = [], []
    for label, count in enumerate(counts):
        for i in range(count):
            bag = torch.randn(sizes[i % len(sizes)], 8, generator=generator)
            bag[0] += shift * label
            features.append(bag)
            labels.append(label)
    names = tuple(f"slide{i}" for i in range(len(labels)))
    return Bags(tuple(features), torch.tensor(labels), names, ("normal", "tumour"))


def patches(labels=(0, 0, 1, 0, 0), groups=(0, 0, 0, 2, 2), names=("a", "b", "c"), size: int = 16) -> PatchSet:
    images = torch.randint(
        0, 256, (len(labels), 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return PatchSet(images, torch.tensor(labels), torch.tensor(groups), names, ("normal", "tumour"))


# ---- bags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [([0, 0], 2, 0), ([0, 0, 0, 1], 2, 1), ([2, 2], 3, 2), ([0, 2, 2, 1], 3, 2), ([1, 2], 3, 1), ([1], 2, 1)],
)
def test_slide_labels(labels: list[int], classes: int, expected: int) -> None:
    assert slide_label(torch.tensor(labels), classes) == expected


def test_patches_become_bags_and_an_empty_slide_is_named() -> None:
    some = patches()
    assert slide_labels(some) == {"a": 1, "c": 0}
    made = make_bags(torch.arange(10.0).reshape(5, 2), some, {"c": 0, "a": 1, "b": 0})
    assert made.names == ("c", "a") and made.labels.tolist() == [0, 1] and made.skipped == ("b",)
    assert made.features[0].tolist() == [[6, 7], [8, 9]] and len(made.features[1]) == 3 and made.in_features == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x * float("nan"), "slide s has features that are NaN"),
        (lambda x: x / 0, "slide s has features that are NaN or infinite"),
        (lambda x: x[:0], "slide s has no patches"),
        (lambda x: x[:, :3], "features of 3 dimensions"),
    ],
)
def test_bags_that_cannot_be_used_name_the_slide(change, says: str) -> None:
    good = torch.ones(2, 4)
    with pytest.raises(HistoddError, match=says):
        Bags((good, change(good)), torch.tensor([0, 1]), ("r", "s"), ("x", "y"))


# ---- features on disk -------------------------------------------------------------------------------------------------


def test_features_on_disk(tmp_path: Path) -> None:
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    write_features(tmp_path / "x" / "f.h5", features, {"encoder": "some", "n": 7})
    assert torch.equal(read_features(tmp_path / "x" / "f.h5"), features)
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["f.h5"]
    with pytest.raises(HistoddError, match=r"missing\.h5 is missing"):
        read_features(tmp_path / "missing.h5")
    (tmp_path / "torn.h5").write_bytes((tmp_path / "x" / "f.h5").read_bytes()[:900])
    with pytest.raises(HistoddError, match=r"torn\.h5 is damaged"):
        read_features(tmp_path / "torn.h5")
    write_features(tmp_path / "nan.h5", features * float("nan"), {})
    with pytest.raises(HistoddError, match=r"nan\.h5 holds features that are NaN"):
        read_features(tmp_path / "nan.h5")


@pytest.fixture
def pool(tmp_path: Path) -> ModelPool:
    recipe = PoolRecipe(arch="convnet-d3", width=4, networks=1, epochs=1)
    return ModelPool(patches((0, 1) * 8, (0, 0, 1, 1) * 4), recipe, cache=tmp_path / "pools")


def encoder(pool: ModelPool, tmp_path: Path, name: str = "pool", weights: str | None = None):
    return make_encoder(
        name, weights, pool, stain=False, cache=tmp_path / "pools", device="cpu", progress=Progress.silent()
    )


def test_features_are_extracted_once_and_again_where_the_file_is_gone_or_spoilt(pool, tmp_path, capsys) -> None:
    own, some = encoder(pool, tmp_path), patches()

    def get():
        return extract(own, some, cache=tmp_path / "features", device="cpu", progress=Progress(), what="some")

    first = get()
    (path,) = (tmp_path / "features").iterdir()
    assert first.shape == (5, 16) and torch.equal(read_features(path), first)
    stamp = path.stat().st_mtime_ns
    assert torch.equal(get(), first) and path.stat().st_mtime_ns == stamp
    path.unlink()
    assert torch.equal(get(), first) and path.exists()
    write_features(path, first * float("nan"), {})
    assert torch.equal(get(), first) and "extracting features again" in capsys.readouterr().err
    path.write_bytes(b"not HDF5")
    assert torch.equal(get(), first)


def test_encoders_say_what_they_are(pool, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    trained = encoder(pool, tmp_path)
    assert "pool-trained: supervised" in trained.title
    other = pool.with_recipe(networks=2)
    assert not any(
        torch.equal(a, b)
        for a, b in zip(trained.network.parameters(), other.load(0).parameters(), strict=True)
        if a.ndim > 1
    ), "the encoder is none of the networks that distillation matches"
    simclr = encoder(pool, tmp_path, "simclr")
    assert "self-supervised" in simclr.title and simclr.key != trained.key
    assert encoder(pool, tmp_path, "auto").key == simclr.key, "no ImageNet weights in the cache"
    random = encoder(pool, tmp_path, "resnet50", "random")
    assert random.title == "ResNet50 to its third stage, random weights"
    assert extract(
        random, patches(size=32), cache=tmp_path / "f", device="cpu", progress=Progress.silent(), what="x"
    ).shape == (5, 1024)


def test_weights_from_a_file_and_from_torchs_cache(pool, tmp_path, monkeypatch) -> None:
    from torchvision.models import get_model, get_model_weights

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(HistoddError, match=r"no ImageNet weights of resnet18 .*--encoder-weights"):
        encoder(pool, tmp_path, "torchvision:resnet18")
    torch.manual_seed(7)
    net = get_model("resnet18", weights=None)
    save_state(tmp_path / "mine.pth", net.state_dict())
    own = encoder(pool, tmp_path, "torchvision:resnet18", str(tmp_path / "mine.pth"))
    x = torch.randn(2, 3, 32, 32)
    net.fc = torch.nn.Identity()
    torch.testing.assert_close(own.network.features(x), net.eval()(x))
    assert own.title == "torchvision resnet18, weights of mine.pth"
    name = get_model_weights("resnet18").IMAGENET1K_V1.url.rpartition("/")[2]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "mine.pth").rename(tmp_path / "hub" / "checkpoints" / name)
    cached = encoder(pool, tmp_path, "torchvision:resnet18")
    assert cached.title == "torchvision resnet18, ImageNet weights IMAGENET1K_V1" and cached.key == own.key


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_weights_of_a_timm_model_from_a_safetensors_file(pool, tmp_path, name) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    net = timm.create_model(name, pretrained=False)
    safetensors.torch.save_file(net.state_dict(), tmp_path / "mine.safetensors")
    own = encoder(pool, tmp_path, f"timm:{name}", str(tmp_path / "mine.safetensors"))
    assert own.title == f"timm {name}, weights of mine.safetensors"
    x = torch.randn(2, 3, 224, 224)
    net.reset_classifier(0)
    torch.testing.assert_close(own.network.features(x), net.eval()(x))
    with pytest.raises(UsageError, match="name its weights with --encoder-weights"):
        encoder(pool, tmp_path, f"timm:{name}")


@pytest.mark.parametrize(
    ("name", "weights", "says"),
    [
        ("resnet5", None, "unknown encoder 'resnet5': did you mean 'resnet50'"),
        ("torchvision:resnet1", "random", "unknown torchvision model"),
        ("pool", "random", "leave out --encoder-weights"),
        ("resnet50", "absent.pth", "no such file"),
    ],
)
def test_encoders_that_do_not_exist(pool, tmp_path, name, weights, says) -> None:
    with pytest.raises(UsageError, match=says):
        encoder(pool, tmp_path, name, weights)


def test_weights_that_do_not_fit(pool, tmp_path) -> None:
    save_state(tmp_path / "other.pth", {"a": torch.zeros(2)})
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("other.pth", "text.pth"):
        with pytest.raises(HistoddError, match=name):
            encoder(pool, tmp_path, "resnet50", str(tmp_path / name))


# ---- SimCLR -----------------------------------------------------------------------------------------------------------


def test_nt_xent_by_hand() -> None:
    """Two patches whose views agree: each view has one partner at similarity 1 and two others at 0."""
    z = torch.eye(2)
    expected = -math.log(math.exp(2) / (math.exp(2) + 2))
    assert nt_xent(z, 3 * z, temperature=0.5).item() == pytest.approx(expected)


def test_views_stay_inside_the_patch() -> None:
    warp, stain = random_views(500, SimCLRRecipe("convnet-d3"), torch.Generator().manual_seed(0))
    corners = torch.tensor([[-1.0, -1, 1, 1], [-1, 1, -1, 1], [1, 1, 1, 1]])
    assert (warp @ corners).abs().max() <= 1 + 1e-6
    assert (stain[:, :, 3] == 0).all() and stain[:, 0, 0].std() > 0.1


# ---- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIL_MODELS)
def test_every_model_learns_one_telling_instance_among_others(name: str) -> None:
    train, test = bags((20, 20), sizes=(1, 3, 6), shift=4.0), bags((10, 10), sizes=(1, 3, 6), seed=1, shift=4.0)
    recipe = MILRecipe(epochs=30, lr=2e-3, width=16, dropout=0.0)
    _, metrics = score_mil(train_mil(name, train, recipe, seed=0), test)
    assert metrics["accuracy"] >= 0.8 and metrics["auc"] >= 0.85, metrics
    assert metrics["epochs"] == 30 and metrics["epoch_seconds"] > 0


def test_training_is_repeatable_and_the_seed_matters() -> None:
    data, recipe = bags(), MILRecipe(epochs=2, width=16)

    def run(seed: int) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(5)  # dropout
            return predict_mil(train_mil("clam-sb", data, recipe, seed).model, data)

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    assert run(0).sum(1).tolist() == pytest.approx([1.0] * 24)


def test_balanced_drawing_makes_a_rare_class_known() -> None:
    data = bags((38, 2), shift=1.0)
    share = []
    for balanced in (False, True):
        recipe = MILRecipe(epochs=10, width=16, balanced=balanced, lr=1e-3)
        share.append(predict_mil(train_mil("abmil", data, recipe, 0).model, data)[:, 1].mean().item())
    assert share[0] < 0.2 < 0.3 < share[1]


def test_one_class_only_one_slide_and_no_slide() -> None:
    recipe = MILRecipe(epochs=1, width=16)
    for name in MIL_MODELS:
        assert predict_mil(train_mil(name, bags((3, 0)), recipe, 0).model, bags()).shape == (24, 2)
        assert predict_mil(train_mil(name, bags((0, 1)), recipe, 0).model, bags((0, 0))).shape[0] == 0
    with pytest.raises(HistoddError, match="no slide with patches"):
        train_mil("abmil", bags((0, 0)), recipe, 0)


def test_training_that_diverges_says_so() -> None:
    with pytest.raises(HistoddError, match=r"training dsmil diverged .*mil\.lr"):
        train_mil("dsmil", bags(), MILRecipe(epochs=3, lr=1e30), 0)


def test_lookahead_by_hand() -> None:
    """Five SGD steps of -1 from 0 reach -5; the slow weights go half of that way and the fast ones start from there."""
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = Lookahead(torch.optim.SGD([p], lr=1.0), steps=5, alpha=0.5)
    path = []
    for _ in range(10):
        optimizer.zero_grad()
        p.sum().backward()
        optimizer.step()
        path.append(p.item())
    assert path == [-1, -2, -3, -4, -2.5, -3.5, -4.5, -5.5, -6.5, -5.0]


def test_going_on_from_a_trained_model_changes_it() -> None:
    data, recipe = bags(), MILRecipe(epochs=2, width=16)
    model = train_mil("clam-sb", data, recipe, 0).model
    before = [p.detach().clone() for p in model.parameters()]
    again = train_mil("clam-sb", data, recipe, 1, start=model, epochs=1)
    assert again.model is model and len(again.epoch_seconds) == 1
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# ---- several sets as one -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stain", [0.0, 1.0])
def test_training_on_parts_is_training_on_all_of_them_in_one_set(stain: float) -> None:
    real, some = patches((0, 1) * 8, (0, 0, 1, 1) * 4, size=8), patches((1, 0) * 3, (0, 1) * 3, size=8)
    made = dataclasses.replace(some, images=some.images.float() / 255 * 0.9)  # synthetic: float32
    whole = PatchSet(torch.cat([real.images.float() / 255, made.images]), torch.cat([real.labels, made.labels]),
                     torch.zeros(22, dtype=torch.int64), ("all",), real.classes)  # fmt: skip
    recipe, about = TrainRecipe(epochs=2, batch_size=5, stain_train=stain), describe(real)

    def trained(make) -> list[torch.Tensor]:
        model = build("convnet-d3", num_classes=2, image_size=8, width=4, generator_seed=0)
        trainer = make(model)
        while not trainer.done:
            trainer.run_epoch()
        assert trainer.step == 2 * 5
        return list(model.parameters())

    parts = trained(lambda model: JointTrainer(model, [real, made], recipe, about, seed=3))
    for a, b in zip(parts, trained(lambda model: Trainer(model, whole, recipe, about, seed=3)), strict=True):
        torch.testing.assert_close(a, b)


def test_bags_of_two_centres_as_one() -> None:
    ours = Bags((torch.ones(2, 3), torch.ones(1, 3)), torch.tensor([0, 1]), ("a", "b"), ("x", "y"))
    theirs = Bags((torch.zeros(4, 3),), torch.tensor([1]), ("c",), ("x", "y"))
    both = joint_bags([ours, theirs])
    assert both.names == ("a", "b", "c") and both.labels.tolist() == [0, 1, 1] and [len(bag) for bag in both.features] == [2, 1, 4]
