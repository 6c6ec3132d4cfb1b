"""Annotated outlines: ASAP XML and QuPath GeoJSON, and how much of a patch they cover.

Outlines are read as areas in level-0 pixels. An area that is cut out (ASAP group ``_2``, a hole of a GeoJSON polygon, a
QuPath class whose name begins with ``Ignore``) takes away from the areas around it, not from smaller ones inside it.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import defusedxml.ElementTree as ElementTree
import numpy as np
from defusedxml import DefusedXmlException
from PIL import Image, ImageDraw

from histodd_bench.data.tissue import Mask
from histodd_bench.data.wsi import OVERVIEW_SIDE, TISSUE_MPP, Slide, SlideError

_TUMOUR_GROUPS, _CUT_OUT = ("Tumor", "_0", "_1"), "_2"  # of the Camelyon challenges
_LARGEST_FILE = 1 << 29  # bytes
_FINE = 32  # pixels per side of a patch in which its coverage is counted
_BAND = 1 << 24  # pixels rasterised at once
_FARTHEST = 1 << 24  # level-0 pixels; outlines may reach beyond their slide, but not to another one


@dataclass(frozen=True)
class Polygon:
    """An annotated outline: ``points`` ``[K,2]`` float level-0 pixels; ``inside`` False for an area cut out.

    ``name`` is its ASAP group or QuPath class, empty where it has none.
    """

    points: np.ndarray
    inside: bool
    name: str = ""


def read_annotation(path: Path, *, any_group: bool = False) -> list[Polygon]:
    """Outlines of an ASAP file (``.xml``) or a QuPath file (``.geojson``, ``.json``); see :func:`read_asap`.

    Raises:
        SlideError: another kind of file, or one that cannot be used.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise SlideError(path, f"annotation cannot be read ({error.strerror})") from None
    if size > _LARGEST_FILE:
        raise SlideError(path, f"annotation of {size:,} bytes: larger than any real one")
    if path.suffix.lower() == ".xml":
        return read_asap(path, any_group=any_group)
    if path.suffix.lower() in (".geojson", ".json"):
        return read_geojson(path)
    raise SlideError(path, "annotations must be ASAP .xml or QuPath .geojson files")


def read_asap(path: Path, *, any_group: bool = False) -> list[Polygon]:
    """Outlines of an ASAP annotation file. Groups ``Tumor``, ``_0`` and ``_1`` are tumour, ``_2`` are cut-outs.

    Outlines are closed from their last point to their first, as ASAP draws them. Points and measurement marks are left
    out: they have no area.

    Args:
        any_group: take areas of any other group too; otherwise an unknown group is an error.

    Raises:
        SlideError: not well-formed XML, an area with fewer than three points, or coordinates that are no numbers.
    """
    path = Path(path)
    try:
        tree = ElementTree.parse(path)
    except (ElementTree.ParseError, DefusedXmlException, OSError, ValueError) as error:
        raise SlideError(path, f"no readable annotation XML ({error})") from None
    polygons = []
    for node in tree.iter("Annotation"):
        name, group, kind = node.get("Name", "?"), node.get("PartOfGroup", ""), node.get("Type", "Polygon")
        if kind in ("Dot", "PointSet", "Measurement"):
            continue
        if not any_group and group not in (*_TUMOUR_GROUPS, _CUT_OUT):
            raise SlideError(path, f"annotation {name!r} is of unknown group {group!r}: expected Tumor, _0, _1 or _2")
        polygons.append(Polygon(_asap_points(node, path, name), group != _CUT_OUT, group))
    return polygons


def _asap_points(node: Any, path: Path, name: str) -> np.ndarray:
    try:
        rows = [
            (float(c.get("Order", i)), float(c.get("X")), float(c.get("Y")))
            for i, c in enumerate(node.iter("Coordinate"))
        ]
    except (TypeError, ValueError):
        raise SlideError(path, f"annotation {name!r} has a coordinate that is no number") from None
    return _area_points([(x, y) for _, x, y in sorted(rows, key=lambda row: row[0])], path, name)


def _area_points(points: Any, path: Path, name: str) -> np.ndarray:
    try:
        pairs = [(x, y) for x, y, *_ in points]
        if not all(type(value) in (int, float) for pair in pairs for value in pair):
            raise TypeError
        found = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        raise SlideError(path, f"annotation {name!r} has a coordinate that is no number") from None
    if len(found) < 3 or not np.isfinite(found).all():
        raise SlideError(path, f"annotation {name!r} is no area: it has {len(found)} points, or not finite ones")
    if np.abs(found).max() > _FARTHEST:
        raise SlideError(path, f"annotation {name!r} has a coordinate that is outside of any slide")
    return found


def read_geojson(path: Path) -> list[Polygon]:
    """Outlines of a file that QuPath exported as GeoJSON: a FeatureCollection, a list of features, or one feature.

    Polygons and multi-polygons are areas, their inner rings are cut out; points are left out; classes that begin with
    ``Ignore`` are cut out whole. Detections and measurements are not annotations and are left out.

    Raises:
        SlideError: no GeoJSON, an open line, a ring that is not closed, or coordinates that are no numbers.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise SlideError(path, f"no readable GeoJSON ({error})") from None
    features = content.get("features", [content]) if isinstance(content, dict) else content
    if not isinstance(features, list):
        raise SlideError(path, "no readable GeoJSON (neither a feature nor a collection of features)")
    polygons: list[Polygon] = []
    for number, feature in enumerate(features):
        if not isinstance(feature, dict) or not isinstance(feature.get("geometry"), dict):
            raise SlideError(path, f"feature {number} has no geometry: export it from QuPath as GeoJSON")
        properties = feature.get("properties") or {}
        if not isinstance(properties, dict):
            raise SlideError(path, f"feature {number} has properties that are no JSON object")
        if str(properties.get("objectType", "annotation")).lower() not in ("annotation", "unknown"):
            continue
        label = properties.get("classification")
        name = (label.get("name") if isinstance(label, dict) else label) or ""
        if not isinstance(name, str):
            raise SlideError(path, f"feature {number} has a classification that is no name")
        polygons += _geometry(feature["geometry"], path, name, str(properties.get("name") or name or number))
    return polygons


def _geometry(geometry: Any, path: Path, name: str, title: str, depth: int = 0) -> list[Polygon]:
    if not isinstance(geometry, dict):
        raise SlideError(path, f"annotation {title!r} has a part that is no geometry")
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if kind == "GeometryCollection" and depth < 4:
        parts = geometry.get("geometries") or []
        if not isinstance(parts, list):
            raise SlideError(path, f"annotation {title!r} has geometries that are no list")
        return [p for part in parts for p in _geometry(part, path, name, title, depth + 1)]
    if kind in ("Point", "MultiPoint"):
        return []
    if kind in ("LineString", "MultiLineString"):
        raise SlideError(
            path, f"annotation {title!r} is an open line, no area: close it, or delete it, and export again"
        )
    if kind not in ("Polygon", "MultiPolygon"):
        raise SlideError(path, f"annotation {title!r} is of unknown kind {kind!r}: expected Polygon or MultiPolygon")
    if not isinstance(coordinates, list):
        raise SlideError(path, f"annotation {title!r} has coordinates that are no list")
    cut_out = name.lower().startswith("ignore")
    polygons = []
    for rings in [coordinates] if kind == "Polygon" else coordinates:
        for index, ring in enumerate(rings if isinstance(rings, list) else [None]):
            points = _area_points(ring, path, title)
            if not np.array_equal(points[0], points[-1]):
                raise SlideError(path, f"annotation {title!r} is an open outline: its last point must repeat its first")
            polygons.append(Polygon(points[:-1], index == 0 and not cut_out, name))
    return polygons


def _area(points: np.ndarray) -> float:
    x, y = points.T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


def _draw(
    picture: Image.Image, polygons: Iterable[Polygon], scale: float, corner: tuple[float, float] = (0.0, 0.0)
) -> None:
    """Fill outlines into a picture whose top left corner is ``corner`` in level-0 pixels; larger ones first."""
    draw = ImageDraw.Draw(picture)
    for polygon in sorted(polygons, key=lambda p: -_area(p.points)):
        # Pixel i covers i..i+1, its centre is i + 0.5.
        points = (polygon.points - corner) / scale - 0.5
        draw.polygon([tuple(point) for point in points.tolist()], fill=int(polygon.inside))


def polygon_mask(polygons: list[Polygon], slide: Slide, mpp: float = TISSUE_MPP) -> Mask:
    """Rasterise outlines over a slide; larger ones first, so that an island in a cut-out stays."""
    mpp = max(mpp, slide.mpp, max(slide.width, slide.height) * slide.mpp / OVERVIEW_SIDE)
    scale = mpp / slide.mpp
    picture = Image.new("1", (max(int(slide.width / scale), 1), max(int(slide.height / scale), 1)))
    _draw(picture, polygons, scale)
    return Mask(np.asarray(picture), scale)


def coverage(polygons: list[Polygon], corners: np.ndarray, side: float) -> np.ndarray:
    """Share of each patch that lies inside the outlines, ``[N]`` float in [0, 1], counted in 32 x 32 points per patch.

    Works in bands of rows around the outlines, so that memory is bounded for small patches of large slides.

    Args:
        polygons: outlines and cut-outs.
        corners: ``[N,2]`` top-left (x, y) in level-0 pixels.
        side: of the patches in level-0 pixels.
    """
    share = np.zeros(len(corners))
    areas = [p.points for p in polygons if p.inside]
    if not areas or not len(corners):
        return share
    low, high = np.min([p.min(0) for p in areas], axis=0), np.max([p.max(0) for p in areas], axis=0)
    near = np.flatnonzero(((corners + side >= low) & (corners <= high)).all(1))
    if not len(near):
        return share
    scale = side / _FINE
    left = float(corners[near, 0].min())
    across = int(np.ceil((corners[near, 0].max() + side - left) / scale)) + 1
    band = max(_BAND // across, 2 * _FINE) * scale  # level-0 pixels down
    boxes = [(p.points[:, 1].min(), p.points[:, 1].max(), p) for p in polygons]
    order = near[np.argsort(corners[near, 1], kind="stable")]
    heights = corners[order, 1]
    start = 0
    while start < len(order):
        top = float(heights[start])
        stop = int(np.searchsorted(heights, top + band - side, side="right"))
        part = order[start : max(stop, start + 1)]
        bottom = float(corners[part, 1].max()) + side
        crossing = [p for first, last, p in boxes if first <= bottom and last >= top]
        if any(p.inside for p in crossing):
            picture = Image.new("1", (across, int(np.ceil((bottom - top) / scale)) + 1))
            _draw(picture, crossing, scale, (left, top))
            share[part] = Mask(np.asarray(picture), scale).fraction(corners[part] - (left, top), side)
        start += len(part)
    return share
