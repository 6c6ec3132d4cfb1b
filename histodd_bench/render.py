"""Grids as text: rich, Markdown, LaTeX (booktabs), CSV and JSON."""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Sequence

from histodd_bench.layout import Cell, Grid, Value
from histodd_bench.results import Record, finite

DASH = "-"  # a cell that has not been computed


def number(cell: Cell, *, plus_minus: str = " ± ", times: str = "x") -> str:
    """A cell as plain text: ``77.2 ± 1.1 (9)``; the paper's numbers exactly as printed."""
    if cell is None:
        return DASH
    if isinstance(cell, str):
        return cell
    if cell.printed is not None:
        return f"{cell.printed.mean}{plus_minus}{cell.printed.sd}"
    if math.isnan(cell.mean):
        return DASH
    text = f"{cell.mean:.{cell.metric.digits}f}"
    if cell.metric.spread:
        text += f"{plus_minus}{cell.sd:.{cell.metric.digits}f}" if not math.isnan(cell.sd) else ""
        text += f" ({cell.n})"
    if cell.times is not None and cell.times >= 1.5:
        text += f" ({times}{cell.times:.0f})"
    return text


def _heads(grid: Grid) -> list[str]:
    return ["", "Img/Cls", "Ratio %", *grid.columns]


def _lead(grid: Grid, i: int) -> list[str]:
    """The first three columns of a row; a block's title stands on its first row only."""
    row = grid.rows[i]
    new = i == 0 or grid.rows[i - 1].block != row.block
    return ["paper" if row.source == "paper" else (row.block if new else ""), row.ipc, row.ratio]


def rich(grids: Sequence[Grid], *, width: int | None = None, colour: bool = False) -> str:
    """For a terminal; ``width`` in characters, as wide as needed by default."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    stream = io.StringIO()
    console = Console(file=stream, width=width or 400, force_terminal=colour, color_system="auto" if colour else None)
    for grid in grids:
        table = Table(title=Text(grid.title), title_justify="left")
        for i, head in enumerate(_heads(grid)):
            table.add_column(Text(head), justify="left" if i == 0 else "right")
        for i, row in enumerate(grid.rows):
            style = "dim" if row.source == "paper" else ""
            cells = [Text(number(c), style="bold" if isinstance(c, Value) and c.best else style) for c in row.cells]
            last = i + 1 == len(grid.rows) or grid.rows[i + 1].block != row.block
            table.add_row(*[Text(t, style=style) for t in _lead(grid, i)], *cells, end_section=last)
        console.print(table)
        for note in grid.notes:
            console.print(Text("  " + note), soft_wrap=width is None)
        console.print()
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def markdown(grids: Sequence[Grid]) -> str:
    """GitHub-flavoured tables, notes below each."""

    def safe(text: str) -> str:
        text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return re.sub(r"([\\|*_`\[\]])", r"\\\1", text).replace("\n", " ")

    parts = []
    for grid in grids:
        lines = [f"### {safe(grid.title)}", ""]
        lines.append("| " + " | ".join(safe(h) for h in _heads(grid)) + " |")
        lines.append("|" + "|".join([":--", *["--:"] * (len(grid.columns) + 2)]) + "|")
        for i, row in enumerate(grid.rows):
            lead = [safe(t) for t in _lead(grid, i)]
            lead[0] = "*paper*" if row.source == "paper" else lead[0]
            cells = []
            for cell in row.cells:
                text = safe(number(cell))
                bold = isinstance(cell, Value) and cell.best
                cells.append(f"**{text}**" if bold else f"*{text}*" if row.source == "paper" and text else text)
            lines.append("| " + " | ".join(lead + cells) + " |")
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
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(grid.columns) + 2)}}}", r"\toprule"]
        lines += [" & ".join(tex(h) for h in _heads(grid)) + r" \\", r"\midrule"]
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
            lines.append(" & ".join([*map(tex, _lead(grid, i)), *cells]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", ""]
        lines += [rf"{{\footnotesize {tex(note)}\par}}" for note in grid.notes]
        parts.append("\n".join([*lines, r"\end{table}", ""]))
    return "\n".join(parts)


CSV_COLUMNS = ("dataset", "network", "metric", "ipc", "ratio_percent", "column", "source", "mean", "sd", "n")


def as_csv(grids: Sequence[Grid]) -> str:
    """One line per number, with full precision: missing cells have empty numbers and n = 0."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for grid in grids:
        for row in grid.rows:
            for title, cell in zip(grid.columns, row.cells, strict=True):
                if isinstance(cell, str):
                    continue
                whole = title == "Full"
                head = [
                    grid.dataset,
                    grid.arch,
                    row.block,
                    "" if whole else row.ipc,
                    "" if whole else row.ratio,
                    title,
                    row.source,
                ]
                if cell is None:
                    writer.writerow([*map(_plain, head), "", "", 0])
                elif cell.printed is not None:
                    writer.writerow([*map(_plain, head), cell.printed.mean, cell.printed.sd, ""])
                else:
                    writer.writerow(
                        [*map(_plain, head), repr(cell.mean), "" if math.isnan(cell.sd) else repr(cell.sd), cell.n]
                    )
    return stream.getvalue()


def _plain(text: str) -> str:
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
