"""Records of ``profile`` as tables: for the terminal, and as Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from histodd_bench.profile.problems import COMPILED
from histodd_bench.wording import counted

HEADER = ("backend", "forward", "backward", "both", "GB/s", "of copy", "memory", "beside compiled")
GPU_HEADER = (
    "backend", "forward", "backward", "both", "forward on device", "backward on device", "forward of copy",
    "backward of copy", "memory", "beside compiled",
)  # fmt: skip
_STEP_HEADER = ("part", "compiled", "reference", "reference / compiled")


def groups(record: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Measurements by (operator, problem), in the order in which they were made."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in record["measurements"]:
        found.setdefault((row["operator"], row["problem"]), []).append(row)
    return found


def seconds_of(row: dict[str, Any], part: str) -> float | None:
    """Median seconds of a part, or None where it was not measured."""
    return float(row[part]["median"]) if part in row else None


def best_peer(rows: Sequence[dict[str, Any]], part: str) -> tuple[str, float] | None:
    """The fastest backend that is not ours and its seconds; None where there is none."""
    peers = [
        (row["backend"], t) for row in rows if not row["backend"].startswith(COMPILED) and (t := seconds_of(row, part))
    ]
    return min(peers, key=lambda p: p[1]) if peers else None


def verdict(rows: Sequence[dict[str, Any]]) -> list[str]:
    """``forward: 4.1 x as fast as the fastest other backend here (torch.compile)``, one per part that can be compared."""
    ours = next((row for row in rows if row["backend"] == COMPILED), {})
    lines = []
    for part in ("forward", "both"):
        mine, peer = seconds_of(ours, part), best_peer(rows, part)
        if mine and peer:
            name = "forward and backward" if part == "both" else part
            lines.append(f"{name}: {peer[1] / mine:.2f} x as fast as the fastest other backend here ({peer[0]})")
    return lines


def milliseconds(times: dict[str, Any], short: bool = False) -> str:
    """``0.69 (0.68-0.71)``: median, 20th and 80th percentile in milliseconds; only the median if ``short``."""
    low, middle, high = (1e3 * times[k] for k in ("p20", "median", "p80"))
    digits = 3 if middle < 1 else 2 if middle < 100 else 0
    if short:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def cells(row: dict[str, Any], compiled: dict[str, Any], copy: float, short: bool = False) -> list[str]:
    """One line of a table, columns as in :data:`HEADER`, or :data:`GPU_HEADER` where the device's own clock was read."""
    on_device = "device" in compiled.get("forward", row.get("forward", {}))
    if "failed" in row:
        return [row["backend"], row["failed"], *[""] * (len(GPU_HEADER if on_device else HEADER) - 2)]
    whole = "both" if "both" in row else "forward"
    peak, mine = row.get("peak_bytes"), seconds_of(compiled, whole)
    parts = ("forward", "backward")
    speed = row[whole]["bandwidth"]
    if on_device:
        rates = [milliseconds(row[part]["device"], short) if part in row else "" for part in parts]
        rates += [f"{100 * row[part]['bandwidth'] / copy:.0f} %" if part in row else "" for part in parts]
    else:
        rates = [f"{speed / 1e9:.1f}", f"{100 * speed / copy:.0f} %"]
    return [
        row["backend"],
        *(milliseconds(row[part], short) if part in row else "" for part in (*parts, "both")),
        *rates,
        "" if peak is None else f"{peak / 2**20:.1f} MiB",
        f"{row[whole]['median'] / mine:.2f} x" if mine else "",
    ]


def tables(
    record: dict[str, Any], short: bool = False
) -> Iterable[tuple[str, Sequence[str], list[list[str]], list[str]]]:
    """Title, header, lines and notes of every table of a record; without the spread of times if ``short``."""
    for (operator, problem), rows in groups(record).items():
        compiled = next((row for row in rows if row["backend"] == COMPILED), {})
        lines = [cells(row, compiled, record["copy_bandwidth"], short) for row in rows]
        on_device = any("device" in row.get("forward", {}) for row in rows)
        yield f"{operator}: {problem}", GPU_HEADER if on_device else HEADER, lines, verdict(rows)
    if "step" in record:
        yield step_table(record["step"], short)


def step_table(step: dict[str, Any], short: bool = False) -> tuple[str, Sequence[str], list[list[str]], list[str]]:
    """The distillation step taken apart."""
    s, lines = step["settings"], []
    ours, theirs = step["parts"]["compiled"], step["parts"]["reference"]
    named = [*((part, ours[part], theirs[part]) for part in ours)]
    named += [(f"all of the {k}", step[k]["compiled"], step[k]["reference"]) for k in ("augmentation",)]
    named += [("whole step", step["total"]["compiled"], step["total"]["reference"])]
    for part, a, b in named:
        lines.append([part, milliseconds(a, short), milliseconds(b, short), f"{b['median'] / a['median']:.1f} x"])
    shares = step["augmentation_share"]
    notes = [
        f"share of the augmentation: {100 * shares['compiled']:.2f} % compiled, {100 * shares['reference']:.2f} % with "
        f"the references, {shares['reference'] / shares['compiled']:.1f} x less"
    ]
    title = (
        f"distillation step: {s['network']} {s['width']} wide, {s['side']} px, {s['classes']} classes, real batch "
        f"{s['real_batch']}, {s['ipc']} per class"
    )
    return title, _STEP_HEADER, lines, notes


def show(record: dict[str, Any]) -> None:
    """Print a record on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    short = console.width < 120
    environment = record["environment"]
    console.print(
        f"{environment['device']}, {counted(environment['threads'], 'thread')}, {environment['instruction_set']}, "
        f"torch {environment['torch']}; copy {record['copy_bandwidth'] / 1e9:.1f} GB/s; {record['images']} patches; "
        f"milliseconds: median{'' if short else ' (20th-80th percentile)'}",
        markup=False, highlight=False,
    )  # fmt: skip
    for title, header, lines, notes in tables(record, short):
        table = Table(title=title, title_justify="left", title_style="bold", header_style="", show_edge=False)
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
        for line in lines:
            table.add_row(*line)
        console.print()
        console.print(table)
        for note in notes:
            console.print(note, markup=False, highlight=False)


def markdown(record: dict[str, Any]) -> str:
    """The tables of a record in Markdown."""
    out = []
    for title, header, lines, notes in tables(record):
        out += [f"**{title}**", "", f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
        out += [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]
        out += ["", *(f"{note}  " for note in notes), ""]
    return "\n".join(out)
