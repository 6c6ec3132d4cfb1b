"""Table 1 of the paper: distilled patches against coresets and the whole training set."""

from histodd_bench import paper
from histodd_bench.tables.declaration import Column, Metric, Table

TABLE = Table(
    name="table1",
    title="Table 1: patch classification, Histo-DD against coresets",
    columns=(
        Column("Random", "random"),
        Column("Herding", "herding"),
        Column("Forgetting", "forgetting"),
        Column("Histo-DD", "histodd"),
        Column("Full", "full"),
    ),
    metrics=(
        Metric("Accuracy %", "metrics.accuracy", scale=100, best=True),
        Metric("Balanced accuracy %", "metrics.balanced_accuracy", scale=100, best=True),
        Metric("Macro AUC %", "metrics.auc", scale=100, best=True),
        Metric("Training time per epoch, s", "metrics.epoch_seconds", digits=3, times=True, spread=False),
        Metric("Selection / distillation time, s", "seconds.method", digits=1, spread=False),
        Metric("Training of the networks that used, s", "seconds.networks", digits=1, spread=False),
        Metric("Patches", "storage.count", digits=0, spread=False),
        Metric("Raw uint8 pixels, KiB", "storage.raw_uint8_bytes", scale=1 / 1024, digits=1, times=True, spread=False),
        Metric("On disk (lossless, with labels), KiB", "storage.disk_bytes", scale=1 / 1024, digits=1, spread=False),
    ),
    paper=paper.TABLE1,
    paper_ratio=paper.TABLE1_RATIO,
    paper_arch="ResNet18",
)
