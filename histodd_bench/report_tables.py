"""Tables and plots of the report, from grids."""

import math
from collections.abc import Sequence
from html import escape

from histodd_bench import render, svg
from histodd_bench.grid import Grid, Interval, Points, Row, Value
from histodd_bench.paper import DATASETS
from histodd_bench.tables import Metric, Plot, SlideTable, Table

TIMES = chr(0xD7)  # the multiplication sign
STYLES = {"Histo-DD": 0, "Random": 1, "Herding": 2, "Forgetting": 3}  # the same in every plot; others follow


def grid_html(grid: Grid) -> str:
    """One table, its notes, and its Markdown and LaTeX."""
    leads = [*([grid.head] if grid.head else []), *(["Img/Cls", "Ratio %"] if grid.budgets else [])]
    heads = "".join(_head(h, h == grid.head) for h in leads) + "".join(_head(h, False) for h in grid.columns)
    body = []
    for i, row in enumerate(grid.rows):
        before = grid.rows[i - 1] if i else None
        new = before is None or before.block != row.block
        if new and row.block:
            body.append(
                f'<tr class="block"><th scope="rowgroup" colspan="{len(leads) + len(grid.columns)}">{escape(row.block)}</th></tr>'
            )
        paper = row.source == "paper"
        label = row.label if new or before is None or before.label != row.label or paper else ""
        mark = "paper" if paper else ""
        cells = f'<th scope="row">{escape(", ".join(t for t in (label, mark) if t))}</th>' if grid.head else ""
        if grid.budgets:
            ipc = row.ipc if grid.head else " ".join(t for t in (mark, row.ipc) if t)
            cells += f"<td>{escape(ipc)}</td><td>{escape(row.ratio)}</td>"
        cells += "".join(_number(c) for c in row.cells)
        body.append(f'<tr class="paper">{cells}</tr>' if paper else f"<tr>{cells}</tr>")
    table = f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    notes = "".join(f"<li>{escape(n)}</li>" for n in grid.notes)
    listed = f"<details><summary>How these numbers were made</summary><ul>{notes}</ul></details>" if notes else ""
    text = "".join(
        f"<details><summary>{name}</summary><pre>{escape(make([grid]))}</pre></details>"
        for name, make in (("Markdown", render.markdown), ("LaTeX (booktabs)", render.latex))
    )
    return f"<h3>{escape(grid.title)}</h3>{table}{listed}{text}"


def _head(text: str, is_text: bool) -> str:
    return f'<th scope="col"{" class=" + chr(34) + "text" + chr(34) if is_text else ""}>{escape(text)}</th>'


def _number(cell: Value | Interval | str | None) -> str:
    text = escape(render.number(cell, times=TIMES))
    if isinstance(cell, Interval):
        return f'<td class="interval">{text}</td>'
    return f'<td class="best">{text}</td>' if isinstance(cell, Value) and cell.best else f"<td>{text}</td>"


def plots_html(table: Table, grids: Sequence[Grid]) -> str:
    """The plots that a table declares, for every grid."""
    figures = []
    for grid in grids:
        label = f"{grid.dataset}, {grid.arch}" if len(grids) > 1 else ""
        for wanted in table.plots:
            figures += _figures(table, grid, wanted, label)
    return f'<div class="plots">{"".join(figures)}</div>' if any(figures) else ""


def _figures(table: Table, grid: Grid, wanted: Plot, label: str) -> list[str]:
    metric = next(m for m in table.metrics if m.key == wanted.y)
    if wanted.x in ("label", "stage"):
        return _by_label(grid, wanted, metric, label)
    across = table.across == "archs"
    made = []
    for panel, series in grid.series.items():
        lines, levels = [], {}
        for name, points in series.items():
            line, level = _line(name, points, wanted, metric, _style(name, list(series)))
            if level is not None:
                levels[name] = level
            elif line.points:
                lines.append(line)
        ipcs = sorted({float(i) for points in series.values() for i in points if i is not None})
        title = ", ".join(t for t in (wanted.title, panel if across or len(grid.series) > 1 else "", label) if t)
        x = next((m.title for m in table.metrics if m.key == wanted.x), "images per class")
        made.append(
            svg.plot(lines, title=title, x_title=x, y_title=metric.title, log=wanted.log,
                     ticks=ipcs if wanted.x == "ipc" else (), levels=levels)
        )  # fmt: skip
    return made


def _line(name: str, points: Points, wanted: Plot, metric: Metric, style: int) -> tuple[svg.Line, float | None]:
    """A series; or, for the whole training set in a plot against images per class, the height of its level."""
    if wanted.x == "ipc" and list(points) == [None]:
        value = points[None].get(metric.key)
        return svg.Line(name, (), style), None if value is None else value.mean
    drawn = []
    for ipc, values in points.items():
        y = values.get(metric.key)
        x = float(ipc or math.nan) if wanted.x == "ipc" else values[wanted.x].mean if wanted.x in values else math.nan
        if y is not None:
            told = f"{name}{'' if ipc is None else f', {ipc} per class'}: {render.number(y)}"
            drawn.append(svg.Point(x, y.mean, y.sd, told))
    return svg.Line(name, tuple(drawn), style), None


def _by_label(grid: Grid, wanted: Plot, metric: Metric, label: str) -> list[str]:
    """Plots whose x is in the labels of rows: ``K = 10`` (one panel for each name) or ``2. + name`` (a stage)."""
    panels: dict[str, dict[str, list[svg.Point]]] = {}
    names = list(dict.fromkeys(n for series in grid.series.values() for n in series))
    for text, series in grid.series.items():
        panel, _, number = text.partition(" = ") if wanted.x == "label" else ("", "", text.partition(".")[0])
        try:
            x = float(number)
        except ValueError:
            continue
        for name, points in series.items():
            for values in points.values():
                if metric.key in values:
                    v = values[metric.key]
                    told = f"{name}, {text}: {render.number(v)}"
                    panels.setdefault(panel, {}).setdefault(name, []).append(svg.Point(x, v.mean, v.sd, told))
    made = []
    for panel, found in panels.items():
        lines = [svg.Line(n, tuple(p), _style(n, names)) for n, p in found.items()]
        ticks = sorted({p.x for line in lines for p in line.points})
        title = ", ".join(t for t in (f"{wanted.title} against {panel}" if panel else wanted.title, label) if t)
        made.append(
            svg.plot(lines, title=title, x_title=panel or "stage", y_title=metric.title, log=wanted.log, ticks=ticks)
        )
    return made


def _style(name: str, names: Sequence[str]) -> int:
    """Known methods look the same everywhere."""
    if name in STYLES:
        return STYLES[name]
    others = [n for n in names if n not in STYLES]
    return len(STYLES) + others.index(name)


def _slide_level_paper(table: SlideTable, grid: Grid, metric: Metric) -> None:
    """Fill a grid with what the paper prints in a slide-level table: accuracy of every model, and what it cost."""
    models = list(dict.fromkeys(m for _, _, m in table.paper_accuracy))
    costs = {"epochs": table.paper_epochs, "s/epoch": table.paper_seconds, "storage": table.paper_storage}
    places = [
        (m, what)
        for m in models
        for what in ("accuracy %", *costs)
        if what == "accuracy %" or any(k[2] == m for k in costs[what])
    ]
    grid.columns = ["Img/Cls", *(f"{m} {what}" for m, what in places)]
    for d, ipc in dict.fromkeys((d, i) for d, i, _ in table.paper_accuracy):
        cells: list[Value | Interval | str | None] = ["Full" if ipc is None else str(ipc)]
        for m, what in places:
            if what == "accuracy %":
                printed = table.paper_accuracy[d, ipc, m]
                cells.append(Value(*printed.value, 0, metric, printed=printed))
            else:
                cells.append(costs[what].get((d, ipc, m), ""))
        grid.rows.append(Row("", "", "", cells, label=DATASETS.get(d, f"Camelyon16, from {d}")))


def paper_html(table: Table) -> str:
    """The numbers that the paper prints in its own table of this name, for its own data sets."""
    metric = table.metrics[0] if table.metrics else Metric("", "", spread=False)
    grid = Grid(f"{table.title}: as printed in the paper", "", table.paper_arch, [], head="Data set", budgets=False)
    if isinstance(table, SlideTable):
        _slide_level_paper(table, grid, metric)
    elif table.paper_archs:
        archs = list(dict.fromkeys(a for _, _, a in table.paper_archs))
        grid.columns = ["Img/Cls", *(f"{a}{u}" for a in archs for u in (" accuracy %", " s/epoch"))]
        for d, ipc in dict.fromkeys((d, i) for d, i, _ in table.paper_archs):
            cells: list[Value | Interval | str | None] = ["Full" if ipc is None else str(ipc)]
            for a in archs:
                printed, seconds = table.paper_archs[d, ipc, a]
                cells += [Value(*printed.value, 0, metric, printed=printed), seconds]
            grid.rows.append(Row("", "", "", cells, label=DATASETS[d]))
    elif table.paper:
        titles = list(dict.fromkeys(t for _, _, t in table.paper))
        budgets = any(i is not None for _, i, _ in table.paper)
        grid.columns = [*(["Img/Cls"] if budgets else []), *titles]
        places = dict.fromkeys((d, i) for d, i, _ in table.paper if i is not None or not budgets)
        for d, ipc in sorted(places, key=lambda p: list(DATASETS).index(p[0])):
            row: list[Value | Interval | str | None] = [str(ipc)] if budgets else []
            for t in titles:
                number = table.paper.get((d, ipc, t)) or table.paper.get((d, None, t))
                row.append(Value(0, 0, 0, metric, printed=number) if number else "")
            grid.rows.append(Row("", "", "", row, label=DATASETS[d]))
    else:
        return ""
    heads = "".join(_head(h, i == 0) for i, h in enumerate([grid.head, *grid.columns]))
    body = "".join(
        f'<tr class="paper"><th scope="row">{escape(r.label)}</th>{"".join(_number(c) for c in r.cells)}</tr>'
        for r in grid.rows
    )
    table_html = f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    where = f" on {escape(table.paper_arch)}" if table.paper_arch else ""
    return (
        f"<details><summary>The paper's own numbers, for its data sets{where}</summary>"
        f"<p>As printed in the paper, digit for digit; not computed here.</p>{table_html}</details>"
    )
