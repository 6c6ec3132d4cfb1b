"""Procedural H&E: a picture of one slide and the outlines of its tumour, from a random generator.

Tissue is drawn as two maps of stain concentration, haematoxylin (nuclei) and eosin (stroma, cytoplasm), which Beer and
Lambert's law turns into light: I = I0 exp(-(h H + e E)). Normal tissue is fibrous stroma with glands, solid groups of ordinary
epithelium and clusters of lymphocytes; tumour is nests of larger, irregular, pleomorphic nuclei between thin bands of stroma.
Lymphocytes and crowded ordinary epithelium are as dark and as dense as tumour on purpose: what tells tumour is the shape, size and
texture of its nuclei. Holes (lumens, fat, retraction) are in both. Lengths are in microns unless a name says px.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

MPP = 0.5  # of level 0 (20x)
_HAEMATOXYLIN = np.array([0.62, 0.70, 0.36])
_EOSIN = np.array([0.16, 0.88, 0.44])
_HALF = 18  # px; nuclei are drawn in squares of twice this side


@dataclass(frozen=True)
class Stain:
    """How one slide was stained and scanned: unit optical-density vectors, amounts of stain, white of the lamp (0..255)."""

    haematoxylin: np.ndarray
    eosin: np.ndarray
    amounts: tuple[float, float]
    white: np.ndarray


def draw_stain(rng: np.random.Generator, centre: int, variation: float) -> Stain:
    """Draw a slide's stain: its centre's habits plus its own deviation, both scaled by ``variation`` (0: always the same)."""
    habit = (np.array([0.06, -0.03, -0.04]), np.array([-0.05, 0.02, 0.06]))[centre] * variation
    vectors = []
    for base in (_HAEMATOXYLIN, _EOSIN):
        vector = np.clip(base + habit + variation * rng.normal(0, 0.045, 3), 0.03, None)
        vectors.append(vector / np.linalg.norm(vector))
    log_amounts = np.array([(0.10, -0.12), (-0.10, 0.12)][centre]) + rng.normal(0, (0.25, 0.30))
    amounts = np.exp(np.clip(variation * log_amounts, -0.8, 0.8))
    white = 247 - variation * rng.uniform(0, 14, 3)
    return Stain(vectors[0], vectors[1], (float(amounts[0]), float(amounts[1])), white)


def _noise(rng: np.random.Generator, side_px: int, cell: float) -> np.ndarray:
    """Smooth noise ``[side,side]`` float32 of about unit variance; ``cell`` is the size of its features."""
    n = max(int(np.ceil(side_px * MPP / cell)) + 3, 4)
    coarse = Image.fromarray(rng.standard_normal((n, n)).astype(np.float32))
    scale = cell / MPP
    box = (1.0, 1.0, 1.0 + side_px / scale, 1.0 + side_px / scale)
    return np.asarray(coarse.resize((side_px, side_px), Image.Resampling.BICUBIC, box=box)) * 1.5


def _blob(rng: np.random.Generator, x: float, y: float, radius: float, roughness: float = 0.12) -> np.ndarray:
    """A closed outline around (x, y): ``[96,2]`` points in microns."""
    angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    r = np.ones_like(angle)
    for k in range(1, 8):
        r += roughness / k**0.7 * rng.normal() * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    r = radius * np.clip(r, 0.4, 1.6)
    return np.stack([x + r * np.cos(angle), y + r * np.sin(angle)], axis=1)


def _raster(outlines: list[np.ndarray], side_px: int) -> np.ndarray:
    picture = Image.new("1", (side_px, side_px))
    for outline in outlines:
        ImageDraw.Draw(picture).polygon([tuple(p) for p in (outline / MPP - 0.5).tolist()], fill=1)
    return np.asarray(picture)


def _soft(mask: np.ndarray, radius: float) -> np.ndarray:
    """A mask with soft edges, float32 in [0, 1]."""
    picture = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(radius / MPP))
    return np.asarray(picture, dtype=np.float32) / 255


@dataclass(frozen=True)
class _Look:
    """What nuclei of one kind look like; every value is (median, spread of a log-normal)."""

    length: tuple[float, float]  # longer half axis
    ratio: tuple[float, float]  # of the two half axes
    dark: tuple[float, float]  # haematoxylin concentration
    texture: tuple[float, float]  # amplitude of the chromatin's clumps
    nucleolus: tuple[float, float]  # strength of one dark spot
    bend: tuple[float, float]  # departure from an ellipse


_FIBROBLAST = _Look((5.0, 0.2), (3.0, 0.2), (0.95, 0.15), (0.12, 0.2), (0.02, 0.1), (0.2, 0.6))
_LYMPHOCYTE = _Look((2.9, 0.08), (1.1, 0.06), (1.35, 0.1), (0.10, 0.2), (0.02, 0.1), (0.05, 0.4))
_EPITHELIUM = _Look((3.7, 0.1), (1.3, 0.1), (1.0, 0.12), (0.16, 0.2), (0.08, 0.5), (0.06, 0.5))


def _tumour(grade: float, dark: float) -> _Look:
    """Tumour nuclei: the higher the grade (0..1), the larger, the more unequal and the coarser."""
    length, texture = (4.3 + 1.1 * grade, 0.18 + 0.12 * grade), (0.26 + 0.10 * grade, 0.3)
    return _Look(length, (1.35, 0.2), (dark, 0.22), texture, (0.35 + 0.3 * grade, 0.5), (0.16, 0.6))


def _scatter(rng: np.random.Generator, keep: np.ndarray, spacing: float) -> np.ndarray:
    """Points on a jittered grid, each kept with the probability that ``keep`` ``[side,side]`` has there."""
    side = keep.shape[0] * MPP
    n = int(side / spacing)
    grid = (np.stack(np.meshgrid(np.arange(n), np.arange(n)), axis=-1).reshape(-1, 2) + 0.5) * spacing
    points = grid + rng.uniform(-0.42, 0.42, grid.shape) * spacing
    px = np.clip((points / MPP).astype(int), 0, keep.shape[0] - 1)
    return points[rng.random(len(points)) < keep[px[:, 1], px[:, 0]]]


def _stamp(
    rng: np.random.Generator,
    h: np.ndarray,
    cover: np.ndarray,
    xy: np.ndarray,
    angle: np.ndarray,
    look: _Look,
    size: float,
) -> None:
    """Draw nuclei at ``xy`` into the haematoxylin map and into the map of what they cover, both in place."""
    k = len(xy)

    def value(center: tuple[float, float]) -> np.ndarray:
        return (center[0] * np.exp(rng.normal(0, 1, k) * center[1])).astype(np.float32)

    long, ratio = size * value(look.length), np.clip(value(look.ratio), 1.0, 5.0)
    dark, texture, nucleolus = value(look.dark), value(look.texture), value(look.nucleolus)
    bend = value(look.bend) * rng.choice(np.array([-1, 1], dtype=np.float32), k)
    clumps = _noise(rng, 512, 1.1)
    side_px = h.shape[0]
    offsets = (np.arange(2 * _HALF, dtype=np.float32) + 0.5 - _HALF) * MPP
    for start in range(0, k, 512):
        part = np.s_[start : start + 512, None, None]
        at = xy[start : start + 512]
        corner = np.round(at / MPP).astype(int)
        inside = ((corner >= _HALF) & (corner < side_px - _HALF)).all(1)
        shift = (at - corner * MPP).astype(np.float32)
        dx, dy = offsets - shift[:, 0, None, None], offsets[:, None] - shift[:, 1, None, None]
        cos, sin = np.cos(angle[part]).astype(np.float32), np.sin(angle[part]).astype(np.float32)
        a, b = long[part], long[part] / ratio[part]
        u, v = (dx * cos + dy * sin) / a, (dy * cos - dx * sin) / b
        v = v + bend[part] * (u * u - 0.3)
        radius = np.sqrt(u * u + v * v)
        edge = np.clip((1 - radius) * np.sqrt(a * b) / 0.9 + 0.5, 0, 1)
        spot = rng.uniform(-0.35, 0.35, (2, len(at), 1, 1)).astype(np.float32)
        spots = nucleolus[part] * np.exp(-((u - spot[0]) ** 2 + (v - spot[1]) ** 2) / 0.05)
        # Coarse chromatin gathers at the membrane and leaves the middle clear.
        body = 1 + texture[part] * (1.1 * radius**2 - 0.7) + spots
        crop = rng.integers(0, 512 - 2 * _HALF, (len(at), 2))
        for i in np.flatnonzero(inside):
            (x, y), (p, q) = corner[i], crop[i]
            chromatin = texture[start + i] * clumps[p : p + 2 * _HALF, q : q + 2 * _HALF]
            window = np.s_[y - _HALF : y + _HALF, x - _HALF : x + _HALF]
            ink = edge[i] * np.clip(dark[start + i] * (body[i] + chromatin), 0.25, 2.2)
            np.maximum(h[window], ink, out=h[window])
            np.maximum(cover[window], edge[i], out=cover[window])


def render_slide(
    rng: np.random.Generator, side: float, stain: Stain, tumour_share: float
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draw one slide.

    Args:
        rng: all randomness of the picture.
        side: of the square slide in microns.
        stain: from :func:`draw_stain`.
        tumour_share: rough share of the tissue that is tumour; 0 draws none.

    Returns:
        ``[S,S,3]`` uint8 at 0.5 microns per pixel, and the tumour's outlines, ``[K,2]`` points each in level-0 pixels.
    """
    px = int(side / MPP)
    middle = side / 2
    tissue = _soft(_raster([_blob(rng, middle, middle, 0.37 * side)], px), 4.0) > np.clip(
        0.5 + 0.2 * _noise(rng, px, 14), 0.1, 0.9
    )
    outlines = []
    if tumour_share > 0:
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.22) * side
        x, y = middle + distance * np.cos(angle), middle + distance * np.sin(angle)
        outlines = [_blob(rng, x, y, 0.40 * side * np.sqrt(tumour_share), 0.16)]
    tumour = _raster(outlines, px) & tissue

    # Architecture. Each layer is a soft mask; what is left is stroma.
    grade = rng.uniform(0, 1)  # of this slide's tumour: how far its nuclei depart from ordinary epithelium
    size = np.exp(rng.normal(0, 0.06))  # of all nuclei of this slide (fixation, section thickness)
    fat = tissue & (_noise(rng, px, 60) > 2.4)
    nests = tumour & ~fat & (_noise(rng, px, 26) + 0.5 * _noise(rng, px, 12) > -0.75 + 0.7 * rng.normal())
    islands = ~tumour & tissue & (_noise(rng, px, 30) + 0.3 * _noise(rng, px, 12) > 1.55 + 0.4 * rng.normal())

    spaces = [_blob(rng, x, y, rng.uniform(4, 13), 0.15) for x, y in _scatter(rng, tumour * rng.uniform(0.2, 0.8), 50)]
    glands: list[tuple[float, float, float]] = []
    for x, y in _scatter(rng, (tissue & ~tumour & ~fat) * rng.uniform(0.2, 0.6), 62):
        glands.append((x, y, rng.uniform(11, 23)))
    rings = _raster([_blob(rng, x, y, r + 5, 0.05) for x, y, r in glands], px) & ~tumour
    lumens = _raster([_blob(rng, x, y, r - 5, 0.07) for x, y, r in glands], px) & ~tumour | _raster(spaces, px) & tumour
    lymphoid = tissue & ~nests & ~rings & ~fat & (_noise(rng, px, 34) > 2.25 + 0.4 * rng.normal())
    islands &= ~rings

    # Eosin: fibres with clefts, paler cytoplasm, empty lumens.
    theta = rng.uniform(0, np.pi)
    yy, xx = np.mgrid[:px, :px].astype(np.float32) * MPP
    wave = 2.4 * _noise(rng, px, 70) + 0.8 * _noise(rng, px, 22) + 0.15 * _noise(rng, px, 5)
    fibre = 0.5 + 0.5 * np.sin(2 * np.pi * ((xx * float(np.cos(theta)) + yy * float(np.sin(theta))) / 7.0 + wave))
    grain = _noise(rng, px, 1.5)
    stroma = 0.42 + 0.30 * fibre + 0.08 * _noise(rng, px, 40) + 0.06 * grain
    stroma = np.where((fibre < 0.16) & (_noise(rng, px, 30) > 0.3), 0.12, stroma)
    epithelium = np.maximum(_soft(nests | islands, 1.5), _soft(rings, 1.0))
    cytoplasm = 0.40 + 0.07 * _noise(rng, px, 9) + 0.05 * grain
    e = stroma * (1 - epithelium) + cytoplasm * epithelium
    e *= 1 - 0.55 * _soft(lymphoid, 3.0)
    e *= 1 - rng.uniform(0.0, 0.5) * _soft(
        tumour, 6.0
    )  # oedema around tumour: without it tumour would simply be darker
    empty = np.maximum(_soft(lumens, 0.8), _soft(fat, 1.0))
    h = (0.07 + 0.10 * epithelium + 0.02 * grain).clip(0.0)

    # Nuclei.
    free = tissue & ~rings & ~fat
    ring_points, ring_angles = [], []
    for x, y, r in glands:
        n = max(int(2 * np.pi * r / 5.6), 6)
        turn = np.linspace(0, 2 * np.pi, n, endpoint=False) + rng.normal(0, 0.05, n)
        reach = (r + 0.6 + rng.normal(0, 0.9, n))[:, None]
        ring_points.append(np.stack([x + reach[:, 0] * np.cos(turn), y + reach[:, 0] * np.sin(turn)], axis=1))
        ring_angles.append(turn)
    ring_xy = np.concatenate([*ring_points, np.zeros((0, 2))])
    ring_angle = np.concatenate([*ring_angles, np.zeros(0)])
    at = np.clip((ring_xy / MPP).astype(int), 0, px - 1)
    kept = rings[at[:, 1], at[:, 0]] & tissue[at[:, 1], at[:, 0]]
    ring_xy, ring_angle = ring_xy[kept], ring_angle[kept]

    cover = np.zeros_like(h)

    def draw(xy: np.ndarray, look: _Look, angle: np.ndarray | None = None) -> None:
        angle = rng.uniform(0, np.pi, len(xy)) if angle is None else angle
        _stamp(rng, h, cover, xy, angle, look, size)

    fibroblasts = _scatter(rng, (free & ~nests & ~islands & ~lymphoid) * 0.75, 15.0)
    draw(fibroblasts, _FIBROBLAST, theta + np.pi / 2 + rng.normal(0, 0.35, len(fibroblasts)))
    draw(_scatter(rng, lymphoid * 0.95, 7.2), _LYMPHOCYTE)
    draw(_scatter(rng, (free & ~islands) * rng.uniform(0.01, 0.12), 9.0), _LYMPHOCYTE)
    draw(ring_xy, _EPITHELIUM, ring_angle)
    draw(_scatter(rng, islands * 0.93, 8.4), _EPITHELIUM)
    tumour_xy = _scatter(rng, (nests & ~lumens) * rng.uniform(0.8, 0.95), 10.0 + 1.6 * grade)
    draw(tumour_xy, _tumour(grade, dark=max(0.95 + 0.15 * rng.normal(), 0.6)))

    e = e * (1 - 0.6 * cover) * (1 - 0.92 * empty)
    h *= 1 - 0.95 * np.where(cover > 0, np.minimum(empty, 1 - cover), empty)
    thickness = _soft(tissue, 0.7) * (1 + 0.07 * _noise(rng, px, 90))
    return _to_light(h * thickness, e * thickness, stain, rng), [outline / MPP for outline in outlines]


def _to_light(h: np.ndarray, e: np.ndarray, stain: Stain, rng: np.random.Generator) -> np.ndarray:
    """Beer-Lambert, then the camera's noise: ``[S,S,3]`` uint8."""
    h, e = h * np.float32(stain.amounts[0]), e * np.float32(stain.amounts[1])
    light = np.empty((*h.shape, 3), dtype=np.uint8)
    for c in range(3):
        density = h * np.float32(1.15 * stain.haematoxylin[c]) + e * np.float32(1.15 * stain.eosin[c])
        noise = rng.standard_normal(h.shape, dtype=np.float32) * np.float32(1.8)
        light[..., c] = np.clip(np.float32(stain.white[c]) * np.exp(-density) + noise + np.float32(0.5), 0, 255)
    return light
