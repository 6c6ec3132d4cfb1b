"""Grids as text: rich, Markdown, LaTeX (booktabs), CSV and JSON."""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Sequence

from histodd_bench.grid import Cell, Grid, Interval, Value, labelled
from histodd_bench.results import Record, finite

DASH = "-"  # a cell that has not been computed


def number(cell: Cell, *, plus_minus: str = " ± ", times: str = "x") -> str:
    """A cell as plain text: ``77.2 ± 1.1 (9)``; the paper's numbers exactly as printed."""
    if cell is None:
        return DASH
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Interval):
        if math.isnan(cell.low):
            return f"{cell.value:+.1f} to {cell.against}"
        return f"{cell.value:+.1f} [{cell.low:+.1f}, {cell.high:+.1f}] to {cell.against}"
    if cell.printed is not None:
        return f"{cell.printed.mean}{plus_minus}{cell.printed.sd}" if cell.printed.sd else cell.printed.mean
    if math.isnan(cell.mean):
        return DASH
    text = f"{cell.mean:.{cell.metric.digits}f}"
    if cell.metric.spread:
        text += f"{plus_minus}{cell.sd:.{cell.metric.digits}f}" if not math.isnan(cell.sd) else ""
        text += f" ({cell.n})"
    if cell.times is not None and cell.times >= 1.5:
        text += f" ({times}{cell.times:.0f})"
    return text


def heads(grid: Grid) -> list[str]:
    """Headings: block, label and budget columns as far as the grid has them, then its own columns."""
    blocks = ["", *([grid.head] if grid.head else [])] if grid.budgets else [grid.head]
    return [*blocks, *(["Img/Cls", "Ratio %"] if grid.budgets else []), *grid.columns]


def lead(grid: Grid, i: int) -> list[str]:
    """The first columns of a row; a block's title, and a label, stand on their first row only."""
    row, before = grid.rows[i], grid.rows[i - 1] if i else None
    new = before is None or before.block != row.block
    block = "paper" if row.source == "paper" else (row.block if new else "")
    label = row.label if new or before is None or before.label != row.label else ""
    if not grid.budgets:
        return ["paper" if row.source == "paper" else label]
    return [block, *([label] if grid.head else []), row.ipc, row.ratio]


def rich(grids: Sequence[Grid], *, width: int | None = None, colour: bool = False) -> str:
    """For a terminal; ``width`` in characters, as wide as needed by default."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    stream = io.StringIO()
    console = Console(file=stream, width=width or 400, force_terminal=colour, color_system="auto" if colour else None)
    for grid in grids:
        table = Table(title=Text(grid.title), title_justify="left")
        for i, head in enumerate(heads(grid)):
            table.add_column(Text(head), justify="left" if i == 0 or head == grid.head else "right")
        for i, row in enumerate(grid.rows):
            style = "dim" if row.source == "paper" else ""
            cells = [Text(number(c), style="bold" if isinstance(c, Value) and c.best else style) for c in row.cells]
            last = i + 1 == len(grid.rows) or grid.rows[i + 1].block != row.block
            table.add_row(*[Text(t, style=style) for t in lead(grid, i)], *cells, end_section=last)
        console.print(table)
        for note in grid.notes:
            console.print(Text("  " + note), soft_wrap=width is None)
        console.print()
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def safe(text: str) -> str:
    """Text with every character Markdown or HTML would act on escaped, on one line."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|*_`\[\]])", r"\\\1", text).replace("\n", " ")


def markdown(grids: Sequence[Grid]) -> str:
    """GitHub-flavoured tables, notes below each."""

    parts = []
    for grid in grids:
        lines = [f"### {safe(grid.title)}", ""]
        lines.append("| " + " | ".join(safe(h) for h in heads(grid)) + " |")
        texts = 2 if grid.head and grid.budgets else 1
        lines.append("|" + "|".join([":--"] * texts + ["--:"] * (len(heads(grid)) - texts)) + "|")
        for i, row in enumerate(grid.rows):
            start = [safe(t) for t in lead(grid, i)]
            start[0] = "*paper*" if row.source == "paper" else start[0]
            cells = []
            for cell in row.cells:
                text = safe(number(cell))
                bold = isinstance(cell, Value) and cell.best
                cells.append(f"**{text}**" if bold else f"*{text}*" if row.source == "paper" and text else text)
            lines.append("| " + " | ".join(start + cells) + " |")
        lines += ["", *[f"- {safe(note)}" for note in grid.notes], ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{c: "\\" + c for c in "&%$#_"},
    "±": r"$\pm$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def tex(text: str) -> str:
    """Text with every character LaTeX would act on escaped."""
    return "".join(_LATEX.get(c, c) for c in text.replace("\n", " "))


def latex(grids: Sequence[Grid]) -> str:
    """Tables for LaTeX; the preamble needs ``\\usepackage{booktabs}``."""
    parts = ["% needs \\usepackage{booktabs}"]
    for grid in grids:
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{tex(grid.title)}.}}"]
        texts = 2 if grid.head and grid.budgets else 1
        lines += [rf"\begin{{tabular}}{{{'l' * texts}{'r' * (len(heads(grid)) - texts)}}}", r"\toprule"]
        lines += [" & ".join(tex(h) for h in heads(grid)) + r" \\", r"\midrule"]
        for i, row in enumerate(grid.rows):
            if i and grid.rows[i - 1].block != row.block:
                lines.append(r"\midrule")
            cells = []
            for cell in row.cells:
                text = tex(number(cell)) if cell is not None else "--"
                bold = isinstance(cell, Value) and cell.best
                cells.append(
                    rf"\textbf{{{text}}}" if bold else rf"\textit{{{text}}}" if row.source == "paper" and text else text
                )
            lines.append(" & ".join([*map(tex, lead(grid, i)), *cells]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", ""]
        lines += [rf"{{\footnotesize {tex(note)}\par}}" for note in grid.notes]
        parts.append("\n".join([*lines, r"\end{table}", ""]))
    return "\n".join(parts)


CSV_COLUMNS = (
    "dataset", "network", "metric", "ipc", "ratio_percent", "column", "source", "mean", "sd", "n", "row", "low", "high",
    "configuration",
)  # fmt: skip


def as_csv(grids: Sequence[Grid]) -> str:
    """One line per number, with full precision: missing cells have empty numbers and n = 0.

    The last column tells tables apart that have the same data set, network and columns, as their titles do.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for grid in grids:
        for row in grid.rows:
            for title, cell in zip(grid.columns, row.cells, strict=True):
                if isinstance(cell, str):
                    continue
                whole = title == "Full"
                budget = ["" if whole else row.ipc, "" if whole else row.ratio]
                head = [labelled(grid.dataset, grid.procedural), grid.arch, row.block, *budget, title, row.source]
                numbers: list[object] = ["", "", 0, "", ""]
                if isinstance(cell, Interval):
                    ends = ["" if math.isnan(v) else repr(v) for v in (cell.low, cell.high)]
                    numbers = [repr(cell.value), "", "", *ends]
                elif cell is not None and cell.printed is not None:
                    numbers = [cell.printed.mean, cell.printed.sd, "", "", ""]
                elif cell is not None:
                    numbers = [repr(cell.mean), "" if math.isnan(cell.sd) else repr(cell.sd), cell.n, "", ""]
                writer.writerow([*map(plain, head), *numbers[:3], plain(row.label), *numbers[3:], plain(grid.configuration)])
    return stream.getvalue()


def plain(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    return "'" + text if text[:1] in ("=", "+", "-", "@") else text


def as_json(records: Sequence[Record], *, predictions: bool = False) -> str:
    """The records themselves, without the packed predictions unless asked for."""
    kept = [{k: v for k, v in r.items() if k != "predictions" or predictions} for r in records]
    return json.dumps(finite(kept), indent=1, allow_nan=False) + "\n"


FORMATS: dict[str, Callable[[Sequence[Grid]], str]] = {
    "rich": rich,
    "markdown": markdown,
    "latex": latex,
    "csv": as_csv,
}
FILES = {"markdown": "md", "latex": "tex", "csv": "csv"}  # written beside the records by a run
