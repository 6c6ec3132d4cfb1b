"""Figure 2 of the supplement: sensitivity to the outer loops K, the inner loops U and the image learning rate."""

from histodd_bench.tables import accounting
from histodd_bench.tables.declaration import Column, Plot, Table, Times

_FACTORS = {"outer_steps": (0.25, 0.5, 1, 2), "inner_steps": (0.25, 0.5, 1, 2), "image_lr": (0.1, 0.3, 1, 3, 10)}
_LABELS = {
    "outer_steps": "K = {outer_steps}",
    "inner_steps": "U = {inner_steps}",
    "image_lr": "image_lr = {image_lr:g}",
}

TABLE = Table(
    name="fig2",
    title="Figure 2: sensitivity to K, U and the image learning rate",
    columns=tuple(
        Column("Histo-DD", "histodd", {"histodd": {name: Times(factor)}}, _LABELS[name])
        for name, factors in _FACTORS.items()
        for factor in factors
    ),
    metrics=(*accounting.QUALITY, accounting.COSTS[4]),
    ipc=(10,),
    options={"quick": {"seeds": 2, "eval_seeds": 2}},
    remarks=(
        "One field is changed at a time, the others stay as the preset has them; the paper shows this figure as curves "
        "without numbers.",
    ),
    plots=(Plot("Accuracy", "label", "metrics.accuracy", log=True),),
)
