"""How stains are handled by every method of a run: said by the user, or decided on training slides alone."""

import dataclasses
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from histodd_bench import presets, tuning
from histodd_bench.training import EvalRecipe

if TYPE_CHECKING:
    from histodd_bench.experiment import Experiment


@dataclass(frozen=True)
class StainPolicy:
    """How stains are handled, by every method alike.

    Attributes:
        train: probability that a training patch (and a draw of the Siamese augmentation) is normalised to the template.
        test: whether patches are normalised when a network is scored.
        chosen: how this was decided, in words.
        scores: what decided it, by policy; empty when the user did.
    """

    train: float
    test: bool
    chosen: str = "set on the command line"
    scores: dict[str, float] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """As it stands in records."""
        return dataclasses.asdict(self)


STAIN_POLICIES = {"off": (0.0, False), "half": (0.5, False), "on": (1.0, True)}


def resolve_stain(experiment: "Experiment") -> StainPolicy:
    """The stain policy that ``--stain``, ``--set`` or the preset names; ``auto`` is decided on training slides only.

    The decision uses the preset's first network and number of images per class, not those asked for: a part of a table
    has the policy of the whole table.
    """
    request = experiment.request
    fields = request.overrides.get("eval", {})
    if {"stain_train", "stain_test"} <= fields.keys():
        return StainPolicy(
            fields["stain_train"], fields["stain_test"], chosen="--set eval.stain_train, eval.stain_test"
        )
    if request.stain != "auto":
        policy = StainPolicy(*STAIN_POLICIES[request.stain], chosen=f"--stain {request.stain}")
    else:
        arch, width = presets.parse_arch(request.preset.archs[0], request.preset.widths)
        choice = tuning.choose_stain(
            experiment.dataset.train,
            STAIN_POLICIES,
            ipc=request.preset.ipc[0],
            arch=arch,
            width=width,
            recipe=replace(presets.build(EvalRecipe, request.preset.eval, fields), min_steps=0),  # enough to compare
            preprocessing=experiment.preprocessing,
            device=experiment.device,
            cache=request.cache / "choices",
            progress=experiment.progress,
        )
        rule = f"off unless another leads by two standard errors over {choice.n} splits"
        chosen = f"auto: chosen on training slides only, {rule}; balanced accuracy of {arch}"
        policy = StainPolicy(*STAIN_POLICIES[choice.name], chosen=chosen, scores=choice.scores)
    named = {name.removeprefix("stain_"): fields[name] for name in ("stain_train", "stain_test") if name in fields}
    return dataclasses.replace(policy, **named)
