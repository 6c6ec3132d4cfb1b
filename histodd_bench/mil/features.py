"""Feature extraction: encoders that say honestly what they are, and features cached in HDF5.

Nothing is downloaded. ImageNet weights come from torch's hub cache or from a file; where there are none, ``auto`` falls back on
a network trained on the training patches without their labels, and every table names the encoder it used.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from histodd_bench.data.patchset import PatchSet
from histodd_bench.errors import HistoddError, UsageError, unknown_name
from histodd_bench.files import digest, sha256
from histodd_bench.grid import network
from histodd_bench.mil.bags import read_features, write_features
from histodd_bench.models import ModelPool
from histodd_bench.progress import Progress
from histodd_bench.stain import Preprocessing
from histodd_bench.training import predict

POOL_EPOCHS = 20  # of the encoder "pool" at least: networks that distillation matches may be trained for one epoch only
VERSION = 1  # raised when the same encoder would give other features
ENCODERS = (
    "auto",  # resnet50 where its ImageNet weights are in torch's cache or --encoder-weights names them, otherwise simclr
    "resnet50",  # up to its third stage, 1,024 features (as CLAM and TransMIL use it), ImageNet weights
    "pool",  # a network of the distillation pool's recipe, trained on the training patches, that distillation never matches
    "simclr",  # the pool's architecture, trained on the training patches without labels
    "torchvision:NAME",  # any classifier without its last layer
    "timm:NAME",  # any model without its head; needs timm, and --encoder-weights (a .pth or .safetensors file)
)
TRAINED = ("pool", "simclr")  # on the training patches, here
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, eq=False)
class Encoder:
    """A network that turns patches into feature vectors.

    Attributes:
        title: what it is and where its weights come from, as tables print it.
        network: has ``features(x) -> [N,D]``.
        preprocessing: channel statistics it expects, and the stain template.
        stain: normalise stains first.
        identity: JSON values on which its features depend.
    """

    title: str
    network: nn.Module
    preprocessing: Preprocessing
    stain: bool
    identity: dict[str, Any]

    @property
    def key(self) -> str:
        """SHA-256 (hex) of everything its features depend on, pixels aside."""
        return digest({"version": VERSION, "stain": self.stain, **self.identity})


class _Trunk(nn.Module):
    """Any module as an encoder: its output is the feature vector, pooled where it is a map."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def features(self, x: Tensor) -> Tensor:
        """``[N,3,H,W]`` -> ``[N,D]``."""
        y = self.body(x)
        return y.mean((2, 3)) if y.ndim == 4 else y


def check_encoder(name: str, weights: str | None, image_size: int) -> None:
    """Refuse, before anything is computed, an encoder that cannot be had or cannot read patches of ``image_size`` px.

    Raises:
        UsageError: unknown name (with the nearest match), weights given to an encoder that has none, or patches it cannot read.
        HistoddError: weights that are missing or do not fit; the message says what to do.
    """
    name = _resolve(name, weights)
    if name in TRAINED:
        return
    network, _, _ = _pretrained(name, weights)
    try:
        with torch.no_grad():
            found = network.eval().features(torch.zeros(2, 3, image_size, image_size))
    except Exception as error:  # torch raises a different type for every way not to fit
        raise UsageError(
            f"--encoder {name} cannot read patches of {image_size} px ({str(error).splitlines()[0]}): choose another --image-size"
        ) from error
    if not bool(torch.isfinite(found).all()):
        raise HistoddError(f"--encoder {name} gives NaN or infinite features: check its weights")


def make_encoder(
    name: str,
    weights: str | None,
    pool: ModelPool,
    *,
    stain: bool,
    cache: Path,
    device: torch.device | str,
    progress: Progress,
) -> Encoder:
    """An encoder by name.

    Args:
        name: one of :data:`ENCODERS`.
        weights: a file with a state dict, ``random`` for the initial weights of seed 0, or None for torch's cache.
        pool: its recipe and training set make the encoders that are trained here.
        stain: normalise stains before features are extracted.
        cache: folder that keeps encoders trained here.

    Raises:
        UsageError, HistoddError: as :func:`check_encoder`.
    """
    name = _resolve(name, weights)
    if name in TRAINED:
        return _trained(name, pool, stain, cache, device, progress)
    network, title, identity = _pretrained(name, weights)
    template = pool.preprocessing
    preprocessing = Preprocessing(IMAGENET_MEAN, IMAGENET_STD, template.template, template.template_index)
    facts = {"encoder": name, "weights": identity, "template": str(template.template) if stain else None}
    return Encoder(title, network.eval().to(device), preprocessing, stain, facts)


def _resolve(name: str, weights: str | None) -> str:
    """The encoder that ``auto`` stands for; weights for one that is trained here are refused."""
    if name == "auto":
        name = "resnet50" if weights or _cached("resnet50") else "simclr"
    if name in TRAINED and weights:
        raise UsageError(f"--encoder {name} is trained here: leave out --encoder-weights")
    return name


def _pretrained(name: str, weights: str | None) -> tuple["_Trunk", str, Any]:
    """An encoder that is not trained here, on the CPU; its title, and what identifies its weights."""
    kind, _, model = name.partition(":")
    if name == "resnet50":
        body, origin, identity = _torchvision("resnet50", weights)
        # Lu et al. 2021, Methods: the third residual block's output, averaged over the map.
        stages = [body.get_submodule(n) for n in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")]
        return _Trunk(nn.Sequential(*stages)), f"ResNet50 to its third stage, {origin}", identity
    if kind == "torchvision" and model:
        body, origin, identity = _torchvision(model, weights)
        return _Trunk(_without_head(body)), f"torchvision {model}, {origin}", identity
    if kind == "timm" and model:
        body, origin, identity = _timm(model, weights)
        return _Trunk(body), f"timm {model}, {origin}", identity
    raise unknown_name("encoder", name, ENCODERS)


def _trained(
    name: str, pool: ModelPool, stain: bool, cache: Path, device: torch.device | str, progress: Progress
) -> Encoder:
    recipe = pool.recipe
    shown = network(recipe.arch, recipe.width)
    if name == "pool":
        longer = max(recipe.epochs or 0, POOL_EPOCHS)
        extra = pool.with_recipe(networks=recipe.networks + 1, epochs=longer)  # its last network is in no distillation
        number = recipe.networks
        title = f"{shown}, pool-trained: supervised, {longer} epochs on the training patches and their labels"
        facts = {"encoder": name, "pool": extra.key, "network": number}
        return Encoder(title, extra.load(number), pool.preprocessing, stain, facts)
    from histodd_bench.mil import simclr

    settings = simclr.SimCLRRecipe(arch=recipe.arch, width=recipe.width)
    trained, key = simclr.load(settings, pool.train, pool.preprocessing, cache=cache, device=device, progress=progress)
    title = f"{shown}, SimCLR: self-supervised, on the training patches"
    return Encoder(title, trained, pool.preprocessing, stain, {"encoder": name, "simclr": key})


def _hub_file(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def _cached(model: str) -> tuple[str, Path] | None:
    """The first of torchvision's weights for a model that lies in torch's cache: its name and its file."""
    from torchvision.models import get_model_weights

    for entry in get_model_weights(model):
        path = _hub_file(entry.url)
        if path.is_file():
            return entry.name, path
    return None


def _torchvision(model: str, weights: str | None) -> tuple[nn.Module, str, Any]:
    from torchvision.models import get_model, get_model_weights, list_models

    if model not in list_models():
        raise unknown_name("torchvision model", model, list_models())

    def bare() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return get_model(model, weights=None)

    if weights is None:
        found = _cached(model)
        if found is None:
            names = ", ".join(dict.fromkeys(_hub_file(w.url).name for w in get_model_weights(model)))
            raise HistoddError(
                f"no ImageNet weights of {model} in {_hub_file('')}: put {names} there, or name a file with --encoder-weights, "
                "or choose --encoder pool, or --encoder-weights random"
            )
        body = bare()
        _load(body, found[1])
        return body, f"ImageNet weights {found[0]}", {"file": sha256(found[1])}
    return _from(bare(), weights, model)


def _timm(model: str, weights: str | None) -> tuple[nn.Module, str, Any]:
    try:
        import timm
    except ImportError:
        raise HistoddError(f"--encoder timm:{model} needs the package timm: pip install timm") from None
    if not timm.is_model(model):
        raise unknown_name("timm model", model, timm.list_models())
    if weights is None:
        raise UsageError(f"--encoder timm:{model}: name its weights with --encoder-weights FILE (or random)")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        body = timm.create_model(model, pretrained=False, num_classes=0)
    return _from(body, weights, model)


def _from(body: nn.Module, weights: str, model: str) -> tuple[nn.Module, str, Any]:
    if weights == "random":
        return body, "random weights", {"random": 0, "torch": torch.__version__, "model": model}
    path = Path(weights)
    if not path.is_file():
        raise UsageError(f"--encoder-weights {weights}: no such file (or write 'random')")
    _load(body, path)
    return body, f"weights of {path.name}", {"file": sha256(path)}


def _load(body: nn.Module, path: Path) -> None:
    """Load a state dict; a classifier that the file or the model lacks is left as it is, nothing else."""
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state) if isinstance(state, dict) else {}
        head = {n for n in {*body.state_dict(), *state} if n.split(".")[0] in ("fc", "classifier", "head", "heads")}
        own = body.state_dict()
        state = {k: v for k, v in state.items() if k not in head or (k in own and own[k].shape == v.shape)}
        missing, unexpected = body.load_state_dict(state, strict=False)
    except Exception as error:  # torch raises a different type for every kind of damage or misfit
        raise HistoddError(f"{path} is no state dict for this encoder: {str(error).splitlines()[0]}") from error
    wrong = [n for n in [*missing, *unexpected] if n not in head]
    if wrong:
        raise HistoddError(f"{path} does not fit this encoder: {len(wrong)} tensors differ, {wrong[0]!r} among them")


def _without_head(body: nn.Module) -> nn.Module:
    """A classifier whose last linear layer passes its input."""
    last = [n for n, m in body.named_modules() if isinstance(m, nn.Linear)][-1:]
    if not last:
        raise UsageError("this torchvision model has no last linear layer: choose a classifier")
    parent, _, leaf = last[0].rpartition(".")
    setattr(body.get_submodule(parent), leaf, nn.Identity())
    return body


def extract(
    encoder: Encoder, patches: PatchSet, *, cache: Path, device: torch.device | str, progress: Progress, what: str
) -> Tensor:
    """Features ``[N,D]`` float32 of a set, from ``cache`` (HDF5) where they have been extracted before.

    A file that is missing, damaged, or holds NaN is made again, with a line that says so.

    Args:
        what: the set, in words, for the progress display.

    Raises:
        HistoddError: the encoder gives NaN or infinite features.
    """
    key = digest({"encoder": encoder.key, "patches": patches.fingerprint(), "device": torch.device(device).type})
    path = cache / f"{key[:32]}.h5"
    if path.exists():
        try:
            kept = read_features(path)
            if len(kept) == len(patches):
                return kept
        except HistoddError as error:
            progress.log(f"extracting features again: {error}")
    parts = []
    with progress.task(f"features of {what}", len(patches)) as task:
        for index in torch.arange(len(patches)).split(1024):
            some = patches.subset(index)
            parts.append(
                predict(encoder.network, some, encoder.preprocessing, stain=encoder.stain, features=True, device=device)
            )
            task.advance(len(index))
    features = torch.cat(parts) if parts else torch.zeros(0, 0)
    if not bool(torch.isfinite(features).all()):
        raise HistoddError(f"{encoder.title} gives NaN or infinite features for {what}: choose another --encoder")
    write_features(path, features, {"encoder": encoder.title, "patches": len(patches), "of": what})
    return features
