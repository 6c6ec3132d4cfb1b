"""Table 4 of the paper: slide classification, MIL on bags of a few patches per slide against bags of all patches."""

from typing import Any

from histodd_bench.paper import Printed
from histodd_bench.tables.declaration import Column, Metric
from histodd_bench.tables.slide_level import SlideTable

# Data set, images per class, storage in GB, then accuracy (mean, sd) and seconds per epoch of CLAM, DSMIL and TransMIL.
_ROWS: tuple[tuple[Any, ...], ...] = (
    ("tcga-idh", 10, "0.9", "79.3 0.7", "6.3 (x1.4)", "78.6 0.5", "10.6 (x1.14)", "75.8 1.3", "22.0 (x1.07)"),
    ("tcga-idh", 20, "1.7", "80.4 0.5", "6.5 (x1.3)", "80.7 0.5", "10.8 (x1.12)", "77.1 1.6", "22.1 (x1.06)"),
    ("tcga-idh", 50, "4.1", "82.6 0.1", "8.1 (x1.1)", "83.3 0.5", "11.1 (x1.09)", "79.0 0.3", "23.0 (x1.03)"),
    ("tcga-idh", None, "4.9", "84.8 0.7", "9.0", "85.8 0.1", "12.1", "80.0 0.1", "23.5"),
    ("camelyon16", 10, "0.32", "84.1 0.4", "3.1 (x1.7)", "84.9 0.4", "4.7 (x1.6)", "81.5 0.3", "8.4 (x1.6)"),
    ("camelyon16", 20, "0.62", "84.6 0.9", "3.5 (x1.5)", "85.4 0.7", "5.1 (x1.4)", "82.5 0.4", "8.6 (x1.6)"),
    ("camelyon16", 50, "1.6", "86.7 0.7", "4.2 (x1.2)", "87.5 0.6", "5.9 (x1.2)", "83.8 0.8", "8.9 (x1.6)"),
    ("camelyon16", None, "16.75", "88.9 0.4", "5.8", "89.8 0.9", "7.3", "85.3 0.3", "13.8"),
    ("unitopatho-dg", 10, "0.22", "61.6 0.3", "1.82 (x1.10)", "62.1 1.1", "4.68 (x1.04)", "54.2 1.4", "5.55 (x1.05)"),
    ("unitopatho-dg", 20, "0.43", "64.4 1.4", "1.83 (x1.10)", "66.3 1.9", "4.74 (x1.03)", "59.1 1.9", "5.61 (x1.04)"),
    ("unitopatho-dg", 50, "1.04", "67.1 0.9", "1.89 (x1.06)", "68.9 1.9", "4.77 (x1.02)", "61.4 0.9", "5.68 (x1.02)"),
    ("unitopatho-dg", None, "28.66", "68.8 0.9", "2.01", "70.3 1.3", "4.86", "62.9 0.3", "5.82"),
    ("unitopatho-pt", 10, "0.71", "83.4 0.7", "2.22 (x1.2)", "82.8 1.2", "4.74 (x1.10)", "80.5 1.3", "6.72 (x1.04)"),
    ("unitopatho-pt", 20, "0.82", "84.8 0.7", "2.26 (x1.2)", "84.1 0.1", "4.76 (x1.09)", "81.9 0.7", "6.75 (x1.04)"),
    ("unitopatho-pt", 50, "2.45", "87.1 1.2", "2.40 (x1.1)", "87.5 2.0", "4.92 (x1.06)", "83.4 0.7", "6.82 (x1.03)"),
    ("unitopatho-pt", None, "34.60", "90.0 0.9", "2.68", "91.0 0.7", "5.20", "84.7 1.2", "7.01"),
)
_MODELS = ("clam-sb", "dsmil", "transmil")  # the paper does not say which CLAM

TABLE = SlideTable(
    name="table4",
    title="Table 4: slide classification with multiple instance learning",
    runner="histodd_bench.mil.table4",
    layout="histodd_bench.mil.layout:table4_grids",
    columns=(
        Column("Histo-DD", "histodd"),
        Column("Random", "random"),
        Column("Herding", "herding"),
        Column("Full", "full"),
    ),
    models=("clam-sb", "clam-mb", "dsmil", "transmil", "abmil"),
    metrics=(
        Metric("Accuracy %", "metrics.accuracy", scale=100, best=True),
        Metric("Balanced accuracy %", "metrics.balanced_accuracy", scale=100, best=True),
        Metric("Macro AUC %", "metrics.auc", scale=100, best=True),
        Metric("Training time per epoch, s", "metrics.epoch_seconds", digits=3, times=True, spread=False),
        Metric("Patches in all bags", "storage.count", digits=0, spread=False),
        Metric("Raw uint8 pixels, KiB", "storage.raw_uint8_bytes", scale=1 / 1024, digits=1, times=True, spread=False),
        Metric("On disk (lossless, with labels), KiB", "storage.disk_bytes", scale=1 / 1024, digits=1, spread=False),
        Metric("Selection / distillation time per slide, s", "seconds.per_slide", digits=2, spread=False),
    ),
    paper_accuracy={
        (row[0], row[1], model): Printed(*row[3 + 2 * i].split()) for row in _ROWS for i, model in enumerate(_MODELS)
    },
    paper_seconds={(row[0], row[1], model): row[4 + 2 * i] for row in _ROWS for i, model in enumerate(_MODELS)},
    paper_storage={(row[0], row[1], _MODELS[0]): f"{row[2]} GB" for row in _ROWS},
)
