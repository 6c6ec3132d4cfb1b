"""Table 3 of the paper: sets distilled on one network train others; how good they get and how long an epoch takes."""

from histodd_bench import paper
from histodd_bench.tables import accounting
from histodd_bench.tables.declaration import Table
from histodd_bench.tables.table1 import COLUMNS as TABLE1

COLUMNS = tuple(c for c in TABLE1 if c.method != "forgetting")  # far the weakest with few patches

TABLE = Table(
    name="table3",
    title="Table 3: other architectures than the distilling one",
    columns=tuple(sorted(COLUMNS, key=lambda c: c.method != "histodd")),
    metrics=(*accounting.QUALITY, accounting.EPOCH, *accounting.COSTS[1:3]),
    across="archs",
    options={
        "quick": {
            "archs": ("convnet-d3", "resnetap10:8", "resnet18:8", "densenet121:4", "vit:32"),
            "ipc": (10,),  # DenseNet121 on the whole set takes most of the time
            "seeds": 2,
            "eval_seeds": 1,
        },
        "standard": {"archs": ("convnet-d3", "resnetap10", "resnet18", "densenet121", "vit")},
        "paper": {"archs": ("resnet18", "densenet121", "vit", "convnet-d3", "resnetap10")},
    },
    paper_archs=paper.TABLE3,
    paper_ratio=paper.TABLE3_RATIO,
    remarks=(
        "(xN) = N times less than an epoch on the whole set. A step has a fixed cost whatever the number of patches in it, so "
        "the factor stays below the ratio of set sizes for sets smaller than a batch.",
    ),
    plots=accounting.PLOTS[2:],
)
