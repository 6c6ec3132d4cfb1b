"""QuPath and ASAP outlines, and the share of a patch that they cover."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slide_makers import asap, corners, qupath

from histodd_bench.data.annotations import Polygon, coverage, read_annotation, read_geojson
from histodd_bench.data.wsi import SlideError

SQUARE = [[0, 0], [100, 0], [100, 100], [0, 100], [0, 0]]


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def feature(kind: str, coordinates: object, **properties: object) -> dict[str, object]:
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties}


def test_what_qupath_exports(tmp_path: Path) -> None:
    path = qupath(
        tmp_path / "a.geojson",
        ("Tumor", [corners((0, 0, 100, 100)), corners((20, 20, 40, 40))]),
        ("Ignore*", [corners((50, 50, 60, 60))]),
    )
    got = read_annotation(path)
    assert [(p.name, p.inside, len(p.points)) for p in got] == [
        ("Tumor", True, 4),
        ("Tumor", False, 4),
        ("Ignore*", False, 4),
    ]


@pytest.mark.parametrize("wrap", [lambda f: {"type": "FeatureCollection", "features": [f]}, lambda f: [f], lambda f: f])
def test_collections_lists_and_single_features(tmp_path: Path, wrap) -> None:
    (polygon,) = read_geojson(
        write(tmp_path / "a.geojson", wrap(feature("Polygon", [SQUARE], classification="Tumour")))
    )
    assert polygon.name == "Tumour" and polygon.points.tolist() == SQUARE[:-1]


def test_many_parts_and_what_has_no_area(tmp_path: Path) -> None:
    moved = [[x + 500, y] for x, y in SQUARE]
    parts = [
        feature("MultiPolygon", [[SQUARE], [moved]], classification={"name": "T"}),
        feature("Point", [1, 2]),
        feature("MultiPoint", [[1, 2]]),
        feature("Polygon", [SQUARE], objectType="detection"),
        {
            "geometry": {"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": [SQUARE]}]},
            "properties": None,
        },
    ]
    got = read_geojson(write(tmp_path / "a.json", parts))
    assert [p.name for p in got] == ["T", "T", ""] and got[1].points[0].tolist() == [500, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([feature("Polygon", [SQUARE[:-1]], name="mine")], "annotation 'mine' is an open outline"),
        ([feature("LineString", SQUARE)], "annotation '0' is an open line"),
        ([feature("Polygon", [[[0, 0], [1, 1], [0, 0]]])], None),
        ([feature("Polygon", [[[0, 0], [0, 0]]])], "is no area: it has 2 points"),
        ([feature("Polygon", [[[0, 0], ["x", 1], [2, 2], [0, 0]]])], "coordinate that is no number"),
        ([feature("Polygon", [[[0, 0], [1e999, 1], [2, 2], [0, 0]]])], "not finite"),
        ([feature("Polygon", [[0, 1, 2, 3]])], "coordinate that is no number"),
        ([feature("Polygon", 7)], "coordinates that are no list"),
        ([feature("Polygon", None)], "coordinates that are no list"),
        ([feature("Polygon", "ab")], "coordinates that are no list"),
        ([feature("Polygon", ["abcd"])], "coordinate that is no number"),
        ([feature("Polygon", [["00", "90", "99", "00"]])], "coordinate that is no number"),
        ([feature("Polygon", [[["0", "0"], ["9", "0"], ["9", "9"], ["0", "0"]]])], "coordinate that is no number"),
        ([feature("Polygon", [[[True, 0], [9, 0], [9, 9], [True, 0]]])], "coordinate that is no number"),
        ([feature("Polygon", [[[10**400, 0], [9, 0], [9, 9], [10**400, 0]]])], "coordinate that is no number"),
        ([feature("Polygon", [[[1e300, 0], [9, 0], [9, 9], [1e300, 0]]])], "outside of any slide"),
        ([{"geometry": None}], "feature 0 has no geometry"),
        ([{"geometry": 7}], "feature 0 has no geometry"),
        ([None], "feature 0 has no geometry"),
        ({"features": None}, "neither a feature nor a collection"),
        ([feature("Polygon", [SQUARE]) | {"properties": [1]}], "feature 0 has properties that are no JSON object"),
        ([feature("Polygon", [SQUARE]) | {"properties": "x"}], "feature 0 has properties that are no JSON object"),
        ([feature("Polygon", [SQUARE], classification=7)], "feature 0 has a classification that is no name"),
        ([feature("Polygon", [SQUARE], classification={"name": ["T"]})], "a classification that is no name"),
        ([{"geometry": {"type": "GeometryCollection", "geometries": 5}}], "geometries that are no list"),
        ([{"geometry": {"type": "GeometryCollection", "geometries": {"a": 1}}}], "geometries that are no list"),
        ([{"geometry": {"type": "GeometryCollection", "geometries": [None]}}], "a part that is no geometry"),
        ([feature("Circle", [SQUARE])], "of unknown kind 'Circle'"),
        ([{"type": "Feature"}], "feature 0 has no geometry"),
        (["x"], "feature 0 has no geometry"),
        ("x", "neither a feature nor a collection"),
        ({"features": 3}, "neither a feature nor a collection"),
    ],
)
def test_geojson_that_cannot_be_used(tmp_path: Path, content: object, message: str | None) -> None:
    path = write(tmp_path / "a.geojson", content)
    if message is None:
        assert len(read_geojson(path)[0].points) == 2, "an area of nothing covers nothing"
        return
    with pytest.raises(SlideError, match=message) as error:
        read_geojson(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00"])
def test_what_is_no_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.geojson").write_text(text)
    with pytest.raises(SlideError, match="no readable GeoJSON"):
        read_annotation(tmp_path / "a.geojson")


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(SlideError, match=r"must be ASAP .xml or QuPath .geojson"):
        read_annotation(tmp_path / "a.txt")
    with pytest.raises(SlideError, match="cannot be read"):
        read_annotation(tmp_path / "gone.xml")
    with open(tmp_path / "huge.xml", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(SlideError, match="larger than any real one"):
        read_annotation(tmp_path / "huge.xml")


def test_any_group_or_the_challenge_s(tmp_path: Path) -> None:
    path = asap(tmp_path / "a.xml", ("Stroma", corners((0, 0, 9, 9))))
    assert [p.name for p in read_annotation(path, any_group=True)] == ["Stroma"]
    with pytest.raises(SlideError, match="unknown group 'Stroma'"):
        read_annotation(path)


def test_asap_outlines_are_closed_from_the_last_point_to_the_first(tmp_path: Path) -> None:
    (polygon,) = read_annotation(asap(tmp_path / "a.xml", ("Tumor", corners((0, 0, 128, 128)))))
    assert coverage([polygon], np.array([[0, 0], [64, 64], [128, 0]]), 64.0).tolist() == [1, 1, 0]


@given(st.integers(0, 10_000))
def test_coverage_of_rectangles_is_their_overlap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    side = float(rng.choice([32, 50.7, 256, 1000.3]))
    left, top, width, height = rng.uniform(0, 5 * side, 4)
    polygon = Polygon(np.array(corners((left, top, left + width, top + height))), True)  # type: ignore[arg-type]
    at = rng.uniform(0, 8 * side, (40, 2)).round()
    overlap = [
        max(min(a + side, b + size) - max(a, b), 0.0)
        for corner in at.tolist()
        for a, b, size in ((corner[0], left, width), (corner[1], top, height))
    ]
    expected = np.array(overlap).reshape(-1, 2).prod(1) / side**2
    assert np.abs(coverage([polygon], at, side) - expected).max() < 0.11


def test_bands_do_not_change_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    angle = np.linspace(0, 2 * np.pi, 300, endpoint=False)
    star = np.stack([5000 + (3000 + 900 * np.sin(7 * angle)) * np.cos(angle), 5000 + 3500 * np.sin(angle)], axis=1)
    hole = star * 0.4 + 3000
    polygons = [Polygon(star, True), Polygon(hole, False)]
    at = np.stack(np.meshgrid(np.arange(0, 9744, 256), np.arange(0, 9744, 256)), axis=-1).reshape(-1, 2)
    at = at[rng.permutation(len(at))]
    whole = coverage(polygons, at, 256.0)
    monkeypatch.setattr("histodd_bench.data.annotations._BAND", 1 << 15)
    assert np.abs(coverage(polygons, at, 256.0) - whole).max() < 0.02
    area = np.pi * 3000 * 3500 * (1 - 0.16)
    assert whole.sum() * 256**2 == pytest.approx(area, rel=0.02)
