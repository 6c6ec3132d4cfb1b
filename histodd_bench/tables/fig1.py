"""Figure 1 of the paper: distilled patches as pictures (in the report), and accuracy against their number."""

from histodd_bench import paper
from histodd_bench.tables import accounting
from histodd_bench.tables.declaration import Table
from histodd_bench.tables.table1 import COLUMNS

TABLE = Table(
    name="fig1",
    title="Figure 1: accuracy against images per class",
    columns=COLUMNS,
    metrics=(accounting.ACCURACY, accounting.OUTER_STEPS, *accounting.QUALITY[1:]),
    ipc=(10, 20, 50, 100),
    options={"quick": {"seeds": 2, "eval_seeds": 2}},
    paper=paper.FIG1,
    paper_arch="ResNet18",
    remarks=(
        "Part (a), the distilled patches before and after, are the contact sheets of the report (and sheets/*.png). The paper "
        "prints the numbers of its curve for 100 images per class; those of 10, 20 and 50 are its Table 1's.",
    ),
    plots=accounting.PLOTS[:1],
)
