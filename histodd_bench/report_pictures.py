"""Pictures of the report: contact sheets of sets, stains before and after normalisation, matching losses."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from histodd_bench import svg
from histodd_bench.methods import all_methods

SHEET_BYTES = 3_000_000  # of contact sheets in one page; further ones are named, not shown
CARDS = "card.json"


def read_cards(out: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Folder and card of every saved set of a run, in a fixed order; damaged ones are left out."""
    found = []
    for path in sorted((out / "sets").glob(f"*/{CARDS}")):
        try:
            card = json.loads(path.read_text(encoding="utf-8"))
            place = card["dataset"], card["ipc"], card["method"], card["seed"], path.parent.name
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found.append((place, path.parent, card))
    return [(folder, card) for _, folder, card in sorted(found, key=lambda f: tuple(map(str, f[0])))]


def sheets_html(out: Path, cards: Sequence[tuple[Path, Mapping[str, Any]]], wanted: set[str]) -> str:
    """Contact sheets of one seed: the distilled patches with what they were before, and the coresets.

    Args:
        out: folder of the run.
        cards: its sets.
        wanted: names of the sets to show first, those of the main tables; others follow while there is room.
    """
    known = all_methods()
    first: dict[tuple[str, str, int, str], tuple[bool, Path, Mapping[str, Any]]] = {}
    for folder, card in cards:
        made = card["config"]["set"]
        fields = json.dumps([made["fields"], made["pool"], card["config"]["data"]], sort_keys=True)
        place = card["dataset"], card["method"], card["ipc"], fields
        main = folder.name in wanted
        if place not in first or card["seed"] < first[place][2]["seed"]:
            first[place] = main, folder, card
    order = sorted(
        first.values(),
        key=lambda f: (
            not f[0],
            f[2]["dataset"],
            f[2]["ipc"],
            not known_synthetic(known, f[2]["method"]),
            f[2]["method"],
        ),
    )
    shown: dict[bool, list[str]] = {True: [], False: []}
    left, spent = 0, 0
    for main, folder, card in order:
        path = out / "sheets" / f"{folder.name}.png"
        try:
            data = path.read_bytes()
        except OSError:
            continue
        if spent + len(data) > SHEET_BYTES and spent:
            left += 1
            continue
        spent += len(data)
        title = known[card["method"]].title if card["method"] in known else card["method"]
        text = f"{card['dataset']}: {title}, {card['ipc']} per class, seed {card['seed']}"
        text += _fields_told(card)
        uri = "data:image/png;base64," + base64.b64encode(data).decode()
        shown[main].append(
            f'<figure><figcaption>{escape(text)}</figcaption><img alt="{escape(text)}" src="{uri}" loading="lazy"></figure>'
        )
    made = {main: f'<div class="sheets">{"".join(found)}</div>' if found else "" for main, found in shown.items()}
    text = f"{len(shown[False])} more, of other columns and rows of the tables"
    others = f"<details><summary>{text}</summary>{made[False]}</details>" if made[False] and made[True] else made[False]
    more = f'<p class="dim">{left} more sheets lie in {escape(str(out / "sheets"))}.</p>' if left else ""
    return made[True] + others + more if made[True] or others else ""


def known_synthetic(known: Mapping[str, Any], method: str) -> bool:
    """Whether a method's patches are made, not selected."""
    return method in known and bool(known[method].synthetic)


def _fields_told(card: Mapping[str, Any]) -> str:
    made = card["config"]["set"]
    fields, told = made.get("fields", {}), []
    if card["method"] == "histodd":
        told.append(f"K {fields.get('outer_steps')}, U {fields.get('inner_steps')}")
        told.append(f"augmentation {', '.join(fields.get('augment', [])) or 'none'}")
    if card["config"]["data"].get("stain_pre"):
        told.append("stains normalised beforehand")
    return f" ({'; '.join(told)})" if told else ""


def losses_html(cards: Sequence[tuple[Path, Mapping[str, Any]]], wanted: set[str]) -> str:
    """Matching loss of the distillations over their outer loops, one plot for each data set and images per class."""
    groups: dict[tuple[str, int], list[svg.Line]] = {}
    for folder, card in cards:
        try:
            history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
            points = tuple(svg.Point(float(h["outer_step"]), float(h["loss"])) for h in history)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        lines = groups.setdefault((card["dataset"], card["ipc"]), [])
        if folder.name in wanted and len(lines) < svg.COLOURS:
            lines.append(svg.Line(f"seed {card['seed']}", tuple(_thinned(points)), len(lines)))
    figures = [
        svg.plot(lines, title=f"{dataset}, {ipc} per class", x_title="outer loop", y_title="mean matching loss")
        for (dataset, ipc), lines in groups.items()
    ]
    return f'<div class="plots">{"".join(figures)}</div>' if any(figures) else ""


def _thinned(points: Sequence[svg.Point]) -> list[svg.Point]:
    """At most about 100 points."""
    step = max(1, math.ceil(len(points) / 100))
    return [*points[:-1:step], *points[-1:]]


def stains_html(out: Path) -> str:
    """Where the haematoxylin and eosin vectors of training patches lie, before and after normalisation to the template."""
    figures, swatches = [], []
    for path in sorted((out / "stains").glob("*.json")):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            before, after, template = facts["before"], facts["after"], facts["template"]
            label = facts["dataset"] + (" (procedural data)" if facts["procedural"] else "")
        except (OSError, ValueError, KeyError, TypeError):
            continue
        target = [row[0] for row in template["stain"]] + [row[1] for row in template["stain"]]
        window = [_chromatic(r[i : i + 3]) for rows in (before, after) for r in rows for i in (0, 3)]
        for name, rows in (("as they are", before), ("normalised", after)):
            lines = [
                svg.Line("haematoxylin", tuple(_chromatic(r[:3]) for r in rows), 0, joined=False),
                svg.Line("eosin", tuple(_chromatic(r[3:6]) for r in rows), 1, joined=False),
                svg.Line("template", (_chromatic(target[:3]), _chromatic(target[3:])), 5, joined=False),
            ]
            figures.append(
                svg.plot(lines, title=f"{label}: {len(rows)} of {facts['tried']} training patches, {name}",
                         x_title="red share of the optical density", y_title="blue share", window=window)
            )  # fmt: skip
        colours = "".join(
            f'<span class="swatch" style="background:{_colour(target[i : i + 3])}"></span> {name} &nbsp;'
            for i, name in ((0, "haematoxylin"), (3, "eosin"))
        )
        swatches.append(f"<p>{escape(label)}, stains of the template: {colours}</p>")
    return f'<div class="plots">{"".join(figures)}</div>{"".join(swatches)}' if figures else ""


def _chromatic(vector: Sequence[float]) -> svg.Point:
    total = sum(vector) or 1.0
    r, g, b = (v / total for v in vector)
    return svg.Point(r, b, told=f"red {r:.2f}, green {g:.2f}, blue {b:.2f}")


def _colour(vector: Sequence[float]) -> str:
    """A stain as a colour: light through it at an optical density of 1 along its vector."""
    return f"rgb({','.join(str(round(255 * math.exp(-max(v, 0.0)))) for v in vector)})"
