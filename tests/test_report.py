"""The report: complete, self-contained, escaped; and loaded in a real browser where there is one."""

import fcntl
import html.parser
import itertools
import json
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from made_up_records import record

from histodd_bench import cli, report, results, svg
from histodd_bench.tables import TABLES

PATCH_LEVEL = {name for name, table in TABLES.items() if table.kind != "slides"}


@pytest.fixture(scope="module")
def page(all_tables: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write_report(all_tables["out"], tmp_path_factory.mktemp("report") / "page.html")


class Outline(html.parser.HTMLParser):
    """Counts of tags, and whether they are closed in order."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)
        named = dict(attrs)
        self.ids |= {named["id"]} if "id" in named else set()
        self.links |= {named["href"]} if tag == "a" else set()

    def handle_startendtag(self, tag, attrs) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()


def test_every_table_plot_and_picture_is_there(page: Path) -> None:
    text = page.read_text()
    outline = Outline(text)
    assert not outline.open
    assert PATCH_LEVEL | {"sheets", "stains", "losses", "configuration"} <= outline.ids
    assert {link[1:] for link in outline.links} == PATCH_LEVEL | {"sheets", "stains", "losses", "configuration"}
    assert outline.counts["img"] >= 4 and outline.counts["figure"] > 15 and outline.counts["table"] > 15
    for name in PATCH_LEVEL:
        assert (page.parent / f"{name}.md").is_file() and r"\toprule" in (page.parent / f"{name}.tex").read_text()
    assert "The paper's own numbers" in text and "87.8 ± 0.1" in text and "0.23 (x7043)" in text


def test_the_page_loads_nothing(page: Path) -> None:
    text = page.read_text()
    assert "default-src 'none'" in text and "<script" not in text
    sources = re.findall(r'(?:src|href)="([^"#]{1,12})', text)
    assert all(s.startswith("data:") for s in sources), set(sources)
    assert "url(" not in text and "@import" not in text


def test_user_text_is_escaped_and_procedural_data_are_labelled(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script>"
    for r in (record(0.7, dataset=nasty, notes=(nasty,), procedural=True), record(0.8, method="full", dataset=nasty)):
        results.write_record(tmp_path, r)
    text = report.write_report(tmp_path).read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "procedural data, computer-made pictures" in text
    Outline(text)


def test_an_unfinished_run_says_how_far_it_is(tmp_path: Path) -> None:
    made = record(0.7)
    results.write_record(tmp_path, made)
    cells = {made["key"]: [["", "Random"]], "another": [["", "Histo-DD"]]}
    results.write_plan(tmp_path, "table1", {"idc": {"ipc": [10], "methods": ["random"], "cells": cells}})
    text = report.write_report(tmp_path).read_text()
    assert "Not everything is computed: 1 of 2 cells" in text and 'http-equiv="refresh"' not in text


def test_following_a_run_ends_when_the_run_does(tmp_path: Path) -> None:
    results.write_record(tmp_path, record(0.7))
    lock = open(tmp_path / ".lock", "a")
    fcntl.flock(lock, fcntl.LOCK_EX)
    done: list[Path] = []
    thread = threading.Thread(target=lambda: done.append(report.follow(tmp_path, seconds=1)))
    thread.start()
    page, deadline = tmp_path / report.PAGE, time.monotonic() + 60
    while not page.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert 'http-equiv="refresh" content="1"' in page.read_text() and not done
    lock.close()
    thread.join(60)
    assert done == [page] and "refresh" not in page.read_text()


def test_nothing_to_report_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "x")]) == 1 and "no results in" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 1 and "no results in" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_damaged_pictures_and_cards_are_left_out(tmp_path: Path) -> None:
    results.write_record(tmp_path, record(0.7))
    for name in ("sets/x/card.json", "stains/idc.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("{")
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "elsewhere.html")]) == 0
    assert (tmp_path / "elsewhere.html").stat().st_size > 1000


# ---- plots -----------------------------------------------------------------------------------------------------------


def line(*points: tuple[float, float], style: int = 0) -> svg.Line:
    return svg.Line("a < b", tuple(svg.Point(x, y, 1.0) for x, y in points), style)


def test_points_land_where_the_axes_say() -> None:
    text = svg.plot([line((0, 0), (10, 10))], title="t", x_title="x", y_title="y")
    marks = [tuple(map(float, m)) for m in re.findall(r'class="point c1" d="M([\d.]+) ([\d.]+)', text)]
    ticks = {
        float(v): float(y) - 4 for y, v in re.findall(r'<text x="54" y="([\d.]+)" text-anchor="end">([-\d.]+)<', text)
    }
    assert marks[0][1] == pytest.approx(ticks[0.0], abs=0.2) and marks[1][1] == pytest.approx(ticks[10.0], abs=0.2)
    assert marks[0][0] < marks[1][0] and "a &lt; b" in text
    places = {
        float(v): float(x) for x, v in re.findall(r'<text x="([\d.]+)" y="\d+" text-anchor="middle">([\d.]+)<', text)
    }
    assert marks[0][0] + 4 == pytest.approx(places[0.0], abs=0.2)


def test_equal_factors_are_equally_far_on_a_logarithmic_axis() -> None:
    text = svg.plot([line((10, 1), (20, 2), (40, 3), (0, 4))], title="t", x_title="x", y_title="y", log=True)
    xs = [float(x) for x in re.findall(r'class="point c1" d="M([\d.]+)', text)]
    assert len(xs) == 3 + 1 and xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)


def test_nothing_to_draw_draws_nothing() -> None:
    assert svg.plot([], title="t", x_title="x", y_title="y") == ""
    assert svg.plot([line((1, float("nan")))], title="t", x_title="x", y_title="y") == ""
    assert "NaN" not in svg.plot([line((3, 5))], title="t", x_title="x", y_title="y", log=True)


@pytest.mark.parametrize("low,high", [(0, 1), (49.3, 50.1), (-3, 1234), (5, 5), (0, 0), (1e-6, 2e-6)])
def test_ticks_enclose_the_numbers_and_are_round(low: float, high: float) -> None:
    ticks = svg.nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 3 <= len(ticks) <= 9
    steps = {round((b - a) / (ticks[1] - ticks[0]), 6) for a, b in itertools.pairwise(ticks)}
    assert steps == {1.0}


def test_series_differ_in_more_than_colour() -> None:
    assert len(set(svg.MARKERS)) == len(set(svg.DASHES)) == svg.COLOURS


# ---- in a browser ----------------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
# Runs in the page once it is loaded: what a reader would see.
PROBE = """<script>addEventListener('load', () => { const all = s => [...document.querySelectorAll(s)];
  const seen = {images: all('img').map(i => { i.loading = 'eager'; return i.naturalWidth; }),
    tables: all('main section > .scroll > table').map(t => t.getBoundingClientRect().height),
    plots: all('figure > svg:not(.mark)').map(s => s.getBoundingClientRect().width), points: all('svg .point').length,
    colours: [...new Set(all('svg .point').map(p => getComputedStyle(p).stroke))].length,
    wide: document.documentElement.scrollWidth, window: innerWidth, background: getComputedStyle(document.body).backgroundColor};
  document.title = 'PROBE' + JSON.stringify(seen); });</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser on the path ({', '.join(BROWSERS)})")
    return found


def load(browser: str, page: Path, tmp_path: Path, *options: str) -> tuple[dict, str]:
    """What the probe saw, and what the browser wrote to the console."""
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", *options, page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    title = re.search(r"<title>PROBE(.*?)</title>", done.stdout)
    console = "\n".join(x for x in done.stderr.splitlines() if "CONSOLE" in x)
    return (json.loads(title[1].replace("&amp;", "&")) if title else {}), console


@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_tables_pictures_and_plots_with_a_clean_console(
    browser: str, page: Path, tmp_path: Path, width: int
) -> None:
    probed = tmp_path / "probed.html"
    text = page.read_text()
    probed.write_text(
        re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</body>", PROBE + "</body>")
    )
    seen, console = load(browser, probed, tmp_path, f"--window-size={width},900")
    assert seen, "the page did not load"
    assert seen["images"] and all(w > 0 for w in seen["images"])
    assert len(seen["tables"]) >= 10 and all(h > 30 for h in seen["tables"])
    assert len(seen["plots"]) > 10 and all(w > 200 for w in seen["plots"])
    assert seen["points"] > 30 and seen["colours"] >= 4
    assert seen["wide"] <= seen["window"], "the page scrolls sideways"
    assert console == ""


def test_the_policy_of_the_page_itself_breaks_nothing(browser: str, page: Path, tmp_path: Path) -> None:
    _, console = load(browser, page, tmp_path)
    assert console == ""


def test_the_dark_scheme_is_dark(browser: str, page: Path, tmp_path: Path) -> None:
    probed = tmp_path / "probed.html"
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    probed.write_text(text.replace("</body>", PROBE + "</body>"))
    light, _ = load(browser, probed, tmp_path, "--blink-settings=preferredColorScheme=1")
    dark, _ = load(browser, probed, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert light["background"] == "rgb(255, 255, 255)" and dark["background"] == "rgb(20, 24, 29)"
