"""What tests of prepared slides share: a small project prepared at 64 px, and what a prepared set holds."""

from pathlib import Path

from histodd_bench.data import slides, store
from histodd_bench.data.extract import Outcome
from histodd_bench.data.jobs import Tiling
from histodd_bench.data.prepared import prepare
from histodd_bench.progress import Progress

SMALL = Tiling(size=256, mpp=1.0)


def silent() -> Progress:
    return Progress.silent()


def prepared(root: Path, out: Path, size: int = 64, tiling: Tiling = SMALL, **options: object) -> Outcome:
    return prepare(slides.source(root, 0), tiling, size, out, progress=silent(), **options)  # type: ignore[arg-type]


def fingerprints(out: Path) -> list[str]:
    return [store.load(out / split).fingerprint() for split in ("train", "test")]
