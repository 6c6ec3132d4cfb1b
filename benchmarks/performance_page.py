"""Writes docs/performance.md from the records under benchmarks/results/. No figure on that page is typed.

python benchmarks/performance_page.py            write it
python benchmarks/performance_page.py --check    exit code 1 if it is not what the records give
"""

import json
import sys
from pathlib import Path
from typing import Any

from histodd_bench.profile.report import markdown
from histodd_bench.wording import counted

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"

HEAD = """\
# Performance

How fast the operators and the distillation step are, beside what else computes the same. Written by
`python benchmarks/performance_page.py` from the records under `benchmarks/results/`, which `benchmarks/record_results.sh` made;
nothing here is typed. `python -m histodd_bench profile` measures your machine, `make bench` does with pytest-benchmark.

Times are milliseconds: median (20th to 80th percentile) of repeated calls, backends taking turns. Every backend was
compared with the float64 reference before it was timed. *plain* is a lean rewrite in PyTorch, *loop* the distance as
public distillation code has it. Packages: torchstain 1.4.1, stainx 0.1.6 (GPL; `pip install --no-build-isolation
stainx`), torch-staintools 1.0.7 (non-commercial licence; its parameter for the maximum concentration set to the 99th
percentile, like everyone's). GB/s counts every input and result once; *of copy* is beside a copy of 256 MiB in the same
run, and can exceed 100 % where data stay in a cache. On a GPU, *forward*, *backward* and *both* are what a user waits for,
launches and Python included; *on device* is the GPU's own clock between the first and the last kernel, and *of copy*
is by that. *memory* is what a call takes on top of its inputs: on a CPU the
growth of the resident set, tensors and working memory. *beside compiled* is how many times as long as the compiled
operator. On Linux a result beyond 32 MiB is new memory from the system at every call, whose first touch can take
longer than the arithmetic; that is so for every backend. Smaller results use freed memory again
(`environment.keep_freed_memory`); in a process that does not ask for that, every backend takes longer.
"""
NO_GPU = """\
**There are no GPU figures.** The CUDA kernels compile for sm_75 to sm_90 and have not been run on a GPU yet;
`benchmarks/gpu_check.sh` is what to run on one.
"""


def page(results: Path = RESULTS) -> str:
    """The page, from every record below ``results``; devices in alphabetical order."""
    records = [(path, json.loads(path.read_text())) for path in sorted(results.rglob("*.json"))]
    records = [(path, record) for path, record in records if "copy_bandwidth" in record]
    out = [HEAD]
    if not any(record["device_type"] == "cuda" for _, record in records):
        out.append(NO_GPU)
    for folder in sorted({path.parent for path, _ in records}):
        mine = [(path, record) for path, record in records if path.parent == folder]
        first = mine[0][1]
        device, instructions = first["environment"]["device"], first["environment"]["instruction_set"]
        out.append(f"## {device}\n" if first["device_type"] == "cuda" else f"## {device}, {instructions}\n")
        for path, record in mine:
            out.append(_section(path.relative_to(results.parent).as_posix(), record))
    return "\n".join(out).rstrip() + "\n"


def _section(name: str, record: dict[str, Any]) -> str:
    e = record["environment"]
    return (
        f"### {name}\n\n`{record['command']}`\n\n"
        f"{counted(e['threads'], 'thread')}, {e['instruction_set']}, torch {e['torch']}, Python {e['python']}, commit "
        f"{(e['commit'] or 'unknown')[:12]}; copy {record['copy_bandwidth'] / 1e9:.1f} GB/s; {record['images']} patches\n\n"
        + markdown(record)
    )


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.is_file() and PAGE.read_text() == text else f"{PAGE.name} is not what the records give")
    PAGE.write_text(text)
    print(PAGE)
