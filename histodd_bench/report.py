"""The report: one self-contained HTML page of everything a run folder holds. Nothing is computed, nothing is loaded."""

import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from histodd_bench import __version__, layout, render, results
from histodd_bench.errors import HistoddError
from histodd_bench.files import is_locked, write_text
from histodd_bench.report_pictures import losses_html, read_cards, sheets_html, stains_html
from histodd_bench.report_style import CSS
from histodd_bench.report_tables import grid_html, paper_html, plots_html
from histodd_bench.results import Record
from histodd_bench.tables import TABLES

PAGE = "report.html"


def write_report(out: Path, target: Path | None = None, *, refresh: int | None = None) -> Path:
    """Write the page, and Markdown and LaTeX files of every table beside it.

    Args:
        out: a run folder.
        target: where the page goes; ``report.html`` in the run folder by default.
        refresh: seconds after which a browser reads the page again, for a run in progress.

    Raises:
        HistoddError: no such folder, or nothing in it.
    """
    if not out.is_dir():
        raise HistoddError(f"no results in {out}: 'run TABLE --out {out}' computes them")
    target = target or out / PAGE
    records, ignored = results.read_records(out)
    plan = results.read_plan(out)
    if not records and not plan:
        raise HistoddError(f"no results in {out} yet: 'run TABLE --out {out}' computes them")
    tables = [t for name, t in TABLES.items() if name in plan] or [TABLES["table1"]]
    sections: list[tuple[str, str, str]] = []  # anchor, title, content
    main_sets: set[str] = set()
    for table in tables:
        grids = layout.grids(table, records, plan.get(table.name), results.claimed(plan, but=table.name))
        for name, suffix in (("markdown", "md"), ("latex", "tex")):
            write_text(target.parent / f"{table.name}.{suffix}", render.FORMATS[name](grids))
        body = plots_html(table, grids) + "".join(map(grid_html, grids)) + paper_html(table)
        if not grids:
            body = "<p>Nothing is finished yet.</p>" + body
        sections.append((table.name, table.title, body))
        if table.name in ("table1", "fig1"):
            main_sets |= _sets_of(table.name, records, plan)
    cards = read_cards(out)
    main_sets = main_sets or {str(r["set"]) for r in records if r.get("set")}
    for anchor, title, text, content in (
        ("sheets", "Patches", "One seed of each set. Distilled patches stand below those they began as.",
         sheets_html(out, cards, main_sets)),
        ("stains", "Stains", "Macenko fits of training patches: directions of the two stains in optical density, as shares of red "
         "and blue. Normalisation moves every patch to the template, the training patch nearest to the set's mean.",
         stains_html(out)),
        ("losses", "Matching losses", "Layer-wise distance between the gradients of real and synthetic batches, averaged over each "
         "outer loop. It depends on the network that was drawn, so it does not fall to zero.", losses_html(cards, main_sets)),
        ("configuration", "Configuration and environment", "", _configuration(records, out)),
    ):  # fmt: skip
        if content:
            sections.append((anchor, title, (f"<p>{escape(text)}</p>" if text else "") + content))
    write_text(target, _page(out, records, plan, ignored, sections, refresh))
    return target


def follow(out: Path, target: Path | None = None, *, seconds: int = 10) -> Path:
    """Write the page again and again while a run holds the folder, and once more when it has ended."""
    while _running(out):
        try:
            write_report(out, target, refresh=seconds)
        except HistoddError:
            if not out.is_dir():
                raise
        time.sleep(seconds)
    return write_report(out, target)


def _running(out: Path) -> bool:
    """Whether a run writes into the folder: it holds the lock."""
    return is_locked(out / ".lock")


def _sets_of(table: str, records: Sequence[Record], plan: Mapping[str, Mapping[str, Any]]) -> set[str]:
    keys = {k for asked in plan.get(table, {}).values() for k in asked.get("cells", ())}
    return {str(r["set"]) for r in records if r.get("set") and (not keys or r["key"] in keys)}


def _page(
    out: Path,
    records: Sequence[Record],
    plan: Mapping[str, Mapping[str, Any]],
    ignored: Sequence[str],
    sections: Sequence[tuple[str, str, str]],
    refresh: int | None,
) -> str:
    asked = {k for part in plan.values() for place in part.values() for k in place.get("cells", ())}
    done = len(asked & {r["key"] for r in records})
    datasets = list(dict.fromkeys(r["dataset"] for r in records))
    procedural = sorted({r["dataset"] for r in records if r["data"]["procedural"]})
    title = f"histodd-bench: {', '.join(datasets) or out.name}"
    top = [f"<h1>{escape(title)}</h1>"]
    top.append(
        f'<p class="dim">Distilled patches against coresets and the whole training set. Folder {escape(str(out))}, '
        f"{len(records)} records, histodd-bench {__version__}.</p>"
    )
    if asked and done < len(asked):
        state = "A run is in progress" if refresh else "Not everything is computed"
        top.append(
            f'<p>{state}: {done} of {len(asked)} cells. <progress max="{len(asked)}" value="{done}"></progress></p>'
        )
    if procedural:
        top.append(
            f'<p class="warn">{escape(", ".join(procedural))}: procedural data, computer-made pictures; these numbers say nothing '
            "about tissue or patients.</p>"
        )
    top += [f'<p class="warn">{escape(line)}</p>' for line in ignored]
    links = "".join(f'<li><a href="#{a}">{escape(t.partition(":")[0])}</a></li>' for a, t, _ in sections)
    body = "".join(f'<section id="{a}"><h2>{escape(t)}</h2>{content}</section>' for a, t, content in sections)
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f'<link rel="icon" href="data:,">{again}<title>{escape(title)}</title><style>{CSS}</style></head>'
        f'<body><header>{"".join(top)}</header><nav aria-label="sections"><ul>{links}</ul></nav><main>{body}</main>'
        "<footer>Method: Cong et al., Dataset Distillation for Histopathology Image Classification, arXiv 2408.09709. "
        "Rows marked 'paper' are the paper's own numbers, all others were computed here.</footer></body></html>\n"
    )


def _configuration(records: Sequence[Record], out: Path) -> str:
    """What all records share, field by field, what differs between them, and where they were computed."""
    if not records:
        return ""
    parts = []
    seen: dict[str, set[str]] = {}
    for record in records:
        for name, value in results.flat_config(record["config"]).items():
            seen.setdefault(name, set()).add(json.dumps(value))
    common = {n: v for n, v in seen.items() if len(v) == 1}
    differing = {n: v for n, v in seen.items() if len(v) > 1}
    for title, rows in (
        ("Configuration: differs between cells", differing),
        ("Configuration: the same everywhere", common),
    ):
        lines = "".join(
            f'<tr><td class="text">{escape(n)}</td><td class="text">{escape(_listed(sorted(v, key=_natural)))}</td></tr>'
            for n, v in sorted(rows.items())
        )
        parts.append(
            f'<details><summary>{title}</summary><div class="scroll"><table class="facts">{lines}</table></div></details>'
        )
    places: dict[str, int] = {}
    for record in records:
        text = "; ".join(f"{k}: {v}" for k, v in record["environment"].items() if v is not None)
        places[text] = places.get(text, 0) + 1
    listed = "".join(f"<li>{escape(text)} ({n} records)</li>" for text, n in places.items())
    parts.insert(0, f"<h3>Environment</h3><ul>{listed}</ul>")
    parts.append(f'<p class="dim">One JSON file per cell: {escape(str(out / results.RECORDS))}.</p>')
    return "".join(parts)


def _natural(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), ""
    except ValueError:
        return 1, 0.0, text


def _listed(values: Sequence[str]) -> str:
    short = [v if len(v) <= 90 else v[:87] + "..." for v in values]
    return ", ".join(short[:12]) + (f" and {len(short) - 12} more" if len(short) > 12 else "")
