"""Table 2 of the supplement: stain normalisation as pre-processing or inside the distillation, with and without at test."""

from histodd_bench import paper
from histodd_bench.tables import accounting
from histodd_bench.tables.declaration import OPERATIONS, Column, Fields, Table

_GEOMETRY = tuple(op for op in OPERATIONS if op != "stain")
_LOOP: Fields = {"histodd": {"augment": OPERATIONS, "stain_probability": 1.0}, "pool": {"stain_train": 1.0}}
_PRE: Fields = {"histodd": {"augment": _GEOMETRY}, "pool": {"stain_train": 0.0}, "data": {"stain_pre": True}}
_NONE: Fields = {"histodd": {"augment": _GEOMETRY}, "pool": {"stain_train": 0.0}}
_WITH, _WITHOUT = {"stain_train": 1.0, "stain_test": True}, {"stain_train": 0.0, "stain_test": False}

TABLE = Table(
    name="supp2",
    title="Supplement, Table 2: stain normalisation before or inside the distillation",
    columns=(
        Column("SN-DSA, SN at test", "histodd", {**_LOOP, "eval": _WITH}),
        Column("SN-DSA", "histodd", {**_LOOP, "eval": _WITHOUT}),
        Column("SN-Pre, SN at test", "histodd", {**_PRE, "eval": _WITH}),
        Column("SN-Pre", "histodd", {**_PRE, "eval": _WITHOUT}),
        Column("none, SN at test", "histodd", {**_NONE, "eval": _WITH}),
        Column("none", "histodd", {**_NONE, "eval": _WITHOUT}),
    ),
    metrics=accounting.QUALITY,
    ipc=(10,),
    options={"quick": {"seeds": 2, "eval_seeds": 2}},
    paper=paper.SUPP2,
    paper_arch="ResNet18",
    remarks=(
        "SN-DSA: stain normalisation inside the distillation, as one operation of the Siamese augmentation. SN-Pre: the "
        "training patches are normalised beforehand, and the distillation does not normalise. none: neither; not in the paper.",
        "SN at test: patches are normalised when a network is trained on the set and when it is scored; else in neither.",
    ),
)
