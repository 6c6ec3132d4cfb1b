"""Table 1 of the paper: distilled patches against coresets and the whole training set."""

from histodd_bench import paper
from histodd_bench.tables import accounting
from histodd_bench.tables.declaration import Column, Table

COLUMNS = (
    Column("Random", "random"),
    Column("Herding", "herding"),
    Column("Forgetting", "forgetting"),
    Column("Histo-DD", "histodd"),
    Column("Full", "full"),
)

TABLE = Table(
    name="table1",
    title="Table 1: patch classification, Histo-DD against coresets",
    columns=COLUMNS,
    metrics=accounting.ALL,
    paper=paper.TABLE1,
    paper_ratio=paper.TABLE1_RATIO,
    paper_arch="ResNet18",
    plots=accounting.PLOTS,
)
