"""Table 1 of the supplement: patches and slides of each data set. Nothing is trained."""

from histodd_bench import paper
from histodd_bench.tables.declaration import Table

TABLE = Table(
    name="supp1",
    title="Supplement, Table 1: patches and slides",
    columns=(),
    metrics=(),
    kind="statistics",
    paper=paper.SUPP1,
    remarks=("A slide is what splits never divide: a slide, a patient, or a single file where neither is known.",),
)
