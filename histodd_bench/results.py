"""Results: one JSON record per cell, and the pandas frame that tables are made of. Reading needs no torch."""

import base64
import json
import math
import statistics
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from histodd_bench.errors import HistoddError
from histodd_bench.files import PARTIAL, digest, write_bytes

FORMAT = 1  # a record of another format is ignored, with a line that says so
RECORDS, PLAN = "records", "plan.json"
_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "dataset": str,
    "method": str,
    "ipc": (int, type(None)),
    "arch": str,
    "distill_seed": (int, type(None)),
    "eval_seed": int,
    "config": dict,
    "metrics": dict,
    "storage": dict,
    "seconds": dict,
    "environment": dict,
    "data": dict,
    "predictions": dict,
    "key": str,
}
_AGAIN = "the command that computed it computes it again"

Record = dict[str, Any]


def pack(array: np.ndarray) -> dict[str, Any]:
    """An array as JSON: dtype, shape and zlib-compressed base64."""
    array = np.ascontiguousarray(array)
    data = base64.b64encode(zlib.compress(array.tobytes(), 6)).decode()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "zlib_base64": data}


def unpack(packed: Mapping[str, Any]) -> np.ndarray:
    """The array of :func:`pack`."""
    data = zlib.decompress(base64.b64decode(packed["zlib_base64"]))
    return np.frombuffer(data, dtype=np.dtype(packed["dtype"])).reshape(packed["shape"]).copy()


def finite(value: Any) -> Any:
    """The same JSON value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def file_name(record: Record) -> str:
    """Readable and unique: dataset, method, ipc, network, seeds and the first digits of the key."""
    parts = [record["dataset"], record["method"]]
    if record["ipc"] is not None:
        parts.append(f"ipc{record['ipc']}")
    parts.append(record["arch"])
    if record["distill_seed"] is not None:
        parts.append(f"s{record['distill_seed']}")
    safe = "-".join("".join(c if c.isalnum() or c in "-_." else "_" for c in str(p)) for p in parts)
    return f"{safe}-e{record['eval_seed']}-{record['key'][:12]}.json"


def key_of(config: Mapping[str, Any]) -> str:
    """A record's key: SHA-256 of its format and full configuration."""
    return digest({"format": FORMAT, "config": config})


class Place(Protocol):
    """Where a record stands in its table."""

    @property
    def method(self) -> str: ...
    @property
    def ipc(self) -> int | None: ...
    @property
    def arch(self) -> str: ...
    @property
    def distill_seed(self) -> int | None: ...
    @property
    def eval_seed(self) -> int: ...


def make_record(
    place: Place,
    dataset: str,
    config: Mapping[str, Any],
    *,
    probabilities: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    **rest: Any,
) -> Record:
    """A record as :func:`write_record` takes it.

    Args:
        config: everything the result depends on; its hash is the key.
        probabilities: ``[N,C]``, of every test patch or slide; kept in their own precision.
        labels: ``[N]``.
        groups: ``[N]``, the slides or patients that the bootstrap draws.
        rest: ``metrics``, ``storage``, ``seconds``, ``stain``, ``set``, ``data``, ``environment`` and, where known, ``memory``.
    """
    return {
        "key": key_of(config),
        "dataset": dataset,
        "method": place.method,
        "ipc": place.ipc,
        "arch": place.arch,
        "distill_seed": place.distill_seed,
        "eval_seed": place.eval_seed,
        "config": config,
        **rest,
        "predictions": {
            "probabilities": pack(probabilities),
            "labels": pack(labels.astype(np.int16)),
            "groups": pack(groups.astype(np.int32)),
        },
    }


def write_record(out: Path, record: Record) -> Path:
    """Write a record atomically below ``out``."""
    path = out / RECORDS / file_name(record)
    text = json.dumps(finite({"format": FORMAT, **record}), indent=1, allow_nan=False) + "\n"
    write_bytes(path, text.encode())
    return path


def read_record(path: Path) -> Record:
    """Read and check one record.

    Raises:
        HistoddError: unreadable, of another version, incomplete, or changed since it was written.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HistoddError(f"{path} cannot be read ({error}): {_AGAIN}") from None
    if not isinstance(record, dict):
        raise HistoddError(f"{path} is not a record: delete it")
    if record.get("format") != FORMAT:
        raise HistoddError(
            f"{path} was written by another version (record format {record.get('format')}, this one reads {FORMAT}): "
            f"{_AGAIN} beside it, and then it can be deleted"
        )
    for name, kind in _REQUIRED.items():
        if name not in record or not isinstance(record[name], kind):
            raise HistoddError(f"{path} has no usable {name!r}: {_AGAIN}")
    if key_of(record["config"]) != record["key"]:
        raise HistoddError(f"{path} does not match its own configuration (edited?): {_AGAIN}")
    return record


def read_records(out: Path) -> tuple[list[Record], list[str]]:
    """All usable records below ``out``, in a fixed order, and one line for each that was left out."""
    records, ignored = [], []
    for path in sorted((out / RECORDS).glob("*.json")):
        try:
            records.append(read_record(path))
        except HistoddError as error:
            ignored.append(f"ignored: {error}")
    order = {"ipc": -1, "distill_seed": -1}
    records.sort(key=lambda r: tuple(r[c] if r[c] is not None else order.get(c, -1) for c in _IDENTITY) + (r["key"],))
    return records, ignored


_IDENTITY = ("dataset", "method", "ipc", "arch", "distill_seed", "eval_seed")


def finished_keys(out: Path, log: Callable[[str], object]) -> set[str]:
    """Keys of all usable records below ``out``, before more are computed: others are named, half-written files removed."""
    records, ignored = read_records(out)
    for line in ignored:
        log(line)
    for path in leftovers(out):
        path.unlink(missing_ok=True)
    return {r["key"] for r in records}


def leftovers(out: Path) -> list[Path]:
    """Files that a killed run left half-written below ``out``; they are never read."""
    return sorted((out / RECORDS).glob(f"*{PARTIAL}"))


def shared(config: Mapping[str, Any], varied: Collection[str] = (), other_data: bool = False) -> dict[str, Any]:
    """What numbers must share to stand in one table: the data, the training recipe, threads and device.

    Args:
        config: of a record.
        varied: fields of the training recipe that the table's columns set, and which may therefore differ.
        other_data: whether the table's columns prepare the training data differently.
    """
    evaluation = {k: v for k, v in config["eval"].items() if k not in ("arch", "width", "seed", *varied)}
    rest = {k: v for k, v in config.items() if k not in ("eval", "set")}
    if other_data:
        rest["data"] = {k: rest["data"].get(k) for k in ("name", "test", "image_size", "split_seed")}
    return {"eval": evaluation, **rest}


def protocol(config: Mapping[str, Any], varied: Collection[str] = (), other_data: bool = False) -> str:
    """The same text for records that share what :func:`shared` names."""
    return digest(shared(config, varied, other_data))


def variant(config: Mapping[str, Any]) -> dict[str, Any]:
    """What may differ between two sets of one method, images per class and seed: its fields, version and pool, flat."""
    made = config["set"]
    flat = dict(made.get("fields", {}))
    flat.update({f"pool.{k}": v for k, v in (made.get("pool") or {}).items()})
    flat.update({f"data.{k}": v for k, v in config["data"].items() if k not in _DATA})
    flat["version"] = made.get("version")
    return flat


_DATA = ("name", "train", "test", "image_size", "split_seed")


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration field by field: dotted names, lists whole."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        inner = flat_config(value) if isinstance(value, Mapping) else None
        flat.update({name: value} if inner is None else {f"{name}.{k}": v for k, v in inner.items()})
    return flat


def _flat(value: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            flat.update(_flat(inner, f"{prefix}.{name}"))
        elif isinstance(inner, int | float) or inner is None:
            flat[f"{prefix}.{name}"] = inner
    return flat


def to_frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row per record.

    Columns: ``dataset, method, ipc, arch, width, distill_seed, eval_seed, key, protocol, variant`` (JSON), and the numbers
    as ``metrics.*``, ``storage.*``, ``seconds.*``, ``memory.*`` (bytes) and ``fields.*`` (the method's own); metrics are
    fractions, times seconds. ``ipc`` and ``distill_seed`` are <NA> for the whole training set.
    """
    rows = []
    for r in records:
        row = {name: r[name] for name in _IDENTITY}
        row["width"] = r["config"]["eval"].get("width")
        row["key"], row["protocol"] = r["key"], protocol(r["config"])
        row["variant"] = json.dumps(variant(r["config"]), sort_keys=True)
        for part in ("metrics", "storage", "seconds", "memory"):
            row.update(_flat(r.get(part) or {}, part))
        row.update(_flat(r["config"]["set"].get("fields") or {}, "fields"))
        rows.append(row)
    frame = pd.DataFrame(rows, columns=None if rows else [*_IDENTITY, "width", "key", "protocol", "variant"])
    for name in ("ipc", "distill_seed", "width"):
        frame[name] = frame[name].astype("Int64")
    return frame


def aggregate(values: Sequence[float | None]) -> tuple[float, float, int]:
    """Mean, standard deviation (n - 1; NaN below two values) and n, over the values that exist."""
    kept = [float(v) for v in values if v is not None and not pd.isna(v)]
    if not kept:
        return math.nan, math.nan, 0
    # Exactly rounded sums: the same in any order.
    return statistics.fmean(kept), statistics.stdev(kept) if len(kept) > 1 else math.nan, len(kept)


def summary(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean, sd and n of one metric over seeds, by dataset, protocol, network, method, variant and images per class."""
    by = ["dataset", "protocol", "arch", "width", "method", "variant", "ipc"]
    rows = []
    for values, group in frame.groupby(by, dropna=False, sort=True):
        mean, sd, n = aggregate(group[metric].tolist())
        rows.append({**dict(zip(by, values, strict=True)), "mean": mean, "sd": sd, "n": n})
    return pd.DataFrame(rows, columns=[*by, "mean", "sd", "n"])


def write_plan(out: Path, table: str, request: Mapping[str, Any]) -> None:
    """Remember what was asked of a table, so that ``show`` can print a dash where a result is still missing.

    Args:
        table: its name.
        request: dataset name -> ``{"ipc": [...], "methods": [...]}``, and where they are known ``cells`` (record key ->
            places in the table, pairs of row and column) and ``facts``; joined with what was asked before.
    """
    plan = read_plan(out)
    for dataset, asked in request.items():
        known = plan.setdefault(table, {}).setdefault(dataset, {})
        for name, values in asked.items():
            if isinstance(values, Mapping):
                known[name] = {**known.get(name, {}), **values}
            else:
                joined = list(dict.fromkeys([*known.get(name, []), *values]))
                known[name] = sorted(joined) if name == "ipc" else joined
    write_bytes(out / PLAN, (json.dumps(plan, indent=1) + "\n").encode())


def claimed(plan: Mapping[str, Mapping[str, Mapping[str, Any]]], but: str) -> set[str]:
    """Keys of records that other tables than ``but`` asked for and that it did not."""
    keys = {name: {k for asked in part.values() for k in asked.get("cells", ())} for name, part in plan.items()}
    others = {k for name, found in keys.items() if name != but for k in found}
    return others - keys.get(but, set())


def read_plan(out: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Table name -> dataset -> what was asked; empty where nothing was."""
    try:
        plan = json.loads((out / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}
