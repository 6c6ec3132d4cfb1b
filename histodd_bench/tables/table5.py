"""Table 5 of the paper: a model of one centre, fine-tuned with what another centre shares: distilled patches, or everything."""

from typing import Any

from histodd_bench.paper import Printed
from histodd_bench.tables.declaration import Column, Metric
from histodd_bench.tables.slide_level import OPTIONS, SlideTable

# Source centre (C1 = Radboud, C2 = Utrecht; the target is the other), images per class; then for ResNet18 on patches and CLAM on
# slides: accuracy (mean, sd), epochs, seconds per epoch, storage. Camelyon16.
_ROWS: tuple[tuple[Any, ...], ...] = (
    ("C1", 10, "94.5 0.5", "5", "0.23", "1e-3 GB", "94.2 1.2", "5", "1.8", "0.20 GB"),
    ("C1", 20, "95.7 0.4", "5", "0.38", "2e-3 GB", "94.5 1.2", "5", "1.9", "0.37 GB"),
    ("C1", 50, "96.8 0.2", "5", "1.04", "6e-3 GB", "95.8 0.6", "5", "2.1", "0.93 GB"),
    ("C1", None, "97.8 0.2", "5", "1640", "5.12 GB", "97.0 0.6", "10", "2.8", "5.12 GB"),
    ("C2", 10, "94.3 0.1", "5", "0.23", "1e-3 GB", "95.9 0.1", "5", "1.5", "0.13 GB"),
    ("C2", 20, "95.3 0.5", "5", "0.38", "2e-3 GB", "96.8 0.6", "5", "1.6", "0.25 GB"),
    ("C2", 50, "96.4 0.2", "5", "1.04", "6e-3 GB", "97.5 0.4", "5", "1.9", "0.64 GB"),
    ("C2", None, "98.1 0.1", "5", "1596", "11.63 GB", "97.0 0.0", "10", "3.6", "11.63 GB"),
)
_COLUMNS = ("patch", "slide")

TABLE = SlideTable(
    name="table5",
    title="Table 5: transfer between centres",
    runner="histodd_bench.mil.table5",
    layout="histodd_bench.mil.layout_transfer:table5_grids",
    columns=(
        Column("Histo-DD", "histodd"),
        Column("Random", "random"),
        Column("Herding", "herding"),
        Column("Full", "full"),
    ),
    models=("clam-sb",),
    # Chosen on training slides, see docs/slide_level.md. `paper` has the paper's own fields.
    options={preset: {**options, "stain": "on"} for preset, options in OPTIONS.items()},
    fields={
        preset: {"histodd": {"networks": "pool"}, "pool": {"epochs": 10}, "transfer": {"rehearsal": True}}
        for preset in ("quick", "standard")
    },
    metrics=(
        Metric("Accuracy %", "metrics.accuracy", scale=100, best=True),
        Metric("Balanced accuracy %", "metrics.balanced_accuracy", scale=100, best=True),
        Metric("Macro AUC %", "metrics.auc", scale=100, best=True),
        Metric("Epochs", "metrics.epochs", digits=0, spread=False),
        Metric("Fine-tuning time per epoch, s", "metrics.epoch_seconds", digits=3, times=True, spread=False),
        Metric("Patches shared", "storage.count", digits=0, spread=False),
        Metric("Raw uint8 pixels, KiB", "storage.raw_uint8_bytes", scale=1 / 1024, digits=1, times=True, spread=False),
        Metric("On disk (lossless, with labels), KiB", "storage.disk_bytes", scale=1 / 1024, digits=1, spread=False),
    ),
    paper_accuracy={
        (row[0], row[1], name): Printed(*row[2 + 4 * i].split()) for row in _ROWS for i, name in enumerate(_COLUMNS)
    },
    paper_seconds={(row[0], row[1], name): row[4 + 4 * i] for row in _ROWS for i, name in enumerate(_COLUMNS)},
    paper_storage={(row[0], row[1], name): row[5 + 4 * i] for row in _ROWS for i, name in enumerate(_COLUMNS)},
    paper_epochs={(row[0], row[1], name): row[3 + 4 * i] for row in _ROWS for i, name in enumerate(_COLUMNS)},
)
