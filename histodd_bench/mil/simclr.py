"""SimCLR (Chen et al. 2020): an encoder trained on patches without their labels, as DSMIL uses one."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from histodd_bench.data.patchset import PatchSet
from histodd_bench.errors import HistoddError
from histodd_bench.files import digest, read_state, save_state
from histodd_bench.models import build
from histodd_bench.progress import Progress
from histodd_bench.stain import Preprocessing

VERSION = 1


@dataclass(frozen=True)
class SimCLRRecipe:
    """How the encoder is trained.

    Attributes:
        arch, width: a key of MODELS and its width; the features are the input of its last linear layer.
        epochs, batch_size: each batch has this many patches, two views of each.
        lr: of Adam.
        temperature: tau of eq. 1.
        smallest: side of the smallest crop, as a share of the patch.
        stain_jitter: each optical-density channel is scaled by a factor within 1 +- this.
    """

    arch: str
    width: int | None = None
    epochs: int = 10
    batch_size: int = 128
    lr: float = 1e-3
    temperature: float = 0.5
    smallest: float = 0.5
    stain_jitter: float = 0.4
    seed: int = 0


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Eq. 1 of the paper, mean over all 2N views: ``first`` and ``second`` are ``[N,D]`` projections of two views each."""
    z = F.normalize(torch.cat([first, second]), dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    n = len(first)
    partner = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(similarity, partner)


def random_views(n: int, recipe: SimCLRRecipe, generator: Generator) -> tuple[Tensor, Tensor]:
    """Parameters of one view of ``n`` patches: ``warp [n,2,3]`` (crop, turn, flip) and ``stain [n,3,4]`` (colour).

    A crop never leaves the patch.
    """
    u = torch.rand(n, 8, generator=generator)
    side = recipe.smallest + (1 - recipe.smallest) * u[:, 0]
    centre = (1 - side)[:, None] * (2 * u[:, 1:3] - 1)
    angle = (4 * u[:, 3]).floor() * math.pi / 2
    cos, sin = angle.cos().round(), angle.sin().round()
    mirror = torch.where(u[:, 4] < 0.5, -1.0, 1.0)
    turn = torch.stack([torch.stack([mirror * cos, -sin], 1), torch.stack([mirror * sin, cos], 1)], 1)
    warp = torch.cat([side[:, None, None] * turn, centre[:, :, None]], 2)
    jitter = 1 + recipe.stain_jitter * (2 * u[:, 5:8] - 1)
    return warp, torch.cat([torch.diag_embed(jitter), torch.zeros(n, 3, 1)], 2)


def load(
    recipe: SimCLRRecipe,
    train: PatchSet,
    preprocessing: Preprocessing,
    *,
    cache: Path,
    device: torch.device | str,
    progress: Progress,
) -> tuple[nn.Module, str]:
    """The trained encoder in evaluation mode and its key; trained on first use, then read from ``cache``.

    Raises:
        HistoddError: fewer than two patches, or training diverged.
    """
    device = torch.device(device)
    key = digest(
        {
            "version": VERSION,
            "recipe": dataclasses.asdict(recipe),
            "train": train.fingerprint(),
            "torch": torch.__version__,
            "device": device.type,
            "threads": torch.get_num_threads(),
        }
    )
    size = train.image_size[0]
    network = build(recipe.arch, num_classes=max(train.num_classes, 2), image_size=size, width=recipe.width,
                    generator_seed=recipe.seed)  # fmt: skip
    path = cache / f"simclr-{key[:32]}.pt"
    if not path.exists():
        save_state(path, {"model": _train(network, recipe, train, preprocessing, device, progress).state_dict()})
    network.load_state_dict(read_state(path)["model"])
    return network.to(device).eval(), key


def _train(
    network: nn.Module,
    recipe: SimCLRRecipe,
    train: PatchSet,
    preprocessing: Preprocessing,
    device: torch.device,
    progress: Progress,
) -> nn.Module:
    if len(train) < 2:
        raise HistoddError("SimCLR compares patches: it needs at least two")
    network = network.to(device).train()
    width: int = network.classifier.in_features  # type: ignore[assignment, union-attr]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128)).to(device)
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=recipe.lr)
    generator = Generator().manual_seed(recipe.seed)
    with progress.task("training the SimCLR encoder", recipe.epochs) as task:
        for _ in range(recipe.epochs):
            losses = []
            for index in torch.randperm(len(train), generator=generator).split(recipe.batch_size):
                if len(index) < 2:
                    continue
                images, projections = train.images[index].to(device), []
                for _ in range(2):
                    warp, stain = random_views(len(index), recipe, generator)
                    valid = torch.ones(len(index), dtype=torch.bool)
                    x = preprocessing(images, warp=warp.to(device), stain=stain, valid=valid)
                    projections.append(head(network.features(x)))  # type: ignore[operator]
                loss = nt_xent(projections[0], projections[1], recipe.temperature)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            mean = float(torch.stack(losses).mean())
            if not math.isfinite(mean):
                raise HistoddError("training the SimCLR encoder diverged")
            task.advance(loss=mean)
    return network
