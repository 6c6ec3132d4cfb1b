"""Table 2 of the paper: which augmentation of the distillation helps, one operation at a time."""

from histodd_bench import paper
from histodd_bench.tables import accounting
from histodd_bench.tables.declaration import OPERATIONS, Column, Table

_AUGMENT = {
    "None": (),
    "Stain Norm": ("stain",),
    "Rotate": ("rotate",),
    "Flip": ("flip",),
    "Scale": ("scale",),
    "All": OPERATIONS,
}
_SAME, _ALL = "trained on it with the same", "trained on it with all"


def _eval(operations: tuple[str, ...]) -> dict[str, object]:
    stain = "stain" in operations
    augment = tuple(op for op in ("flip", "rotate", "scale") if op in operations)
    return {"augment": augment, "stain_train": float(stain), "stain_test": stain}


TABLE = Table(
    name="table2",
    title="Table 2: augmentation of the distillation",
    columns=tuple(
        Column(
            title,
            "histodd",
            {
                "histodd": {"augment": operations, "stain_probability": 1.0},
                "eval": _eval(OPERATIONS if row == _ALL else operations),
            },
            row,
        )
        for row in (_ALL, _SAME)
        for title, operations in _AUGMENT.items()
    ),
    metrics=accounting.QUALITY,
    ipc=(10,),
    options={name: {"stain": "on"} for name in ("quick", "standard", "paper")},
    paper=paper.TABLE2,
    paper_arch="ResNet18",
    remarks=(
        "Columns: operations of the Siamese augmentation, the same draw for the real and the synthetic batch. The paper does "
        f"not say how networks are then trained on the sets, so both are shown: '{_ALL}' operations for every column, which "
        f"isolates the distillation, and '{_SAME}' operations. Stain normalisation at test follows that of the training.",
        "The pool of networks is the same for every column.",
    ),
)
