"""Plots as inline SVG: text stays text, colours follow the page's light or dark scheme, nothing is loaded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 430, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 12, 46
COLOURS = 6  # series colours c1..c6 of the page's style sheet, told apart by colour-blind readers
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "ring")
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 2", "10 4")


@dataclass(frozen=True)
class Point:
    """One number: where, its value, half an error bar (NaN: none), and what hovering shows."""

    x: float
    y: float
    error: float = math.nan
    told: str = ""


@dataclass(frozen=True)
class Line:
    """One series; ``style`` chooses colour, marker and dashes; without ``joined`` points stand alone."""

    name: str
    points: tuple[Point, ...]
    style: int
    joined: bool = True


def plot(
    lines: Sequence[Line],
    *,
    title: str,
    x_title: str,
    y_title: str,
    log: bool = False,
    ticks: Sequence[float] = (),
    levels: Mapping[str, float] | None = None,
    window: Sequence[Point] = (),
) -> str:
    """An SVG of lines with error bars, its title and a legend inside a ``figure``; empty where there is nothing to draw.

    Args:
        lines: the series.
        title, x_title, y_title: plain text.
        log: a logarithmic x axis; points at or below 0 are left out.
        ticks: places of x ticks; chosen by default.
        levels: name -> y of horizontal lines, such as that of the whole training set.
        window: points that the axes must reach, drawn or not: for plots that are compared.
    """
    lines = [
        Line(s.name, tuple(p for p in s.points if _drawable(p, log)), s.style, s.joined)
        for s in lines
    ]  # fmt: skip
    lines, levels = [s for s in lines if s.points], {k: v for k, v in (levels or {}).items() if math.isfinite(v)}
    if not lines:
        return ""
    xs = [p.x for s in lines for p in s.points] + [p.x for p in window]
    spans = [(p.y - e, p.y + e) for s in lines for p in s.points for e in [0.0 if math.isnan(p.error) else p.error]]
    low, high = min(a for a, _ in spans), max(b for _, b in spans)
    shown = [*levels.values(), *(p.y for p in window)]
    low, high = min([low, *shown]), max([high, *shown])
    y_ticks = nice_ticks(low, high)
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
    x_axis, x_ticks = _x_axis(xs, log, list(ticks))

    def x_at(x: float) -> float:
        a, b = x_axis
        place = (math.log(x / a) / math.log(b / a)) if log else (x - a) / (b - a)
        return _LEFT + place * (WIDTH - _LEFT - _RIGHT)

    def y_at(y: float) -> float:
        return HEIGHT - _BOTTOM - (y - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_grid(x_at, y_at, x_ticks, y_ticks, x_title, y_title),
    ]
    for name, y in levels.items():
        parts.append(
            f'<path class="level" d="M{_LEFT} {y_at(y):.1f}H{WIDTH - _RIGHT}"><title>{escape(name)}: {y:.4g}</title></path>'
        )
    for line in lines:
        points = sorted(line.points, key=lambda p: p.x)
        style, dash = f"c{line.style % COLOURS + 1}", DASHES[line.style % len(DASHES)]
        if line.joined and len(points) > 1:
            path = "L".join(f"{x_at(p.x):.1f} {y_at(p.y):.1f}" for p in points)
            parts.append(
                f'<path class="line {style}" d="M{path}"' + (f' stroke-dasharray="{dash}"' if dash else "") + "/>"
            )
        for p in points:
            x, y = x_at(p.x), y_at(p.y)
            told = p.told or f"{line.name}: {p.y:.4g}"
            if not math.isnan(p.error) and p.error > 0:
                top, bottom = y_at(p.y + p.error), y_at(p.y - p.error)
                parts.append(
                    f'<path class="error {style}" d="M{x:.1f} {top:.1f}V{bottom:.1f}M{x - 3:.1f} {top:.1f}h6M{x - 3:.1f} {bottom:.1f}h6"/>'
                )
            parts.append(_marker(line.style, x, y, style, told))
    parts.append("</svg>")
    named = [(_legend_mark(s), s.name) for s in lines] + [
        (
            '<svg viewBox="0 0 26 12" class="mark" aria-hidden="true"><path class="level" d="M0 6H26"/></svg>',
            name,
        )
        for name in levels
    ]
    legend = "".join(f"<li>{mark}{escape(name)}</li>" for mark, name in named if name)
    legend = f"<ul>{legend}</ul>" if legend else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}{legend}</figure>"


def _drawable(p: Point, log: bool) -> bool:
    return math.isfinite(p.x) and math.isfinite(p.y) and (not log or p.x > 0)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers that enclose an interval."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-12):
        low, high = low - max(abs(low), 1) * 0.05, high + max(abs(high), 1) * 0.05
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _x_axis(xs: Sequence[float], log: bool, ticks: list[float]) -> tuple[tuple[float, float], list[float]]:
    low, high = min(xs), max(xs)
    if log:
        low, high = (low / 1.5, high * 1.5) if low == high else (low, high)
        margin = (high / low) ** 0.06
        axis = low / margin, high * margin
        if not ticks:
            decades = range(math.floor(math.log10(axis[0])), math.ceil(math.log10(axis[1])) + 1)
            choices = [[m * 10.0**d for d in decades for m in steps] for steps in ((1,), (1, 3), (1, 2, 5))]
            inside = [[t for t in c if axis[0] <= t <= axis[1]] for c in choices]
            ticks = next((c for c in inside if len(c) > 2), nice_ticks(*axis))
    else:
        if low == high:
            low, high = low - 0.5, high + 0.5
        margin = (high - low) * 0.06
        axis = low - margin, high + margin
        ticks = ticks or nice_ticks(low, high)
        if all(x == round(x) for x in xs):
            ticks = [t for t in ticks if t == round(t)]
    return axis, [t for t in ticks if axis[0] <= t <= axis[1]]


def _grid(x_at, y_at, x_ticks, y_ticks, x_title: str, y_title: str) -> list[str]:  # type: ignore[no-untyped-def]
    bottom = HEIGHT - _BOTTOM
    parts = []
    for y in y_ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y_at(y):.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y_at(y) + 4:.1f}" text-anchor="end">{escape(_number(y))}</text>')
    last = -math.inf
    for x in x_ticks:
        parts.append(f'<path class="grid" d="M{x_at(x):.1f} {_TOP}V{bottom}"/>')
        if x_at(x) - last > 30:  # labels must not touch
            parts.append(f'<text x="{x_at(x):.1f}" y="{bottom + 16}" text-anchor="middle">{escape(_number(x))}</text>')
            last = x_at(x)
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text class="axis" x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>'
    )
    parts.append(
        f'<text class="axis" x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">{escape(y_title)}</text>'
    )
    return parts


def _number(value: float) -> str:
    return f"{value:.6g}"


def _marker(style: int, x: float, y: float, colour: str, told: str) -> str:
    kind = MARKERS[style % len(MARKERS)]
    shapes = {
        "circle": f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
        "ring": f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
        "square": f"M{x - 3.6:.1f} {y - 3.6:.1f}h7.2v7.2h-7.2z",
        "triangle": f"M{x:.1f} {y - 4.6:.1f}l4.6 8h-9.2z",
        "diamond": f"M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z",
        "cross": f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8",
    }
    hollow = " hollow" if kind in ("ring", "cross") else ""
    title = f"<title>{escape(told)}</title>" if told else ""
    return f'<path class="point {colour}{hollow}" d="{shapes[kind]}">{title}</path>'


def _legend_mark(line: Line) -> str:
    style, dash = f"c{line.style % COLOURS + 1}", DASHES[line.style % len(DASHES)]
    rule = f'<path class="line {style}" d="M0 6H26"' + (f' stroke-dasharray="{dash}"' if dash else "") + "/>"
    mark = _marker(line.style, 13, 6, style, "")
    return f'<svg viewBox="0 0 26 12" class="mark" aria-hidden="true">{rule if line.joined else ""}{mark}</svg>'
